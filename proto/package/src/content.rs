//! The content digest: one SHA-256 over every file of a bundle.
//!
//! It covers what a plugin can see when it runs and nothing else: paths, whether a file is executable, and bytes. Owners,
//! times, directories without files and the order on disk do not count. This module does not know how files are found.
//!
//! The digest is the SHA-256 of this text, in which every line ends with a line feed:
//!
//! ```text
//! plugvisor bundle 1
//! 0755 912384 8f43…64 hexadecimal digits… bin/thumbnailer
//! 0644 5120 0b7e…64 hexadecimal digits… descriptor.binpb
//! 0644 731 c1d2…64 hexadecimal digits… plugin.json
//! ```
//!
//! One line a file, sorted by the bytes of the path: mode (`0755` when the owner may execute it, else `0644`), size in
//! bytes, SHA-256, path, with one space between them. Paths are UTF-8 without control characters, so a line cannot be
//! taken for two. `plugin.json` stands with mode `0644` and with the size and SHA-256 of its canonical form, see
//! [`Manifest::canonical`](crate::Manifest::canonical).

use std::fmt::Write;

use crate::Digest;

/// The first line: what the text is, and its version.
const HEADING: &str = "plugvisor bundle 1\n";

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct BundleFile {
    /// Its path in the bundle, with `/` between components.
    pub path: String,
    /// Whether its owner may execute it.
    pub executable: bool,
    /// Its size in bytes; of `plugin.json`, the size of its canonical form.
    pub size: u64,
    /// The digest of its bytes; of `plugin.json`, of its canonical form.
    pub sha256: Digest,
}

/// The content digest of these files, in whatever order they come.
#[must_use]
pub fn content_digest(files: &[BundleFile]) -> Digest {
    Digest::of(content_list(files).as_bytes())
}

/// The text whose SHA-256 is the content digest.
#[must_use]
pub fn content_list(files: &[BundleFile]) -> String {
    let mut sorted: Vec<&BundleFile> = files.iter().collect();
    sorted.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let mut text = String::from(HEADING);
    for BundleFile { path, executable, size, sha256 } in sorted {
        let mode = if *executable { "0755" } else { "0644" };
        let sha256 = sha256.to_string();
        let hex = sha256.strip_prefix("sha256:").expect("a digest is written with its algorithm");
        writeln!(text, "{mode} {size} {hex} {path}").expect("a String takes all that is written");
    }
    text
}

/// Reads what [`content_list`] wrote; `None` for anything else.
#[must_use]
pub fn read_content_list(text: &str) -> Option<Vec<BundleFile>> {
    let file = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        let executable = match parts.next()? {
            "0755" => true,
            "0644" => false,
            _ => return None,
        };
        let size = parts.next()?.parse().ok()?;
        let sha256 = format!("sha256:{}", parts.next()?).parse().ok()?;
        Some(BundleFile { path: parts.next()?.to_owned(), executable, size, sha256 })
    };
    let files: Vec<BundleFile> = text.strip_prefix(HEADING)?.lines().map(file).collect::<Option<_>>()?;
    (content_list(&files) == text).then_some(files)
}

#[cfg(test)]
mod tests {
    use super::{BundleFile, content_digest, content_list, read_content_list};
    use crate::Digest;

    fn file(path: &str, executable: bool, bytes: &[u8]) -> BundleFile {
        BundleFile { path: path.into(), executable, size: bytes.len() as u64, sha256: Digest::of(bytes) }
    }

    /// Golden: computed with `sha256sum` from the text in the module's documentation.
    #[test]
    fn the_encoding_does_not_change() {
        assert_eq!(
            content_digest(&[]).to_string(),
            "sha256:553a0b48272aa8d84169cfa03c490c8622744b7844f9ed6a94f784d0818ad02b"
        );
        let files = [file("plugin.json", false, b"{}"), file("bin/a", true, b"abc"), file("bin-b", false, b"")];
        assert_eq!(
            content_digest(&files).to_string(),
            "sha256:112dda529d9181c7c30e84e986df3a4d84e00ac3bfa69657acec293755cefbe6"
        );
    }

    #[test]
    fn the_list_is_read_back() {
        let mut files = vec![file("a b/c", true, b"1"), file("plugin.json", false, b"{}")];
        let text = content_list(&files);
        files.sort();
        assert_eq!(read_content_list(&text), Some(files));
        for other in ["", "plugvisor bundle 2\n", "plugvisor bundle 1\n0755 1\n", text.trim_end()] {
            assert_eq!(read_content_list(other), None, "{other:?}");
        }
        assert_eq!(read_content_list(&text.replace("0644", "4755")), None);
    }

    #[test]
    fn order_does_not_count_and_everything_else_does() {
        let (a, b) = (file("a", false, b"1"), file("b", true, b"2"));
        let digest = content_digest(&[a.clone(), b.clone()]);
        assert_eq!(content_digest(&[b.clone(), a.clone()]), digest);
        for other in [file("a", true, b"1"), file("a", false, b"2"), file("c", false, b"1")] {
            assert_ne!(content_digest(&[other.clone(), b.clone()]), digest, "{other:?}");
        }
        assert_ne!(content_digest(&[a]), digest);
    }
}
