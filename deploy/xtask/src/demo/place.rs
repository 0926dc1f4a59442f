//! Where a demo happens: a private directory with the bundles, the configuration and the sockets.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// The directory and what is in it. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// Makes the directory.
    ///
    /// # Errors
    /// When the system's directory for temporary files cannot be used.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let directory =
            tempfile::Builder::new().prefix("plugvisor-demo-").tempdir().context("cannot make a directory")?;
        // Started by root, the supervisor becomes another user and must still reach its sockets in here.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).context("cannot chmod it")?;
        let place = Self { directory };
        fs::create_dir(place.bundles()).context("cannot make the bundles' directory")?;
        // Whatever our umask is: a directory that a group may write gives a root launcher's bundles no tier.
        fs::set_permissions(place.bundles(), fs::Permissions::from_mode(0o755)).context("cannot chmod it")?;
        Ok(place)
    }

    /// The directory itself.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where the bundles are.
    pub(crate) fn bundles(&self) -> PathBuf {
        self.path().join("plugins")
    }

    /// Where the supervisor makes its sockets.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.path().join("run")
    }

    /// Where it keeps what it remembers.
    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The page that the gallery makes.
    pub(crate) fn page(&self) -> PathBuf {
        self.path().join("gallery.html")
    }

    /// Writes the configuration and returns its path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn configure(&self, text: &str) -> anyhow::Result<PathBuf> {
        let file = self.path().join("plugvisor.toml");
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    /// Removes everything and tells what had been left in the runtime directory.
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        let path = self.path().to_path_buf();
        self.directory.close().with_context(|| format!("cannot remove {}", path.display()))
    }
}

/// The configuration of a demo. `plugins` is the directory of bundles, absent while only the host is probed.
pub(crate) fn configuration(
    runtime: &Path,
    state: &Path,
    metrics: &str,
    plugins: Option<&Path>,
    allow_degraded: &[String],
) -> String {
    let mut text = format!(
        "[supervisor]\nruntime_directory = {}\nstate_directory = {}\nmetrics_address = {}\nallow_degraded = {}\n",
        quoted(&runtime.to_string_lossy()),
        quoted(&state.to_string_lossy()),
        quoted(metrics),
        list(allow_degraded.iter().map(String::as_str)),
    );
    if let Some(plugins) = plugins {
        text.push_str(&format!(
            "\n[[directory]]\npath = {}\ntier = \"verified\"\ngrants = {}\n",
            quoted(&plugins.to_string_lossy()),
            list(["api:internal-calls"]),
        ));
    }
    text
}

fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    format!("[{}]", items.into_iter().map(quoted).collect::<Vec<_>>().join(", "))
}

/// A TOML basic string. JSON's escapes are among TOML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_what_people_would_write() {
        let text = configuration(
            Path::new("/tmp/a \"b\"/run"),
            Path::new("/tmp/state"),
            "127.0.0.1:0",
            Some(Path::new("/tmp/plugins")),
            &["memory-limit".to_owned(), "cpu-limit".to_owned()],
        );
        assert_eq!(
            text,
            "[supervisor]\nruntime_directory = \"/tmp/a \\\"b\\\"/run\"\nstate_directory = \"/tmp/state\"\nmetrics_address = \"127.0.0.1:0\"\n\
             allow_degraded = [\"memory-limit\", \"cpu-limit\"]\n\n\
             [[directory]]\npath = \"/tmp/plugins\"\ntier = \"verified\"\n\
             grants = [\"api:internal-calls\"]\n"
        );
    }
}
