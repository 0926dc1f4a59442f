//! The column of the level VM: what a guest shows of each attempt, and that its host shows nothing of it.
//!
//! A machine takes seconds to start, so all attempts that leave a guest alive are made in one, each by a process of its own;
//! those that end it have one each. The host is looked at before and after: that is what G stands for.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Exit, Grant, Level, Limits};

use super::{
    acts,
    guest::Guest,
    harness::{As, Plugin, read_all},
    table::{Act, Row},
    world::{World, last_told, signal},
};

/// What was seen at VM in one lane.
pub(crate) struct Column {
    pub(crate) lane: As,
    /// By the rows' numbers.
    pub(crate) seen: BTreeMap<String, String>,
    pub(crate) guests: u32,
    took: Duration,
    /// What of the host is not as it was.
    pub(crate) changed: Vec<String>,
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lane, seen, guests, took, changed } = self;
        let (rows, took) = (seen.len(), took.as_secs_f64());
        write!(f, "{lane:?}: {rows} rows at VM in {guests} guests, {took:.1} s, changed on the host: {}", changed.len())
    }
}

/// Of every lane at once: an emulated guest keeps one processor busy.
pub(crate) fn columns(machine: &Guest, rows: &[&Row], number: &mut i64) -> Vec<Column> {
    let lanes: Vec<(As, i64)> = As::possible().into_iter().zip(*number + 1..).collect();
    *number += i64::try_from(lanes.len()).expect("few");
    std::thread::scope(|scope| {
        let columns: Vec<_> = lanes
            .into_iter()
            .map(|(lane, number)| {
                scope.spawn(move || Column::of(World::start_with_machines(lane, machine, number), rows))
            })
            .collect();
        columns.into_iter().map(|column| column.join().expect("its column")).collect()
    })
}

impl Column {
    fn of(mut world: World, rows: &[&Row]) -> Self {
        let begun = Instant::now();
        let before = world.host();
        let (took, changed) = (Duration::ZERO, Vec::new());
        let mut column = Self { lane: world.lane, seen: BTreeMap::new(), guests: 0, took, changed };
        let (mut free, mut limited) = (Vec::new(), Vec::new());
        for row in rows.iter().filter(|row| row.is_run()) {
            let limits = row.limits(Level::Vm, &[]);
            // All others share a guest that may write its data.
            let may_read_alone = row.grants(Level::Vm).contains(&Grant::ReadData);
            match row.act {
                // Two that the guest of all the others shows.
                Some(Act::Credentials | Act::Reuse) => {}
                Some(act) => column.alone(row, || acts::play(&mut world, row, act, Level::Vm, &[])),
                None if limits.memory_bytes.is_some() || may_read_alone => {
                    column.alone(row, || world.attempt(row, Level::Vm));
                }
                None if limits == Limits::default() => free.push(*row),
                None => limited.push(*row),
            }
        }
        let named = |act| rows.iter().find(|row| row.act == Some(act));
        if let Some(plugin) = column.together(&mut world, free, Limits::default()) {
            if let Some(row) = named(Act::Credentials) {
                column.seen.insert(row.number.clone(), acts::seen_by_the_broker(&plugin));
            }
            if let Some(row) = named(Act::Reuse) {
                column.seen.insert(row.number.clone(), acts::signalled(&mut world, &plugin));
            }
        }
        let limits = limited.iter().fold(Limits::default(), |all, row| {
            let Limits { pids, file_size_bytes, open_files, .. } = row.limits(Level::Vm, &[]);
            Limits {
                pids: all.pids.or(pids),
                file_size_bytes: all.file_size_bytes.or(file_size_bytes),
                open_files: all.open_files.or(open_files),
                ..Limits::default()
            }
        });
        column.together(&mut world, limited, limits);
        column.took = begun.elapsed();
        let after = world.host();
        let changed = before.iter().filter(|(what, was)| after.get(*what) != Some(was));
        column.changed.extend(changed.map(|(what, was)| {
            format!("{what} of the host was {was:?} before the attempts at VM, and {:?} after", after.get(what))
        }));
        column
    }

    /// A row with a guest of its own.
    fn alone(&mut self, row: &Row, attempt: impl FnOnce() -> String) {
        let seen = attempt();
        self.guests += u32::from(!seen.starts_with("ControlUnavailable"));
        self.seen.insert(row.number.clone(), seen);
    }

    /// Rows that share a guest, with all that any of them is granted.
    fn together(&mut self, world: &mut World, mut rows: Vec<&Row>, limits: Limits) -> Option<Plugin> {
        // What leaves processes behind comes last.
        rows.sort_by_key(|row| row.probe.first().is_some_and(|first| first == "forks"));
        let mut words = vec!["each", "unix", "/run/plugvisor/broker.sock"];
        for row in &rows {
            words.push("then");
            words.extend(row.words(Level::Vm));
        }
        let grants = vec![
            Grant::WriteTemp,
            Grant::SpawnChild,
            Grant::SignalHandling,
            Grant::ReadConfig,
            Grant::WriteData,
            Grant::Egress,
            Grant::TcpServer,
        ];
        self.guests += 1;
        let mut plugin = match world.launch_with(Level::Vm, grants, limits, &words) {
            Ok(plugin) => plugin,
            Err(refused) => {
                self.seen.extend(rows.iter().map(|row| (row.number.clone(), refused.clone())));
                return None;
            }
        };
        let text = read_all(&mut plugin.stdout);
        let errors = read_all(&mut plugin.stderr);
        let exit = world.harness.exit_of(plugin.launched.launch);
        let mut ended = ends(&text).into_iter();
        let first = ended.next();
        for row in &rows {
            let seen = ended.next().unwrap_or_else(|| format!("its guest ended before: {exit:?} {text} {errors}"));
            self.seen.insert(row.number.clone(), seen);
        }
        assert_eq!((first.as_deref(), exit), (Some("ok"), (Exit::Code(0), false)), "{text}{errors}");
        Some(plugin)
    }
}

/// How each series of attempts ended.
fn ends(text: &str) -> Vec<String> {
    let (mut ends, mut of_this) = (Vec::new(), String::new());
    for line in text.lines() {
        match line.strip_prefix("ended ").and_then(|how| how.split_once(' ')) {
            Some(("code", "0")) => ends.push(last_told(&of_this)),
            Some(("signal", number)) => ends.push(signal(number.parse().expect("a number"))),
            Some((_, code)) => ends.push(format!("it ended with {code}")),
            None => {
                of_this.push_str(line);
                of_this.push('\n');
                continue;
            }
        }
        of_this.clear();
    }
    ends
}
