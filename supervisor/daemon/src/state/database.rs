//! The SQLite file: opened, judged, read, written, moved aside.
//!
//! Knows rows and nothing of threads or of who asks. `journal_mode = WAL`: readers (a backup, `sqlite3`) and the writer
//! do not wait for one another. `synchronous = NORMAL` for what the supervisor notes by itself: in WAL mode a crash of
//! the supervisor loses nothing and a crash of the host loses the last moments, never the file (sqlite.org/wal.html);
//! what an operator asked for is written with `FULL`, so that it holds even then.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use plugvisor_core::{Generation, Time, breaker::Position, restart::RestartHistory};
use plugvisor_package::PluginName;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, params};

use super::record::{BreakerRecord, Desired, PluginRecord, TRANSITIONS_KEPT, TransitionRecord};

/// The file in the state directory.
pub(super) const FILE: &str = "state.db";

/// The version of the tables, in `user_version`. One that is higher was written by a later Plugvisor.
pub(super) const VERSION: i64 = 1;

/// "PLGV", in `application_id`: a file that bears another is another program's.
const APPLICATION: i64 = 0x504c_4756;

/// The general error, which our own fixed statements meet only when their tables are not there.
const SQLITE_ERROR: i32 = 1;

/// Files that were moved aside and are kept; the oldest goes when there are more.
const CORRUPT_KEPT: usize = 3;

const SCHEMA: &str = "
CREATE TABLE host (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    boot TEXT NOT NULL,
    writes INTEGER NOT NULL
) STRICT;
CREATE TABLE plugin (
    name TEXT PRIMARY KEY,
    desired TEXT CHECK (desired IN ('loaded', 'unloaded')),
    generation INTEGER NOT NULL CHECK (generation >= 0),
    sdk TEXT NOT NULL,
    failures INTEGER NOT NULL CHECK (failures >= 0),
    crash_loop INTEGER NOT NULL CHECK (crash_loop IN (0, 1)),
    last_delay_ns INTEGER NOT NULL CHECK (last_delay_ns >= 0),
    recent_ns TEXT NOT NULL,
    restarts INTEGER NOT NULL CHECK (restarts >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE breaker (
    plugin TEXT PRIMARY KEY REFERENCES plugin (name),
    generation INTEGER NOT NULL CHECK (generation >= 0),
    position TEXT NOT NULL CHECK (position IN ('closed', 'open', 'half_open')),
    at_ns INTEGER NOT NULL CHECK (at_ns >= 0),
    open_left_ns INTEGER NOT NULL CHECK (open_left_ns >= 0),
    reopened INTEGER NOT NULL CHECK (reopened >= 0),
    consecutive INTEGER NOT NULL CHECK (consecutive >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE transition (
    plugin TEXT NOT NULL REFERENCES plugin (name),
    position INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    before TEXT NOT NULL,
    after TEXT NOT NULL,
    cause TEXT NOT NULL,
    PRIMARY KEY (plugin, position)
) STRICT, WITHOUT ROWID;
";

/// An open file.
#[derive(Debug)]
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    boot: String,
}

/// Why a file could not be read or written, by what can be done about it.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Another process holds it.
    Locked,
    /// The disk is full.
    Full(String),
    /// It cannot be read or written for another reason.
    Io(String),
    /// It is damaged.
    Corrupt(String),
    /// It was written by a later version.
    Later(i64),
    /// It is another program's.
    Foreign(i64),
}

impl Trouble {
    pub(super) fn why(&self) -> String {
        match self {
            Self::Locked => "another process holds it".to_owned(),
            Self::Full(why) | Self::Io(why) | Self::Corrupt(why) => why.clone(),
            Self::Later(found) => format!("its tables are of version {found}, and this plugvisord knows {VERSION}"),
            Self::Foreign(id) => format!("it is another program's database (application_id {id:#x})"),
        }
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        let why = error.to_string();
        match error {
            rusqlite::Error::SqliteFailure(failure, _) => match failure.code {
                ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Self::Locked,
                ErrorCode::DiskFull => Self::Full(why),
                // Of the last two: a row that breaks a rule of its table, or a table that is missing, is not what we wrote.
                ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::ConstraintViolation
                | ErrorCode::TypeMismatch => Self::Corrupt(why),
                ErrorCode::Unknown if failure.extended_code == SQLITE_ERROR => Self::Corrupt(why),
                _ => Self::Io(why),
            },
            rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..)
            | rusqlite::Error::QueryReturnedNoRows => Self::Corrupt(why),
            _ => Self::Io(why),
        }
    }
}

/// Which of a plugin's parts changed since they were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) record: bool,
    pub(super) breaker: bool,
    pub(super) transitions: bool,
}

