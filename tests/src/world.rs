//! A temporary directory with everything that a daemon needs: configuration, bundles, and for an ordinary user the
//! binaries too. Knows nothing about running one.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use tempfile::TempDir;
use tokio::process::Command;

use crate::{Binaries, BundleBuilder, Daemon, Lane, binaries, guest::Guest, place::Place, stretched};

/// Health of plugins whose health is not what a test is about. By default one answer that takes over a second takes a
/// plugin out of the broker's routes, which is right for an operator; a machine under tests may well stand still for as
/// long, and every call in that time would fail.
const PATIENT: &str = "liveness_timeout_ms = 30000\nstartup_timeout_ms = 60000";

/// Whether the configuration of a test says anything about a plugin's health. What is no TOML says nothing.
fn has_health(text: &str, plugin: &str) -> bool {
    let table = text.parse::<toml::Table>().unwrap_or_default();
    table.get("plugin").and_then(|all| all.get(plugin)?.get("health")).is_some()
}

/// What a daemon is started with.
#[derive(Debug)]
pub struct World {
    lane: Lane,
    binaries: Binaries,
    directory: TempDir,
    settings: Settings,
    places: Mutex<Vec<Place>>,
}

#[derive(Debug)]
struct Settings {
    tier: String,
    grants: Vec<String>,
    allow_degraded: Option<Vec<String>>,
    also_allow: Vec<String>,
    runtime_directory: Option<PathBuf>,
    state_directory: Option<PathBuf>,
    launcher_policy: Option<PathBuf>,
    metrics_address: String,
    supervisor: String,
    toml: String,
    plugins: Vec<String>,
}

/// How a daemon ended that did not start.
#[derive(Clone, Debug)]
pub struct NotStarted {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it printed on standard error.
    pub stderr: String,
}

