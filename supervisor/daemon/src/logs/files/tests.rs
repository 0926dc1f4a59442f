//! Lines on a real disk: rotation, bounds, restarts, damage.

use std::{fs, os::unix::fs::PermissionsExt as _};

use super::{
    super::{Filter, History, LogLimits, LogStream, Logs},
    *,
};

fn plugin(name: &str) -> PluginName {
    name.parse().unwrap()
}

struct Place {
    directory: tempfile::TempDir,
    limits: FileLimits,
}

impl Place {
    fn new(limits: FileLimits) -> Self {
        Self { directory: tempfile::tempdir().unwrap(), limits }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("logs")
    }

    /// A supervisor's run over the directory.
    fn run(&self) -> Arc<Logs> {
        let events = Arc::new(Events::new());
        let files =
            LogFiles::start(LogDirectory::open(&self.path(), None).unwrap(), self.limits, Arc::clone(&events)).unwrap();
        Arc::new(Logs::new(LogLimits { lines_per_second: 1_000_000, ..LogLimits::default() }, events, Some(files)))
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn bytes(&self) -> u64 {
        fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }
}

/// Prints as a plugin would, through a real pipe.
async fn print(logs: &Arc<Logs>, name: &str, generation: u64, text: &str) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let read = tokio::spawn(Arc::clone(logs).read(plugin(name), generation, LogStream::Stdout, reader));
    let text = text.to_owned();
    tokio::task::spawn_blocking(move || File::from(writer).write_all(text.as_bytes()).unwrap()).await.unwrap();
    read.await.unwrap();
}

fn history(logs: &Logs, names: &[&str]) -> Vec<String> {
    let plugins: Vec<PluginName> = names.iter().map(|name| plugin(name)).collect();
    let (mut history, _) = History::open(logs, &plugins, None);
    let mut all = Vec::new();
    loop {
        let lines = history.batch(&Filter::default(), 7);
        if lines.is_empty() {
            return all;
        }
        all.extend(lines.iter().map(|line| line.line.clone()));
    }
}

#[tokio::test]
async fn lines_outlive_the_supervisor_and_come_once() {
    let place = Place::new(FileLimits::default());
    let first = place.run();
    print(&first, "gallery", 1, "one\ntwo\n").await;
    assert_eq!(history(&first, &["gallery"]), ["one", "two"]);
    first.close().await;
    assert_eq!(history(&first, &["gallery"]), ["one", "two"], "what is in memory and on disk comes once");
    drop(first);
    let second = place.run();
    print(&second, "gallery", 2, "three\n").await;
    print(&second, "markdown", 1, "other\n").await;
    assert_eq!(history(&second, &["gallery", "markdown"]), ["one", "two", "three", "other"]);
    second.close().await;
    assert_eq!(second.files().unwrap().plugins(), [plugin("gallery"), plugin("markdown")]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&place.path()), mode(&place.path().join("gallery.log"))), (0o700, 0o600));
}

