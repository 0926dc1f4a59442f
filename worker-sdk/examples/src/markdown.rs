//! The plugin `markdown`: CommonMark to HTML that is safe whoever wrote it.
//!
//! Safety comes from construction rather than from cleaning up HTML: the parser's raw HTML is turned into text before
//! anything is written, and addresses are judged as the parser understood them.

use std::sync::Arc;

use plugvisor_worker::{Host, MAX_MESSAGE_BYTES, Plugin, Services, StartError};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd, html::push_html};
use serde::Deserialize;
use tonic::{Request, Response, Status};
use v1::{
    RenderRequest, RenderResponse,
    markdown_service_server::{MarkdownService, MarkdownServiceServer},
};

/// The generated contract.
#[allow(missing_docs, clippy::all, unused_qualifications, reason = "generated; the .proto file is the documentation")]
pub mod v1 {
    tonic::include_proto!("plugvisor.examples.markdown.v1");
}

/// The contract as a serialised `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/markdown.binpb"));

/// Rendered in less time than handing it to another thread takes.
const SHORT_BYTES: usize = 8 << 10;
const SCHEMES: [&str; 3] = ["http", "https", "mailto"];

/// The configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// The longest document, in bytes. At least 1.
    pub max_document_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_document_bytes: 512 << 10 }
    }
}

/// The plugin.
#[derive(Debug)]
pub struct Markdown {
    config: Config,
}

impl Plugin for Markdown {
    type Config = Config;

    async fn start(config: Config, _host: Host) -> Result<Self, StartError> {
        if config.max_document_bytes == 0 {
            return Err(StartError::configuration("maxDocumentBytes", "must be at least 1"));
        }
        Ok(Self { config })
    }

    fn services(self: Arc<Self>, services: &mut Services) {
        services.add(
            MarkdownServiceServer::from_arc(self)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        );
    }
}

#[tonic::async_trait]
impl MarkdownService for Markdown {
    async fn render(&self, request: Request<RenderRequest>) -> Result<Response<RenderResponse>, Status> {
        let RenderRequest { markdown } = request.into_inner();
        let most = self.config.max_document_bytes;
        if markdown.len() > most {
            return Err(Status::invalid_argument(format!(
                "the document has {} bytes, and at most {most} are taken (maxDocumentBytes)",
                markdown.len()
            )));
        }
        if markdown.len() <= SHORT_BYTES {
            return Ok(Response::new(render(&markdown)));
        }
        // A long document takes milliseconds, which health must not wait for.
        let rendered = tokio::task::spawn_blocking(move || render(&markdown)).await;
        rendered.map(Response::new).map_err(|_| Status::internal("rendering failed in an unforeseen way"))
    }
}

fn render(markdown: &str) -> RenderResponse {
    let options = Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TASKLISTS;
    let mut safe = Safe { title: Title::Awaited, open: Vec::new(), addresses_removed: 0 };
    let mut html = String::with_capacity(markdown.len() * 3 / 2);
    push_html(&mut html, Parser::new_ext(markdown, options).filter_map(|event| safe.pass(event)));
    let title = match safe.title {
        Title::Awaited => String::new(),
        Title::Reading(title) | Title::Known(title) => title,
    };
    RenderResponse { html, title, addresses_removed: safe.addresses_removed }
}

/// Judges the parser's events one by one.
struct Safe {
    title: Title,
    /// For each link or picture that is open, whether its tag was written.
    open: Vec<bool>,
    addresses_removed: u32,
}

enum Title {
    Awaited,
    Reading(String),
    Known(String),
}

impl Safe {
    fn pass<'a>(&mut self, event: Event<'a>) -> Option<Event<'a>> {
        self.watch_for_title(&event);
        match event {
            Event::Html(raw) | Event::InlineHtml(raw) => Some(Event::Text(raw)),
            Event::Start(Tag::Link { ref dest_url, .. } | Tag::Image { ref dest_url, .. }) => {
                let kept = is_safe_address(dest_url);
                self.open.push(kept);
                self.addresses_removed += u32::from(!kept);
                // Without its tag, the link's text or the picture's description stays as text.
                kept.then_some(event)
            }
            Event::End(TagEnd::Link | TagEnd::Image) => self.open.pop().unwrap_or(false).then_some(event),
            event => Some(event),
        }
    }

    fn watch_for_title(&mut self, event: &Event<'_>) {
        match (&mut self.title, event) {
            (Title::Awaited, Event::Start(Tag::Heading { .. })) => self.title = Title::Reading(String::new()),
            (Title::Reading(title), Event::Text(text) | Event::Code(text)) => title.push_str(text),
            (Title::Reading(title), Event::SoftBreak | Event::HardBreak) => title.push(' '),
            (Title::Reading(title), Event::End(TagEnd::Heading(_))) => self.title = Title::Known(std::mem::take(title)),
            _ => {}
        }
    }
}

