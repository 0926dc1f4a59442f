//! Real files: what is written is read again, and every fault is met as the module promises.

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant, UNIX_EPOCH},
};

use plugvisor_core::{Code, Generation, Time, breaker::Position, restart::RestartHistory};
use rusqlite::Connection;
use tempfile::TempDir;

use super::{database::FILE, *};

const BOOT: &str = "b0";

fn open(directory: &Path, boot: &str) -> Result<Opened, StateError> {
    Opened::open(StateDirectory::open(directory, None).unwrap(), boot)
}

fn start(directory: &Path) -> (Store, Snapshot, Closing) {
    open(directory, BOOT).unwrap().start().unwrap()
}

fn name(text: &str) -> PluginName {
    text.parse().unwrap()
}

fn history() -> RestartHistory {
    let recent = vec![Time::from_millis(1), Time::from_millis(90_000)];
    RestartHistory { failures: 3, crash_loop: true, last_delay: Duration::from_secs(60), recent, total: 9 }
}

fn breaker() -> BreakerRecord {
    BreakerRecord {
        generation: Generation(4),
        position: Position::Open,
        at: Time::from_millis(91_000),
        open_left: Duration::from_millis(60_500),
        reopened: 2,
        consecutive: 5,
    }
}

fn transition(number: u64) -> TransitionRecord {
    let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + number);
    TransitionRecord { at, from: "LOADING".into(), to: "LOADED".into(), cause: format!("register done {number}") }
}

fn note_everything(store: &Store) {
    let echo = name("echo");
    store.note(&echo, Note::Begun(Generation(4)));
    // Late, and of an earlier load.
    store.note(&echo, Note::Begun(Generation(3)));
    store.note(&echo, Note::Restarts(history()));
    store.note(&echo, Note::Breaker(Some(breaker())));
    store.note(&echo, Note::Sdk("plugvisor-worker 0.1.0".to_owned()));
    for number in 0..40 {
        store.note(&echo, Note::Transition(transition(number)));
    }
}

fn everything(desired: Option<Desired>) -> PluginRecord {
    PluginRecord {
        desired,
        generation: Generation(4),
        sdk: "plugvisor-worker 0.1.0".to_owned(),
        restarts: history(),
        breaker: Some(breaker()),
        transitions: (8..40).map(transition).collect(),
    }
}

async fn until(store: &Store, wanted: impl Fn(&Health) -> bool) -> Health {
    let mut health = store.health();
    let found = tokio::time::timeout(Duration::from_secs(30), health.wait_for(wanted)).await;
    found.expect("the health changes in time").unwrap().clone()
}

#[tokio::test]
async fn what_was_noted_is_there_after_a_stop_and_after_a_kill() {
    let directory = TempDir::new().unwrap();
    let (store, snapshot, closing) = start(directory.path());
    assert!(snapshot.plugins.is_empty() && snapshot.rebuilt.is_none());
    note_everything(&store);
    store.desire(name("echo"), Desired::Unloaded).await.unwrap();
    store.desire(name("other"), Desired::Loaded).await.unwrap();

    // A supervisor that is killed leaves the files as they are now.
    let killed = TempDir::new().unwrap();
    for suffix in ["", "-wal"] {
        let file = format!("{FILE}{suffix}");
        fs::copy(directory.path().join(&file), killed.path().join(&file)).unwrap();
    }
    closing.close();
    assert!(!directory.path().join(format!("{FILE}-wal")).exists(), "one file is left");

    for directory in [&directory, &killed] {
        let opened = open(directory.path(), BOOT).unwrap();
        let plugins = &opened.snapshot.plugins;
        assert_eq!(plugins[&name("echo")], everything(Some(Desired::Unloaded)));
        assert_eq!(plugins[&name("other")].desired, Some(Desired::Loaded));
        assert_eq!(plugins.len(), 2);
    }
}