#[tokio::test]
async fn files_rotate_and_stay_within_their_bounds() {
    let limits = FileLimits { file_bytes: 2_000, files: 3, total_bytes: 9_000, queue: 4096 };
    let place = Place::new(limits);
    let logs = place.run();
    let text: String = (0..100).map(|number| format!("line {number}\n")).collect();
    for name in ["a", "b"] {
        print(&logs, name, 1, &text).await;
    }
    logs.close().await;
    assert_eq!(
        place.names(),
        ["a.log", "a.log.1", "a.log.2", "b.log", "b.log.1", "b.log.2"].map(str::to_owned)[..].to_vec()
    );
    assert!(place.bytes() <= limits.total_bytes + 2 * limits.file_bytes, "{}", place.bytes());
    for entry in fs::read_dir(place.path()).unwrap() {
        assert!(entry.unwrap().metadata().unwrap().len() <= limits.file_bytes);
    }
    drop(logs);
    // A later run, whose memory is empty: what is left is the newest, in order and without a hole.
    let kept = history(&place.run(), &["a"]);
    let first = 100 - kept.len();
    assert!(!kept.is_empty() && first > 0, "{kept:?}");
    assert_eq!(kept, (first..100).map(|number| format!("line {number}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_total_is_held_by_removing_the_oldest() {
    let limits = FileLimits { file_bytes: 2_000, files: 50, total_bytes: 8_000, queue: 4096 };
    let place = Place::new(limits);
    let logs = place.run();
    let text: String = (0..300).map(|number| format!("line {number}\n")).collect();
    print(&logs, "a", 1, &text).await;
    logs.close().await;
    assert!(place.bytes() <= limits.total_bytes + limits.file_bytes, "{}", place.bytes());
    drop(logs);
    assert_eq!(history(&place.run(), &["a"]).last().unwrap(), "line 299");
}

#[tokio::test]
async fn a_torn_line_is_trimmed_and_strange_files_do_no_harm() {
    let place = Place::new(FileLimits::default());
    let logs = place.run();
    print(&logs, "gallery", 1, "whole\n").await;
    logs.close().await;
    drop(logs);
    let file = place.path().join("gallery.log");
    let mut torn = fs::read(&file).unwrap();
    let whole = torn.len();
    torn.extend_from_slice(b"{\"at\":\"2026-11-23T0");
    fs::write(&file, &torn).unwrap();
    fs::write(place.path().join("Not A Plugin.log"), "x").unwrap();
    fs::write(place.path().join("gallery.log.1"), b"garbage\n\xff\xfe\n{}\n").unwrap();
    let outside = place.directory.path().join("outside");
    fs::write(&outside, "untouched").unwrap();
    std::os::unix::fs::symlink(&outside, place.path().join("linked.log")).unwrap();
    let logs = place.run();
    print(&logs, "gallery", 2, "after\n").await;
    print(&logs, "linked", 1, "nowhere\n").await;
    logs.close().await;
    assert_eq!(&fs::read(&file).unwrap()[..whole], &torn[..whole]);
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched", "a link is not followed");
    assert_eq!(logs.figures(&plugin("linked")).not_on_disk(), 1);
    drop(logs);
    assert_eq!(history(&place.run(), &["gallery", "linked"]), ["whole", "after"]);
}

/// /dev/full stands in for a disk without room: every write to it is ENOSPC.
#[tokio::test]
async fn a_full_disk_is_told_once_and_counted() {
    let place = Place::new(FileLimits::default());
    let events = Arc::new(Events::new());
    let directory = LogDirectory::open(&place.path(), None).unwrap();
    let figures = Arc::new(Figures::default());
    let mut writer = Writer {
        directory,
        limits: place.limits,
        run: 1,
        names: Arc::default(),
        open: BTreeMap::new(),
        refused: false,
        events: Arc::clone(&events),
    };
    let full = || Open { file: fs::OpenOptions::new().write(true).open("/dev/full").unwrap(), bytes: 0 };
    let (queue, entries) = sync_channel(8);
    for number in 1..=3 {
        let line = LogLine {
            at: SystemTime::now(),
            plugin: plugin("gallery"),
            generation: 1,
            stream: LogStream::Stdout,
            line: "x".to_owned(),
            continues: false,
            dropped_before: 0,
        };
        queue.send(Entry { line, number, figures: Arc::clone(&figures) }).unwrap();
    }
    drop(queue);
    writer.open.insert(plugin("gallery"), full());
    // The first line meets the full disk; the file is opened anew for the second, and has room.
    writer.run(&entries);
    assert_eq!(figures.not_on_disk(), 1);
    let told: Vec<String> = events.read(0, 10).entries.iter().map(|(_, record)| record.type_name.clone()).collect();
    assert_eq!(told, ["io.plugvisor.resource.disk_low.v1"]);
    assert_eq!(fs::read_to_string(place.path().join("gallery.log")).unwrap().lines().count(), 2);
}

#[test]
fn a_directory_that_others_write_to_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("logs");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let error = LogDirectory::open(&path, None).unwrap_err().to_string();
    assert!(error.contains("others may write") && error.contains("[logs] directory"), "{error}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    LogDirectory::open(&path, None).unwrap();
    let strangers = Owner { uid: 4_000_000, gid: 4_000_000 };
    assert!(LogDirectory::open(&path, Some(strangers)).unwrap_err().to_string().contains("belongs to user"));
    std::os::unix::fs::symlink(&path, place.path().join("link")).unwrap();
    LogDirectory::open(&place.path().join("link"), None).unwrap_err();
}

#[test]
fn names_are_those_of_plugins() {
    for (text, found) in [
        ("gallery.log", Some(("gallery", 0))),
        ("gallery.log.12", Some(("gallery", 12))),
        ("gallery.log.0", None),
        ("gallery.log.x", None),
        ("gallery.logs", None),
        ("Gallery.log", None),
        ("../x.log", None),
        (".log", None),
    ] {
        assert_eq!(parse(text), found.map(|(name, number)| (plugin(name), number)), "{text}");
    }
}