impl World {
    /// An empty world. Its plugin directory has the tier verified and grants nothing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(lane: Lane) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("plugvisor-test-").tempdir()?;
        let world = Self {
            lane,
            binaries: Binaries::find()?,
            directory,
            settings: Settings {
                tier: "verified".to_owned(),
                grants: Vec::new(),
                allow_degraded: None,
                also_allow: Vec::new(),
                runtime_directory: None,
                state_directory: None,
                launcher_policy: None,
                metrics_address: "127.0.0.1:0".to_owned(),
                supervisor: String::new(),
                toml: String::new(),
                plugins: Vec::new(),
            },
            places: Mutex::default(),
        };
        // The daemon drops to another user, which must be able to come here; only `home` is anybody's to write.
        open_to_read(world.directory.path())?;
        for name in ["plugins", "home", "bin"] {
            let path = world.directory.path().join(name);
            fs::create_dir(&path)?;
            open_to_read(&path)?;
        }
        chown(world.directory.path().join("home"), Some(lane.uid()), None)?;
        Ok(world)
    }

    /// Adds a bundle to the plugin directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn plugin(mut self, bundle: &BundleBuilder) -> anyhow::Result<Self> {
        bundle.write(&self.plugins(), &self.binaries)?;
        if !self.settings.plugins.iter().any(|known| known == bundle.name()) {
            self.settings.plugins.push(bundle.name().to_owned());
        }
        Ok(self)
    }

    /// Grants capabilities to every plugin.
    #[must_use]
    pub fn grants(mut self, names: &[&str]) -> Self {
        self.settings.grants = names.iter().map(ToString::to_string).collect();
        self
    }

    /// The tier of the plugin directory.
    #[must_use]
    pub fn tier(mut self, tier: &str) -> Self {
        tier.clone_into(&mut self.settings.tier);
        self
    }

    /// Allows exactly these controls to be missing. Without it, what this host lacks is allowed and nothing else.
    #[must_use]
    pub fn allow_degraded(mut self, controls: &[&str]) -> Self {
        self.settings.allow_degraded = Some(controls.iter().map(ToString::to_string).collect());
        self
    }

    /// Allows these controls to be missing, beside what is allowed anyway.
    #[must_use]
    pub fn also_allow(mut self, controls: &[&str]) -> Self {
        self.settings.also_allow.extend(controls.iter().map(ToString::to_string));
        self
    }

    /// Gives the daemon's launcher this policy file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn launcher_policy(mut self, text: &str) -> anyhow::Result<Self> {
        let file = self.directory.path().join("launcher.toml");
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        chown(&file, Some(self.lane.uid()), None)?;
        self.settings.launcher_policy = Some(file);
        Ok(self)
    }

    /// Gives its launcher machines, with this kernel.
    ///
    /// # Errors
    /// When the kernel cannot be copied, or the policy not be written.
    pub fn machines(self, guest: &Guest) -> anyhow::Result<Self> {
        let machine = guest.settings(self.directory.path())?;
        self.launcher_policy(&format!("version = 1\n{machine}"))
    }

    /// Runs the tool as an administrator does: where no supervisor needs to run.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn administer(&self, arguments: &[&str]) -> anyhow::Result<std::process::Output> {
        let program = self.binaries.path("plugvisor")?;
        std::process::Command::new(program).args(arguments).env_clear().output().context("cannot start plugvisor")
    }

    /// Uses another state directory.
    #[must_use]
    pub fn state_directory(mut self, path: &Path) -> Self {
        self.settings.state_directory = Some(path.to_path_buf());
        self
    }

    /// Uses another runtime directory.
    #[must_use]
    pub fn runtime_directory(mut self, path: &Path) -> Self {
        self.settings.runtime_directory = Some(path.to_path_buf());
        self
    }

    /// Uses this metrics address instead of a free port.
    #[must_use]
    pub fn metrics_address(mut self, address: &str) -> Self {
        address.clone_into(&mut self.settings.metrics_address);
        self
    }

    /// Adds lines to the table `[supervisor]`.
    #[must_use]
    pub fn supervisor(mut self, text: &str) -> Self {
        self.settings.supervisor.push_str(text);
        self.settings.supervisor.push('\n');
        self
    }

    /// Uses the launcher that listens here.
    #[must_use]
    pub fn launcher_socket(self, socket: &Path) -> Self {
        self.toml(&format!("[launcher]\nsocket = {socket:?}"))
    }

    /// Adds text to the configuration, such as a `[plugin.NAME]` table.
    #[must_use]
    pub fn toml(mut self, text: &str) -> Self {
        self.settings.toml.push_str(text);
        self.settings.toml.push('\n');
        self
    }

    /// The lane.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The temporary directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The directory of bundles.
    #[must_use]
    pub fn plugins(&self) -> PathBuf {
        self.directory.path().join("plugins")
    }

    /// Where what plugins print is kept.
    #[must_use]
    pub fn log_directory(&self) -> PathBuf {
        self.state().join("logs")
    }

    /// The built binaries.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Where the sockets will be.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        self.settings.runtime_directory.clone().unwrap_or_else(|| self.directory.path().join("home/run"))
    }

    /// Where what outlives a daemon will be: an own one for each world, and one for all daemons of a world.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.settings.state_directory.clone().unwrap_or_else(|| self.directory.path().join("home/state"))
    }

    /// Whether each daemon is started in a cgroup of its own, which goes with it: then what a killed one left there is not the
    /// next one's to remove.
    #[must_use]
    pub fn gives_each_a_group(&self) -> bool {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).iter().any(Place::has_limits)
    }

    /// Starts the daemon and waits until it answers on the admin socket.
    ///
    /// # Errors
    /// When it ends first or does not answer; the message has what it printed.
    pub async fn start(mut self) -> anyhow::Result<Daemon> {
        if self.settings.allow_degraded.is_none() {
            self.settings.allow_degraded = Some(Box::pin(lacking(self.lane)).await?);
        }
        Daemon::start(self).await
    }

    /// Starts the daemon and waits until it has ended.
    ///
    /// # Errors
    /// When it goes on running.
    pub async fn start_refused(&self) -> anyhow::Result<NotStarted> {
        let running = self.command()?.output();
        let output = tokio::time::timeout(stretched(Duration::from_secs(90)), running)
            .await
            .context("the daemon was expected to refuse to start, and runs")?
            .context("cannot start plugvisord")?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(NotStarted { code: output.status.code(), stderr })
    }

    /// The daemon's command line. Writes the configuration.
    pub(crate) fn command(&self) -> anyhow::Result<Command> {
        let file = self.directory.path().join("plugvisor.toml");
        fs::write(&file, self.configuration())?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        let other_user = (crate::lane::is_root() && self.lane == Lane::Rootless).then(|| self.lane.uid());
        let place = Place::new(other_user);
        let mut command = Command::from(place.command(&self.daemon_binary()?));
        // The group of a daemon that was killed is its launcher's: the next daemon gets another.
        self.places.lock().unwrap_or_else(PoisonError::into_inner).push(place);
        command
            .arg("--config")
            .arg(&file)
            .args(
                self.settings
                    .launcher_policy
                    .iter()
                    .flat_map(|file| [OsStr::new("--launcher-policy"), file.as_os_str()]),
            )
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.directory.path().join("home"))
            .env("RUST_BACKTRACE", "1")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }

    /// The daemon's binary with the launcher beside it. The rootless lane of a privileged run gets its own names for
    /// them, because its user may not be able to reach the target directory.
    pub(crate) fn daemon_binary(&self) -> anyhow::Result<PathBuf> {
        let built = self.binaries.path("plugvisord")?;
        let launcher = self.binaries.path("plugvisor-launcher")?;
        if !(crate::lane::is_root() && self.lane == Lane::Rootless) {
            return Ok(built);
        }
        let directory = self.directory.path().join("bin");
        let daemon = directory.join("plugvisord");
        if !daemon.exists() {
            binaries::place(&built, &daemon)?;
            binaries::place(&launcher, &directory.join("plugvisor-launcher"))?;
        }
        Ok(daemon)
    }

    /// The command line of a trace of this bundle, as the lane's user would run it, with these arguments behind.
    ///
    /// # Errors
    /// When a binary was not built.
    pub fn trace(&self, bundle: &Path, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut tool = self.binaries.path("plugvisor")?;
        let other_user = (crate::lane::is_root() && self.lane == Lane::Rootless).then(|| self.lane.uid());
        if other_user.is_some() {
            // With the launcher beside it.
            let placed = self.daemon_binary()?.with_file_name("plugvisor");
            if !placed.exists() {
                binaries::place(&tool, &placed)?;
            }
            tool = placed;
        }
        let place = Place::new(other_user);
        let mut command = Command::from(place.command(&tool));
        self.places.lock().unwrap_or_else(PoisonError::into_inner).push(place);
        command
            .args(["plugin", "trace", "-o", "json"])
            .arg(bundle)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }

    fn configuration(&self) -> String {
        let Settings {
            tier,
            grants,
            allow_degraded,
            also_allow,
            runtime_directory: _,
            state_directory: _,
            metrics_address,
            supervisor,
            toml,
            plugins,
            launcher_policy: _,
        } = &self.settings;
        let allowed: Vec<&String> = allow_degraded.iter().flatten().chain(also_allow).collect();
        let mut text = String::new();
        // Debug text of these values is valid TOML: paths and names of the tests are plain ASCII.
        let _ = write!(
            text,
            "[supervisor]\nruntime_directory = {:?}\nstate_directory = {:?}\nmetrics_address = {metrics_address:?}\nallow_degraded = {:?}\n{supervisor}\n\
             [[directory]]\npath = {:?}\ntier = {tier:?}\ngrants = {grants:?}\n\n{toml}",
            self.runtime(),
            self.state(),
            allowed,
            self.plugins(),
        );
        for plugin in plugins.iter().filter(|plugin| !has_health(toml, plugin)) {
            let _ = write!(text, "\n[plugin.{plugin}.health]\n{PATIENT}\n");
        }
        text
    }
}

/// The controls that this host lacks in this lane, as a daemon without plugins says.
pub(crate) async fn lacking(lane: Lane) -> anyhow::Result<Vec<String>> {
    static KNOWN: Mutex<Option<HashMap<Lane, Vec<String>>>> = Mutex::new(None);
    let known = |lane| KNOWN.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.get(&lane).cloned();
    if let Some(found) = known(lane) {
        return Ok(found);
    }
    let daemon = World::new(lane)?.allow_degraded(&[]).start().await.context("a daemon without plugins")?;
    let status = daemon.status().await?;
    let supervisor = status.supervisor.context("the status has no supervisor")?;
    let found: Vec<String> =
        supervisor.features.into_iter().filter(|feature| !feature.works).map(|feature| feature.name).collect();
    daemon.stop().await.context("a daemon without plugins")?;
    let mut all = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_or_insert_default().insert(lane, found.clone());
    Ok(found)
}

fn open_to_read(path: &Path) -> anyhow::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot open {} to others", path.display()))
}