impl Database {
    /// Opens the file, or makes it, and judges it. `patience` is how long another process may hold it.
    pub(super) fn open(directory: &Path, boot: &str, patience: Duration) -> Result<Self, Trouble> {
        let path = directory.join(FILE);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NOFOLLOW
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags)?;
        connection.busy_timeout(patience)?;
        let mut this = Self { connection, path, boot: boot.to_owned() };
        this.judge()?;
        Ok(this)
    }

    fn judge(&mut self) -> Result<(), Trouble> {
        let number = |connection: &Connection, name: &str| {
            connection.query_row(&format!("SELECT * FROM pragma_{name}"), [], |row| row.get::<_, i64>(0))
        };
        let connection = &mut self.connection;
        // Asked before anything is changed: a file that is not ours stays as it is.
        let (version, application) = (number(connection, "user_version")?, number(connection, "application_id")?);
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let fresh = (version, application, tables) == (0, 0, 0);
        if !fresh && application != APPLICATION {
            return Err(Trouble::Foreign(application));
        }
        if version > VERSION {
            return Err(Trouble::Later(version));
        }
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "cell_size_check", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        // No temporary file anywhere; the file that is written ahead is cut to this when it was emptied.
        connection.pragma_update(None, "temp_store", "MEMORY")?;
        connection.pragma_update(None, "journal_size_limit", 1024 * 1024)?;
        if fresh {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(SCHEMA)?;
            transaction.execute("INSERT INTO host (only, boot, writes) VALUES (1, ?1, 0)", [&self.boot])?;
            transaction.pragma_update(None, "application_id", APPLICATION)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            transaction.commit()?;
        }
        if version == 0 && !fresh {
            return Err(Trouble::Corrupt("it has no version".to_owned()));
        }
        let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if found == "ok" { Ok(()) } else { Err(Trouble::Corrupt(found)) }
    }

    /// Which boot it was opened in.
    pub(super) fn boot(&self) -> &str {
        &self.boot
    }

    /// Every record, and whether it must be written again. Moments of an earlier boot are not handed out: that clock is
    /// gone.
    pub(super) fn read(&self) -> Result<(BTreeMap<PluginName, PluginRecord>, bool), Trouble> {
        let boot: String = self.connection.query_row("SELECT boot FROM host", [], |row| row.get(0))?;
        let mut records = BTreeMap::new();
        let mut rows = self.connection.prepare(
            "SELECT name, desired, generation, sdk, failures, crash_loop, last_delay_ns, recent_ns, restarts FROM plugin",
        )?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let desired = match row.get::<_, Option<String>>(1)?.as_deref() {
                None => None,
                Some("loaded") => Some(Desired::Loaded),
                Some(_) => Some(Desired::Unloaded),
            };
            let restarts = RestartHistory {
                failures: row.get(4)?,
                crash_loop: row.get(5)?,
                last_delay: Duration::from_nanos(row.get(6)?),
                recent: moments(&row.get::<_, String>(7)?)?,
                total: row.get(8)?,
            };
            let record = PluginRecord {
                desired,
                generation: Generation(row.get(2)?),
                sdk: row.get(3)?,
                restarts,
                ..PluginRecord::default()
            };
            records.insert(name(row, 0)?, record);
        }
        let mut rows = self
            .connection
            .prepare("SELECT plugin, generation, position, at_ns, open_left_ns, reopened, consecutive FROM breaker")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let position = match row.get::<_, String>(2)?.as_str() {
                "closed" => Position::Closed,
                "open" => Position::Open,
                _ => Position::HalfOpen,
            };
            let breaker = BreakerRecord {
                generation: Generation(row.get(1)?),
                position,
                at: Time::after_start(Duration::from_nanos(row.get(3)?)),
                open_left: Duration::from_nanos(row.get(4)?),
                reopened: row.get(5)?,
                consecutive: row.get(6)?,
            };
            records.entry(name(row, 0)?).or_default().breaker = Some(breaker);
        }
        let mut rows = self
            .connection
            .prepare("SELECT plugin, at_ms, before, after, cause FROM transition ORDER BY plugin, position")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let record = TransitionRecord {
                at: UNIX_EPOCH + Duration::from_millis(row.get(1)?),
                from: row.get::<_, String>(2)?.into(),
                to: row.get::<_, String>(3)?.into(),
                cause: row.get(4)?,
            };
            let transitions = &mut records.entry(name(row, 0)?).or_default().transitions;
            transitions.push_back(record);
            if transitions.len() > TRANSITIONS_KEPT {
                transitions.pop_front();
            }
        }
        let rebooted = boot != self.boot;
        if rebooted {
            records.values_mut().for_each(PluginRecord::reboot);
        }
        Ok((records, rebooted))
    }

    /// Writes what changed, all or nothing. `patience` is how long another process may hold the file; `durable` makes
    /// it outlive a crash of the host.
    pub(super) fn write<'a>(
        &mut self,
        changes: impl IntoIterator<Item = (&'a PluginName, &'a PluginRecord, Changed)>,
        durable: bool,
        patience: Duration,
    ) -> Result<(), Trouble> {
        self.connection.busy_timeout(patience)?;
        self.connection.pragma_update(None, "synchronous", if durable { "FULL" } else { "NORMAL" })?;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Also when nothing else changed: that is how is found out whether the file can be written again.
        transaction.execute("UPDATE host SET writes = writes + 1, boot = ?1", [&self.boot])?;
        for (name, record, changed) in changes {
            write_plugin(&transaction, name, record, changed)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Folds the written-ahead file into the main one and closes both.
    pub(super) fn close(self) {
        let Self { connection, path, boot: _ } = self;
        // SQLite does the folding when the last connection closes.
        if let Err((_, error)) = connection.close() {
            tracing::warn!(%error, file = %path.display(), "the state was not closed cleanly; nothing of it is lost");
        }
    }

    /// As if the disk held no more than this.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, pages: i64) {
        self.connection.pragma_update(None, "max_page_count", pages).unwrap();
    }
}

