//! The escape and abuse suite: a hostile plugin makes every attempt of `table.toml` at every level, as root and as an
//! ordinary user, and each must end exactly as the table says. Each has a control, which proves that the probe works, and
//! for each wall there is a launch without only it that turns the verdict of a row.
//!
//! It attacks only what it started itself, and every bomb has a fuse. `cargo xtask test escape` prints the table.
#![allow(missing_docs, unreachable_pub, reason = "tests")]

mod acts;
#[path = "../harness/guest.rs"]
mod guest;
#[path = "../harness/mod.rs"]
mod harness;
mod machine;
mod table;
mod world;

use std::collections::BTreeMap;

use harness::{As, is_root};
use plugvisor_sandbox::protocol::{Control, Level};
use table::{Cell, LEVELS, Release, Row, Table, Unshown, User, unshown};
use world::World;

/// What came of it, and how to read it.
struct Verdict {
    /// What this host may be unable to show.
    hosts: Vec<Unshown>,
    here: Release,
    cells: u32,
    as_expected: u32,
    unshown: u32,
    controls: u32,
    flips: u32,
    wrong: Vec<String>,
}

enum Judged {
    AsExpected,
    Unshown,
    Wrong,
}

impl Verdict {
    fn here() -> Self {
        let (hosts, _) = unshown();
        let (cells, as_expected, unshown, controls, flips) = (0, 0, 0, 0, 0);
        Self { hosts, here: Release::here(), cells, as_expected, unshown, controls, flips, wrong: Vec::new() }
    }

    fn judge(&mut self, row: &Row, place: &str, lane: As, expected: &Cell, seen: &str) -> Judged {
        self.cells += 1;
        if expected.result == seen {
            self.as_expected += 1;
            return Judged::AsExpected;
        }
        if self.hosts.iter().any(|unshown| unshown.covers(row, place, lane, seen, self.here)) {
            self.unshown += 1;
            return Judged::Unshown;
        }
        self.wrong
            .push(format!("row {} {} at {place}, {lane:?}: expected {expected}, seen {seen}", row.number, row.title));
        Judged::Wrong
    }
}

fn shown(judged: &Judged, expected: &Cell, seen: &str) -> String {
    match judged {
        Judged::AsExpected => format!("{expected} ="),
        Judged::Unshown => format!("{expected} unshown:{seen}"),
        Judged::Wrong => format!("{expected} BUT {seen}"),
    }
}

fn seen_at(world: &mut World, row: &Row, level: Level, without: &[Control]) -> String {
    match row.act {
        None => world.attempt(row, level),
        Some(act) => acts::play(world, row, act, level, without),
    }
}

#[test]
fn every_attempt_ends_as_the_table_says() {
    let table = Table::read();
    let mut verdict = Verdict::here();
    let mut number = 0;
    println!(
        "row  attempt                                             lane      NONE | PROCESS | CONTAINER | SANDBOX | VM"
    );
    let only = std::env::var("PLUGVISOR_ESCAPE_ROW").ok();
    for name in only.iter().flat_map(|only| only.split(',')) {
        assert!(table.row.iter().any(|row| row.number == name), "PLUGVISOR_ESCAPE_ROW: there is no row {name}");
    }
    let chosen = |row: &&Row| only.as_ref().is_none_or(|only| only.split(',').any(|one| one == row.number));
    let machine = guest::find();
    let rows: Vec<&Row> = table.row.iter().filter(chosen).collect();
    let columns = machine.map(|machine| machine::columns(&machine, &rows, &mut number)).unwrap_or_default();
    for column in &columns {
        println!("{column}");
        verdict.wrong.extend(column.changed.iter().cloned());
    }
    for lane in As::possible() {
        number += 1;
        let mut world = World::start(lane, &[], number);
        let user = User::of(lane, world.harness.place.has_limits());
        let name = match user {
            User::Root => "root",
            User::Ordinary => "ordinary",
            User::Delegated => "delegated",
        };
        let before = world.host();
        let vm = columns.iter().find(|column| column.lane == lane);
        for row in table.row.iter().filter(chosen) {
            let cells = row.cells(user);
            let mut columns: Vec<String> = Vec::new();
            for (level, expected) in LEVELS.into_iter().zip(cells) {
                let seen = seen_at(&mut world, row, level, &[]);
                let judged = verdict.judge(row, level.as_str(), lane, expected, &seen);
                columns.push(shown(&judged, expected, &seen));
            }
            match (row.at_vm(user), vm.and_then(|column| column.seen.get(&row.number))) {
                (Some(expected), Some(seen)) => {
                    let judged = verdict.judge(row, Level::Vm.as_str(), lane, expected, seen);
                    columns.push(shown(&judged, expected, seen));
                }
                (Some(_), None) => columns.push("no kernel".to_owned()),
                (None, _) => columns.push(format!("{} held by other tests", row.reference)),
            }
            println!("{:<4} {:<51.51} {name:<9} {}", row.number, row.title, columns.join(" | "));
            // Some of them need privileges, and one lane is enough.
            if let (Some(outside), As::Root) = (&row.outside, lane) {
                let seen = match row.act {
                    None => world.outside(row, outside),
                    Some(act) => acts::play_outside(&mut world, row, act),
                };
                verdict.controls += 1;
                let judged = verdict.judge(row, "outside", lane, &outside.seen, &seen);
                println!("{:<57} outside of all walls: {}", "", shown(&judged, &outside.seen, &seen));
            }
        }
        // At NONE an ordinary user's plugin reaches all of these: looking at the host shows it.
        if lane == As::Ordinary && only.is_none() {
            let after = world.host();
            for what in
                ["the TCP listener", "the UDP socket", "the service", "the abstract socket", "the other generation"]
            {
                assert_ne!(before[what], after[what], "{what} was reached, and looks as before");
            }
        }
    }
    if is_root() {
        // One launcher for each set of walls.
        let mut sets: BTreeMap<Vec<Control>, Vec<(&Row, Level, &Cell)>> = BTreeMap::new();
        for row in table.row.iter().filter(chosen) {
            for flip in &row.flip {
                sets.entry(flip.without()).or_default().push((row, flip.level(), &flip.seen));
            }
        }
        for (without, flips) in sets {
            number += 1;
            let mut world = World::start(As::Root, &without, number);
            let names: Vec<&str> = without.iter().map(|control| control.as_str()).collect();
            for (row, level, expected) in flips {
                let seen = seen_at(&mut world, row, level, &without);
                verdict.flips += 1;
                let judged = verdict.judge(row, "flip", As::Root, expected, &seen);
                let told = shown(&judged, expected, &seen);
                println!(
                    "{:<4} {:<51.51} {} without {}: {told}",
                    row.number,
                    row.title,
                    level.as_str(),
                    names.join(", ")
                );
            }
        }
    }
    let guests: u32 = columns.iter().map(|column| column.guests).sum();
    let held = table.row.iter().filter(|row| row.is_held()).count();
    let Verdict { hosts: _, here: _, cells, as_expected, unshown, controls, flips, wrong } = verdict;
    for wrong in &wrong {
        println!("WRONG {wrong}");
    }
    println!(
        "{{\"rows\":{},\"cells\":{cells},\"as_expected\":{as_expected},\"unshown\":{unshown},\"wrong\":{},\"controls\":{controls},\"flips\":{flips},\"held_by_other_tests\":{held},\"guests\":{guests}}}",
        table.row.len(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}