/// Whether the address has no scheme or a harmless one, read as a browser does: it ignores tabs and line ends anywhere,
/// and control characters and spaces in front (<https://url.spec.whatwg.org/#concept-basic-url-parser>).
fn is_safe_address(address: &str) -> bool {
    let cleaned: String = address.chars().filter(|letter| !matches!(letter, '\t' | '\n' | '\r')).collect();
    let cleaned = cleaned.trim_start_matches(|letter: char| letter <= ' ');
    let Some((scheme, _)) = cleaned.split_once(':') else { return true };
    // A colon after one of these belongs to the path, the query or the fragment.
    scheme.contains(['/', '?', '#']) || SCHEMES.iter().any(|known| scheme.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn html(markdown: &str) -> String {
        render(markdown).html
    }

    #[test]
    fn commonmark_becomes_html() {
        assert_eq!(
            html("# Title\n\nSome *text* with `code`.\n\n- one\n- two\n"),
            "<h1>Title</h1>\n<p>Some <em>text</em> with <code>code</code>.</p>\n<ul>\n<li>one</li>\n<li>two</li>\n</ul>\n"
        );
        assert_eq!(
            html("[here](https://example.org/a?b=c)"),
            "<p><a href=\"https://example.org/a?b=c\">here</a></p>\n"
        );
        assert!(html("| a | b |\n|---|---|\n| 1 | 2 |\n").contains("<td>2</td>"));
    }

    #[test]
    fn the_title_is_the_text_of_the_first_heading() {
        assert_eq!(render("text\n\n## The *first* `one`\n\n# Second").title, "The first one");
        assert_eq!(render("no heading").title, "");
    }

    #[test]
    fn raw_html_is_shown_as_text() {
        for raw in
            ["<script>alert(1)</script>", "text <b onclick=x>bold</b>", "<!-- c -->", "<?php ?>", "<![CDATA[x]]>"]
        {
            let html = html(raw);
            let tags = html.replace("<p>", "").replace("</p>", "");
            assert!(!tags.contains('<'), "{html}");
            assert!(html.contains("&lt;"), "{html}");
        }
    }

    #[test]
    fn attributes_cannot_be_broken_out_of() {
        let html = html("[x](https://e.org/\"onclick=alert(1) 'a\" onmouseover=\"b')\n\n```x\" onload=\"y\ncode\n```");
        assert!(!html.contains("\"onclick"), "{html}");
        assert!(!html.contains("\" onmouseover"), "{html}");
        assert!(!html.contains("\" onload"), "{html}");
    }

    #[test]
    fn harmful_addresses_are_removed_and_counted() {
        let hostile = [
            "[x](javascript:alert(1))",
            "[x](JaVaScRiPt:alert(1))",
            "[x](<java\tscript:alert(1)>)",
            "[x](&#x6A;avascript:alert(1))",
            "[x](&#1;javascript:alert(1))",
            "[x](vbscript:x)",
            "[x](data:text/html;base64,AAAA)",
            "![x](data:image/svg+xml;base64,AAAA)",
            "[x](file:///etc/passwd)",
            "<javascript:alert(1)>",
            "[x][r]\n\n[r]: javascript:alert(1)",
        ];
        for markdown in hostile {
            let rendered = render(markdown);
            assert!(!rendered.html.contains("href") && !rendered.html.contains("src"), "{}", rendered.html);
            assert_eq!(rendered.addresses_removed, 1, "{markdown}");
        }
    }

    #[test]
    fn harmless_addresses_stay() {
        for address in
            ["https://e.org", "HTTP://e.org", "mailto:a@e.org", "page.html", "#part", "/a:b", "?q=a:b", "./x:y"]
        {
            let rendered = render(&format!("[x]({address})"));
            assert!(rendered.html.contains("<a href="), "{address}: {}", rendered.html);
            assert_eq!(rendered.addresses_removed, 0, "{address}");
        }
    }

    #[test]
    fn a_picture_in_a_removed_link_stays() {
        let rendered = render("[![alt](https://e.org/a.png)](javascript:x)");
        assert!(rendered.html.contains("<img src=\"https://e.org/a.png\""), "{}", rendered.html);
        assert!(!rendered.html.contains("<a"), "{}", rendered.html);
    }

    #[test]
    fn deep_nesting_ends() {
        assert!(html(&"> ".repeat(20_000)).len() < 10_000_000);
        assert!(html(&"[".repeat(50_000)).len() < 1_000_000);
    }
}
