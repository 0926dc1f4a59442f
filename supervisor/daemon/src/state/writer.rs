//! The thread that writes: it takes what comes, keeps everything in memory, and writes it as soon as that is possible.
//!
//! What is noted by the way is written in batches and kept until it is written. What an operator asks for waits for the
//! disk and is given up, never half remembered, when the disk does not take it.

use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    time::{Duration, Instant, SystemTime},
};

use plugvisor_core::Error;
use plugvisor_package::PluginName;
use tokio::sync::{oneshot, watch};

use super::{
    Health, PATIENCE, Rebuilt, StateDirectory, Writing,
    database::{self, Changed, Database, Trouble},
    locked, read_only,
    record::{Desired, Note, PluginRecord},
};

/// How long one attempt waits for another process. The queue is emptied between attempts.
const ATTEMPT: Duration = Duration::from_millis(200);

/// Between attempts while the file cannot be written.
const RETRY: Duration = Duration::from_millis(500);

/// What one transaction takes from the queue at most.
const BATCH: usize = 512;

#[derive(Debug)]
pub(super) enum Command {
    Note {
        plugin: PluginName,
        note: Note,
    },
    Desire {
        plugin: PluginName,
        desired: Desired,
        asked: Instant,
        reply: oneshot::Sender<Result<(), Error>>,
    },
    Written(oneshot::Sender<()>),
    Close,
    /// As if the disk held no more than this many pages.
    #[cfg(test)]
    LimitPages(i64),
}

#[derive(Debug)]
struct Wish {
    plugin: PluginName,
    desired: Desired,
    asked: Instant,
    reply: oneshot::Sender<Result<(), Error>>,
}

#[derive(Debug)]
pub(super) struct Writer {
    /// `None` while a damaged file could not be replaced.
    database: Option<Database>,
    directory: StateDirectory,
    boot: String,
    /// Everything, as it is or will be in the file.
    records: BTreeMap<PluginName, PluginRecord>,
    changed: BTreeMap<PluginName, Changed>,
    wishes: Vec<Wish>,
    waiting: Vec<oneshot::Sender<()>>,
    health: watch::Sender<Health>,
    /// Since when another process has held the file, as far as attempts tell.
    held_since: Option<Instant>,
    closing: bool,
}

impl Writer {
    pub(super) fn new(
        database: Database,
        directory: StateDirectory,
        records: BTreeMap<PluginName, PluginRecord>,
        stale: bool,
        health: watch::Sender<Health>,
    ) -> Self {
        let mut this = Self {
            boot: database.boot().to_owned(),
            database: Some(database),
            directory,
            records,
            changed: BTreeMap::new(),
            wishes: Vec::new(),
            waiting: Vec::new(),
            health,
            held_since: None,
            closing: false,
        };
        if stale {
            this.everything_changed();
        }
        this
    }

    fn everything_changed(&mut self) {
        let every = Changed { record: true, breaker: true, transitions: true };
        self.changed = self.records.keys().map(|name| (name.clone(), every)).collect();
    }