#[tokio::test]
async fn another_boot_keeps_wishes_and_forgets_moments() {
    let directory = TempDir::new().unwrap();
    let (store, _, closing) = start(directory.path());
    note_everything(&store);
    store.desire(name("echo"), Desired::Unloaded).await.unwrap();
    closing.close();
    let (store, snapshot, closing) = open(directory.path(), "b1").unwrap().start().unwrap();
    let restarts = RestartHistory { total: 9, ..RestartHistory::default() };
    let rebooted = PluginRecord { restarts, breaker: None, ..everything(Some(Desired::Unloaded)) };
    assert_eq!(snapshot.plugins[&name("echo")], rebooted);
    store.written().await;
    closing.close();
    // Nor do they come back with what is written in the new boot.
    assert_eq!(open(directory.path(), "b1").unwrap().snapshot.plugins[&name("echo")], rebooted);
}

#[test]
fn a_second_supervisor_is_refused_and_takes_nothing() {
    let directory = TempDir::new().unwrap();
    let (_store, _, closing) = start(directory.path());
    let error = StateDirectory::open(directory.path(), None).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("another supervisor (pid {}) uses the state in", std::process::id())),
        "{error}"
    );
    closing.close();
    open(directory.path(), BOOT).unwrap();
}

#[test]
fn a_later_version_and_another_programs_file_are_refused_unchanged() {
    for (pragma, expected) in [
        (
            "user_version = 2",
            "its tables are of version 2, and this plugvisord knows 1; start the Plugvisor that wrote it",
        ),
        ("application_id = 7", "it is another program's database (application_id 0x7); name another"),
    ] {
        let directory = TempDir::new().unwrap();
        start(directory.path()).2.close();
        let file = directory.path().join(FILE);
        Connection::open(&file).unwrap().execute_batch(&format!("PRAGMA {pragma}")).unwrap();
        let before = fs::read(&file).unwrap();
        let error = open(directory.path(), BOOT).unwrap_err();
        assert!(matches!(error, StateError::Incompatible { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(fs::read(&file).unwrap(), before);
    }
}

#[test]
fn a_damaged_file_is_moved_aside_and_begun_anew() {
    let damages: [fn(&Path); 5] = [
        |file| fs::write(file, "this is no database at all, and long enough to be looked at as one").unwrap(),
        |file| fs::OpenOptions::new().write(true).open(file).unwrap().write_all_at(&[0xff; 6000], 3000).unwrap(),
        |file| {
            let length = fs::metadata(file).unwrap().len();
            fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length / 2).unwrap();
        },
        |file| Connection::open(file).unwrap().execute_batch("DROP TABLE transition").unwrap(),
        |file| {
            Connection::open(file).unwrap().execute("UPDATE plugin SET name = '../etc'", []).unwrap();
        },
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let directory = TempDir::new().unwrap();
        let (store, _, closing) = start(directory.path());
        store.note(&name("echo"), Note::Begun(Generation(4)));
        closing.close();
        damage(&directory.path().join(FILE));
        let opened = open(directory.path(), BOOT).unwrap_or_else(|error| panic!("damage {number}: {error}"));
        let rebuilt = opened.snapshot.rebuilt.as_ref().unwrap_or_else(|| panic!("damage {number} was not noticed"));
        assert!(rebuilt.moved_to.exists() && !rebuilt.why.is_empty(), "{rebuilt:?}");
        assert!(opened.snapshot.plugins.is_empty());
    }
}

#[test]
fn no_more_than_three_damaged_files_are_kept() {
    let directory = TempDir::new().unwrap();
    for _ in 0..5 {
        fs::write(directory.path().join(FILE), "not a database").unwrap();
        open(directory.path(), BOOT).unwrap();
    }
    let kept = fs::read_dir(directory.path())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().contains("corrupt"));
    assert_eq!(kept.count(), 3);
}

#[tokio::test]
async fn a_file_damaged_while_it_is_open_is_written_anew_from_memory() {
    let directory = TempDir::new().unwrap();
    let (store, _, closing) = start(directory.path());
    note_everything(&store);
    store.desire(name("echo"), Desired::Unloaded).await.unwrap();
    // Everything into the main file, and the main file into ruins.
    let other = Connection::open(directory.path().join(FILE)).unwrap();
    other.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    drop(other);
    let file = fs::OpenOptions::new().write(true).open(directory.path().join(FILE)).unwrap();
    file.write_all_at(&vec![0xff; usize::try_from(file.metadata().unwrap().len()).unwrap()], 0).unwrap();

    // One answer may be "read only", when the ruins are first met as something else than damage.
    let health = async {
        store.note(&name("late"), Note::Begun(Generation(7)));
        until(&store, |health| health.rebuilt.is_some() && health.writing == Writing::Works).await
    };
    assert!(health.await.rebuilt.unwrap().moved_to.exists());
    closing.close();
    let plugins = open(directory.path(), BOOT).unwrap().snapshot.plugins;
    assert_eq!(plugins[&name("echo")], everything(Some(Desired::Unloaded)));
    assert_eq!(plugins[&name("late")].generation, Generation(7));
}

#[tokio::test]
async fn a_full_disk_refuses_wishes_and_keeps_notes() {
    let directory = TempDir::new().unwrap();
    let (store, _, closing) = start(directory.path());
    store.desire(name("echo"), Desired::Loaded).await.unwrap();
    store.send(Command::LimitPages(1)).unwrap();
    // More than the pages that there are hold.
    note_everything(&store);
    for number in 0..100 {
        store.note(&name(&format!("plugin-{number}")), Note::Transition(transition(number)));
    }
    let health = until(&store, |health| health.writing != Writing::Works).await;
    assert!(matches!(health.writing, Writing::Fails { cause: "disk_full", .. }), "{health:?}");
    // Nobody waits for a full disk: who has waited is told so by another code.
    let error = store.desire(name("echo"), Desired::Unloaded).await.unwrap_err();
    assert_eq!(error.code, Code::StateReadOnly);
    assert_eq!(store.check_writable().unwrap_err().code, Code::StateReadOnly);

    store.send(Command::LimitPages(1 << 20)).unwrap();
    until(&store, |health| health.writing == Writing::Works).await;
    store.check_writable().unwrap();
    closing.close();
    let plugins = open(directory.path(), BOOT).unwrap().snapshot.plugins;
    // The wish that was refused is not carried out later.
    assert_eq!(plugins[&name("echo")], everything(Some(Desired::Loaded)));
    assert_eq!(plugins.len(), 101);
}

#[tokio::test]
async fn a_held_file_is_waited_for_and_then_refused() {
    let directory = TempDir::new().unwrap();
    let (store, _, closing) = start(directory.path());
    store.desire(name("echo"), Desired::Loaded).await.unwrap();
    let holder = Connection::open(directory.path().join(FILE)).unwrap();
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();

    let asked = Instant::now();
    let error = store.desire(name("echo"), Desired::Unloaded).await.unwrap_err();
    assert_eq!(error.code, Code::StateLocked);
    assert!(asked.elapsed() >= PATIENCE, "it was given up after {:?}", asked.elapsed());
    assert_eq!(store.check_writable().unwrap_err().code, Code::StateLocked);
    note_everything(&store);

    // And one that waits while the file is given back is carried out.
    let mut waiting = std::pin::pin!(store.desire(name("other"), Desired::Unloaded));
    // Polled once, it is asked for.
    let asked = std::future::poll_fn(|context| std::task::Poll::Ready(waiting.as_mut().poll(context).is_pending()));
    assert!(asked.await, "it was answered while the file is held");
    holder.execute_batch("COMMIT").unwrap();
    waiting.await.unwrap();
    store.check_writable().unwrap();
    closing.close();
    let plugins = open(directory.path(), BOOT).unwrap().snapshot.plugins;
    assert_eq!(plugins[&name("echo")], everything(Some(Desired::Loaded)));
    assert_eq!(plugins[&name("other")].desired, Some(Desired::Unloaded));
}

#[test]
fn a_file_that_is_held_at_start_is_named() {
    let directory = TempDir::new().unwrap();
    start(directory.path()).2.close();
    let holder = Connection::open(directory.path().join(FILE)).unwrap();
    holder.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    let error = open(directory.path(), BOOT).unwrap_err();
    assert!(matches!(error, StateError::Locked { .. }), "{error}");
}
