//! The page itself: HTML out of finished entries. Pure.
//!
//! The thumbnails are inside as `data:` addresses, so the page is one file. Its content security policy allows those, its
//! own style, and nothing else: even a fault in another plugin's HTML could not run a script or fetch anything.

use base64::{display::Base64Display, engine::general_purpose::STANDARD};
use bytes::Bytes;
use pulldown_cmark_escape::escape_html;

/// One file of the page.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Entry {
    Picture {
        name: String,
        media: &'static str,
        width: u32,
        height: u32,
        file: Bytes,
    },
    /// `html` is trusted as far as the page's policy goes.
    Text {
        name: String,
        title: String,
        html: String,
    },
    Skipped {
        name: String,
    },
    Failed {
        name: String,
        problem: String,
    },
}

impl Entry {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Picture { name, .. }
            | Self::Text { name, .. }
            | Self::Skipped { name }
            | Self::Failed { name, .. } => name,
        }
    }

    /// About how many bytes of the page it becomes.
    pub(super) fn bytes(&self) -> usize {
        let rest = match self {
            Self::Picture { file, .. } => base64::encoded_len(file.len(), true).unwrap_or(usize::MAX),
            Self::Text { title, html, .. } => title.len() + html.len(),
            Self::Skipped { .. } => 0,
            Self::Failed { problem, .. } => problem.len(),
        };
        rest.saturating_add(self.name().len())
    }
}

const HEAD: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #222; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
figcaption, .problems { font-size: .85rem; color: #555; overflow-wrap: anywhere; }
article { border-top: 1px solid #ccc; margin-top: 2rem; padding-top: 1rem; }
</style>
"#;

pub(super) fn render(title: &str, entries: &[Entry]) -> String {
    let mut page = String::with_capacity(HEAD.len() + entries.iter().map(Entry::bytes).sum::<usize>() * 9 / 8 + 1024);
    let title = escaped(if title.is_empty() { "Gallery" } else { title });
    page.push_str(HEAD);
    page.push_str(&format!(
        "<title>{title}</title>\n</head>\n<body>\n<h1>{title}</h1>\n<section class=\"pictures\">\n"
    ));
    for entry in entries {
        if let Entry::Picture { name, media, width, height, file } = entry {
            let (name, data) = (escaped(name), Base64Display::new(file, &STANDARD));
            page.push_str(&format!(
                "<figure><img src=\"data:{media};base64,{data}\" width=\"{width}\" height=\"{height}\" alt=\"{name}\">\
                 <figcaption>{name}</figcaption></figure>\n"
            ));
        }
    }
    page.push_str("</section>\n");
    for entry in entries {
        if let Entry::Text { name, title, html } = entry {
            let label = escaped(if title.is_empty() { name } else { title });
            let name = escaped(name);
            page.push_str(&format!(
                "<article aria-label=\"{label}\">\n{html}<p class=\"problems\">{name}</p>\n</article>\n"
            ));
        }
    }
    let problems: Vec<_> = entries.iter().filter_map(problem_of).collect();
    if !problems.is_empty() {
        page.push_str("<section class=\"problems\">\n<h2>Not shown</h2>\n<ul>\n");
        for (name, problem) in problems {
            page.push_str(&format!("<li>{}: {}</li>\n", escaped(name), escaped(problem)));
        }
        page.push_str("</ul>\n</section>\n");
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn problem_of(entry: &Entry) -> Option<(&str, &str)> {
    match entry {
        Entry::Skipped { name } => Some((name, "neither a picture nor a text")),
        Entry::Failed { name, problem } => Some((name, problem)),
        Entry::Picture { .. } | Entry::Text { .. } => None,
    }
}

/// For text and for attributes in double quotes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Writing to a String does not fail.
    let _ = escape_html(&mut out, text);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_problems_cannot_become_markup() {
        let evil = "\"><script>alert(1)</script>.png".to_owned();
        let page = render(
            &evil,
            &[
                Entry::Picture {
                    name: evil.clone(),
                    media: "image/png",
                    width: 2,
                    height: 1,
                    file: Bytes::from_static(b"png"),
                },
                Entry::Text { name: evil.clone(), title: evil.clone(), html: "<p>kept</p>\n".into() },
                Entry::Skipped { name: evil.clone() },
                Entry::Failed { name: evil.clone(), problem: evil.clone() },
            ],
        );
        assert!(!page.contains("<script"), "{page}");
        assert!(!page.contains("alt=\"\">"), "{page}");
        assert!(page.contains("<p>kept</p>"));
        assert!(page.contains("src=\"data:image/png;base64,cG5n\" width=\"2\" height=\"1\""));
    }

    #[test]
    fn an_empty_page_is_whole() {
        let page = render("", &[]);
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
        assert!(page.contains("<title>Gallery</title>"));
        assert!(!page.contains("Not shown"));
    }
}