fn write_plugin(
    transaction: &Transaction<'_>,
    name: &PluginName,
    record: &PluginRecord,
    changed: Changed,
) -> Result<(), rusqlite::Error> {
    let PluginRecord { desired, generation, sdk, restarts, breaker, transitions } = record;
    let RestartHistory { failures, crash_loop, last_delay, recent, total } = restarts;
    // First, and always: the other tables refer to it.
    let recent = recent.iter().map(|at| at.as_nanos().to_string()).collect::<Vec<_>>().join(" ");
    transaction
        .prepare_cached(
            "INSERT INTO plugin
             (name, desired, generation, sdk, failures, crash_loop, last_delay_ns, recent_ns, restarts)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (name) DO UPDATE SET desired = ?2, generation = ?3, sdk = ?4, failures = ?5, crash_loop = ?6,
             last_delay_ns = ?7, recent_ns = ?8, restarts = ?9",
        )?
        .execute(params![
            name.as_str(),
            desired.map(Desired::as_str),
            signed(generation.0),
            sdk,
            failures,
            crash_loop,
            nanos(*last_delay),
            recent,
            total
        ])?;
    if changed.breaker {
        transaction.prepare_cached("DELETE FROM breaker WHERE plugin = ?1")?.execute([name.as_str()])?;
        if let Some(BreakerRecord { generation, position, at, open_left, reopened, consecutive }) = breaker {
            transaction.prepare_cached("INSERT INTO breaker VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?.execute(params![
                name.as_str(),
                signed(generation.0),
                position.as_str(),
                signed(at.as_nanos()),
                nanos(*open_left),
                reopened,
                consecutive
            ])?;
        }
    }
    if changed.transitions {
        transaction.prepare_cached("DELETE FROM transition WHERE plugin = ?1")?.execute([name.as_str()])?;
        let mut insert = transaction.prepare_cached("INSERT INTO transition VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        for (position, TransitionRecord { at, from, to, cause }) in (0_i64..).zip(transitions) {
            insert.execute(params![name.as_str(), position, wall_millis(*at), from.as_ref(), to.as_ref(), cause])?;
        }
    }
    Ok(())
}

/// Moves a damaged file and what belongs to it aside, and says where it lies now.
pub(super) fn move_aside(directory: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let free = (0..)
        .map(|more: u32| directory.join(format!("{FILE}.corrupt-{seconds}-{more}")))
        .find(|path| !path.exists())
        .unwrap_or_else(|| directory.join(format!("{FILE}.corrupt")));
    fs::rename(directory.join(FILE), &free)?;
    for suffix in ["-wal", "-shm"] {
        let mut to = free.clone().into_os_string();
        to.push(suffix);
        match fs::rename(directory.join(format!("{FILE}{suffix}")), to) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    forget_oldest(directory)?;
    Ok(free)
}

fn forget_oldest(directory: &Path) -> io::Result<()> {
    let prefix = format!("{FILE}.corrupt-");
    let mut kept = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(name) = entry.file_name().to_str()
            && name.starts_with(&prefix)
            && !name.ends_with("-wal")
            && !name.ends_with("-shm")
        {
            kept.push((entry.metadata()?.modified()?, name.to_owned()));
        }
    }
    kept.sort();
    for (_, name) in kept.iter().take(kept.len().saturating_sub(CORRUPT_KEPT)) {
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(directory.join(format!("{name}{suffix}")));
        }
    }
    Ok(())
}

fn name(row: &rusqlite::Row<'_>, column: usize) -> Result<PluginName, Trouble> {
    row.get::<_, String>(column)?.parse().map_err(|_| Trouble::Corrupt("a plugin has an impossible name".to_owned()))
}

fn moments(text: &str) -> Result<Vec<Time>, Trouble> {
    let moments: Result<Vec<Time>, _> = text
        .split_ascii_whitespace()
        .map(|nanos| nanos.parse().map(|nanos| Time::after_start(Duration::from_nanos(nanos))))
        .collect();
    match moments {
        Ok(moments) if moments.len() <= RestartHistory::MAX_RECENT => Ok(moments),
        Ok(_) | Err(_) => Err(Trouble::Corrupt("a plugin's failures are not moments".to_owned())),
    }
}

/// SQLite's integers are signed; 292 years of nanoseconds fit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn wall_millis(at: SystemTime) -> i64 {
    let millis = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    i64::try_from(millis).unwrap_or(i64::MAX)
}