    pub(super) fn run(mut self, inbox: &Receiver<Command>) {
        while !self.closing {
            let first = if self.works() && !self.has_work() {
                inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                inbox.recv_timeout(RETRY)
            };
            match first {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.closing = true,
            }
            for _ in 1..BATCH {
                match inbox.try_recv() {
                    Ok(command) => self.take(command),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            if self.has_work() || !self.works() {
                self.attempt();
            }
        }
        if self.has_work() {
            tracing::error!("the last changes of state could not be written and are lost");
        }
        if let Some(database) = self.database.take() {
            database.close();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Note { plugin, note } => {
                let changed = self.changed.entry(plugin.clone()).or_default();
                match &note {
                    Note::Begun(_) | Note::Restarts(_) | Note::Sdk(_) => changed.record = true,
                    Note::Breaker(_) => changed.breaker = true,
                    Note::Transition(_) => changed.transitions = true,
                }
                self.records.entry(plugin).or_default().take(note);
            }
            Command::Desire { plugin, desired, asked, reply } => {
                self.wishes.push(Wish { plugin, desired, asked, reply });
            }
            Command::Written(reply) => self.waiting.push(reply),
            Command::Close => self.closing = true,
            #[cfg(test)]
            Command::LimitPages(pages) => self.database.as_ref().unwrap().limit_pages(pages),
        }
    }

    fn works(&self) -> bool {
        self.health.borrow().writing == Writing::Works
    }

    fn has_work(&self) -> bool {
        !self.changed.is_empty() || !self.wishes.is_empty() || !self.waiting.is_empty()
    }

    fn attempt(&mut self) {
        // With nobody there to tell, an attempt to close waits as long as anybody would have.
        let patience = if self.closing { PATIENCE } else { ATTEMPT };
        match self.write(patience) {
            Ok(()) => self.written(),
            Err(Trouble::Locked) => {
                let late: Vec<Wish> = self.wishes.extract_if(.., |wish| wish.asked.elapsed() >= PATIENCE).collect();
                let held_since = *self.held_since.get_or_insert_with(Instant::now);
                if held_since.elapsed() >= PATIENCE || !late.is_empty() || self.closing {
                    self.fails("locked", "another process holds it".to_owned());
                }
                for wish in late {
                    let _ = wish.reply.send(Err(locked()));
                }
                self.waiting.clear();
            }
            Err(Trouble::Corrupt(why)) => self.rebuild(&why),
            Err(trouble @ (Trouble::Full(_) | Trouble::Io(_) | Trouble::Later(_) | Trouble::Foreign(_))) => {
                self.refuse(&trouble);
            }
        }
    }

    fn write(&mut self, patience: Duration) -> Result<(), Trouble> {
        let Some(database) = &mut self.database else {
            return Err(Trouble::Io("the damaged file could not be replaced".to_owned()));
        };
        // The wishes are written over what is remembered, and remembered once they are written.
        let mut wished: BTreeMap<&PluginName, PluginRecord> = BTreeMap::new();
        for Wish { plugin, desired, .. } in &self.wishes {
            let record = wished.entry(plugin).or_insert_with(|| self.records.get(plugin).cloned().unwrap_or_default());
            record.desired = Some(*desired);
        }
        let plain = self.changed.iter().filter(|(name, _)| !wished.contains_key(*name));
        let plain = plain.filter_map(|(name, changed)| Some((name, self.records.get(name)?, *changed)));
        let wishes =
            wished.iter().map(|(name, record)| (*name, record, self.changed.get(*name).copied().unwrap_or_default()));
        database.write(plain.chain(wishes), !self.wishes.is_empty(), patience)
    }

    fn written(&mut self) {
        self.held_since = None;
        self.changed.clear();
        // Before anybody is answered: who asks next must not be refused for what is over.
        self.health.send_if_modified(|health| {
            let failed = health.writing != Writing::Works;
            health.writing = Writing::Works;
            failed
        });
        for Wish { plugin, desired, asked: _, reply } in std::mem::take(&mut self.wishes) {
            self.records.entry(plugin).or_default().desired = Some(desired);
            let _ = reply.send(Ok(()));
        }
        self.waiting.clear();
    }

    /// The file was damaged under our hands. Everything that it held is in memory.
    fn rebuild(&mut self, why: &str) {
        tracing::error!(why, "the state is damaged; it is moved aside and written anew");
        if let Some(damaged) = self.database.take() {
            damaged.close();
        }
        let again = database::move_aside(self.directory.path())
            .map_err(|error| Trouble::Io(format!("it is damaged ({why}) and cannot be moved aside: {error}")))
            .and_then(|moved_to| Ok((moved_to, Database::open(self.directory.path(), &self.boot, ATTEMPT)?)));
        match again {
            Ok((moved_to, database)) => {
                self.database = Some(database);
                self.everything_changed();
                self.health.send_modify(|health| health.rebuilt = Some(Rebuilt { moved_to, why: why.to_owned() }));
                match self.write(ATTEMPT) {
                    Ok(()) => self.written(),
                    Err(trouble) => self.refuse(&trouble),
                }
            }
            Err(trouble) => self.refuse(&trouble),
        }
    }

    /// It cannot be written now: who waits is told, and what was noted is kept.
    fn refuse(&mut self, trouble: &Trouble) {
        let cause = match trouble {
            Trouble::Full(_) => "disk_full",
            Trouble::Locked => "locked",
            Trouble::Io(_) | Trouble::Corrupt(_) | Trouble::Later(_) | Trouble::Foreign(_) => "io",
        };
        let why = trouble.why();
        for wish in std::mem::take(&mut self.wishes) {
            let _ = wish.reply.send(Err(read_only(&why)));
        }
        self.waiting.clear();
        self.fails(cause, why);
    }

    fn fails(&self, cause: &'static str, why: String) {
        self.health.send_if_modified(|health| match &health.writing {
            Writing::Fails { cause: same, .. } if *same == cause => false,
            Writing::Works | Writing::Fails { .. } => {
                tracing::error!(cause, why, "the state cannot be written; it is tried again");
                health.writing = Writing::Fails { since: SystemTime::now(), cause, why };
                true
            }
        });
    }
}
