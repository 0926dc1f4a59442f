//! The report of a supervisor that runs, and what it and every other report say of the launcher's policy file.

use std::{path::Path, sync::Arc, time::Duration};

use plugvisor_core::{Code, Error};
use plugvisor_proto::admin::v1::{ExamineHostResponse, HostPlace};
use plugvisor_sandbox::protocol::{Host, PolicyFile};
use tokio::time::timeout;

use super::{CONFIGURATION, place, report};
use crate::{config::Config, discovery::PluginDirectory, launcher::Launcher};

/// How long a report waits for the launcher: less than those wait who ask for one.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a supervisor that runs sees. Its launcher is asked anew, because files may have changed since the start: its policy,
/// and what of the host hangs on that. Of one that does not answer, what it said at the start is shown.
pub async fn running(
    config: Arc<Config>,
    launcher: &Launcher,
    at_start: &Host,
    held: Vec<Arc<PluginDirectory>>,
) -> Result<ExamineHostResponse, Error> {
    let asked = timeout(PATIENCE, async { tokio::join!(launcher.probe(), launcher.policy()) }).await;
    let (probed, policy) = match asked {
        Ok((probed, policy)) => (probed.ok(), policy.map_err(|error| error.to_string())),
        Err(_late) => (None, Err(format!("the launcher did not answer within {} s", PATIENCE.as_secs()))),
    };
    let features = probed.unwrap_or_else(|| at_start.clone());
    let uid = rustix::process::geteuid().as_raw();
    // Reading directories and bundles blocks.
    let made = tokio::task::spawn_blocking(move || report(&config, &features, uid, None, Some(&held)));
    let mut report = made.await.map_err(|panic| Error::new(Code::Bug, panic.to_string(), "report this as a bug"))?;
    match policy {
        Ok(PolicyFile::Absent) => {}
        Ok(PolicyFile::Usable { path }) => add(&mut report, policy_place(Path::new(&path), None)),
        Ok(PolicyFile::Unusable { path, why }) => add(&mut report, policy_place(Path::new(&path), Some(why))),
        Err(why) => {
            let why = format!("{why}: walls and levels are shown as they were found at the start");
            let fix =
                "look at the load of the host; one that is gone comes again with plugvisord: restart it".to_owned();
            add(&mut report, place("launcher", Path::new(""), "", Some((why, fix))));
        }
    }
    Ok(report)
}

/// The launcher's policy file, and why it cannot be used.
pub(super) fn policy_place(path: &Path, wrong: Option<String>) -> HostPlace {
    let fix =
        "correct that and look again; the file is read anew at each launch, and while it is wrong nothing is launched";
    match wrong {
        None => place("launcher policy", path, "read and valid", None),
        Some(why) => place("launcher policy", path, "", Some((why, fix.to_owned()))),
    }
}

/// Puts it beside the configuration, before what is wrong with single places: while it is wrong nothing is launched.
pub(super) fn add(report: &mut ExamineHostResponse, launcher: HostPlace) {
    let after = report.places.iter().position(|place| place.name == CONFIGURATION).map_or(0, |at| at + 1);
    report.places.insert(after, launcher);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_the_policy_file_stands_before_single_places() {
        let other = |name: &str| place(name, Path::new("/x"), "", Some(("gone".to_owned(), "make it".to_owned())));
        let mut report = ExamineHostResponse {
            places: vec![other(CONFIGURATION), other("runtime directory"), other("plugin directory")],
            ..ExamineHostResponse::default()
        };
        let wrong = "the policy file /p: others may write it (mode 664)";
        add(&mut report, policy_place(Path::new("/p"), Some(wrong.to_owned())));
        let names: Vec<&str> = report.places.iter().map(|place| place.name.as_str()).collect();
        assert_eq!(names, [CONFIGURATION, "launcher policy", "runtime directory", "plugin directory"]);
        assert_eq!((report.places[1].trouble.as_str(), report.places[1].detail.as_str()), (wrong, ""));
    }
}
