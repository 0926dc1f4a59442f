//! The table: reading it, and what it must hold by itself. It launches nothing.

use std::{collections::BTreeSet, fs, path::Path};

use plugvisor_sandbox::protocol::{Control, Grant, Level, Limits};
use serde::Deserialize;

use super::harness::As;

/// The levels of the columns.
pub(crate) const LEVELS: [Level; 4] = [Level::None, Level::Process, Level::Container, Level::Sandbox];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Table {
    pub(crate) row: Vec<Row>,
}

/// Whose launcher it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    Root,
    Ordinary,
    /// An ordinary one with a cgroup that was delegated to it.
    Delegated,
}

impl User {
    const ALL: [Self; 3] = [Self::Root, Self::Ordinary, Self::Delegated];

    pub(crate) fn of(lane: As, has_limits: bool) -> Self {
        match (lane, has_limits) {
            (As::Root, _) => Self::Root,
            (As::Ordinary, false) => Self::Ordinary,
            (As::Ordinary, true) => Self::Delegated,
        }
    }
}

/// One attempt.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    /// As in the reference, with a letter behind it where that groups several.
    pub(crate) number: String,
    pub(crate) title: String,
    /// The letters that the reference has, VM's at the end.
    pub(crate) reference: String,
    /// It is not in the reference.
    #[serde(default)]
    pub(crate) added: bool,
    /// What the plugin does first, whatever comes of it.
    #[serde(default)]
    pub(crate) before: Vec<String>,
    #[serde(default)]
    pub(crate) probe: Vec<String>,
    pub(crate) act: Option<Act>,
    #[serde(default)]
    grants: Vec<Granted>,
    #[serde(default)]
    limits: Asked,
    #[serde(default)]
    root: Vec<Cell>,
    ordinary: Option<Vec<Cell>>,
    /// Of an ordinary user whose launcher has a cgroup that was delegated to it.
    delegated: Option<Vec<Cell>>,
    /// At VM, whoever runs the launcher; of an ordinary user where it differs.
    vm: Option<Cell>,
    vm_ordinary: Option<Cell>,
    /// What is attempted there in place of `probe`.
    vm_probe: Option<Vec<String>>,
    /// Why its cell at VM has another letter than the reference.
    vm_differs: Option<String>,
    /// What holds it.
    wall: String,
    /// Why a cell has another letter than the reference.
    differs: Option<String>,
    pub(crate) outside: Option<Outside>,
    #[serde(default)]
    pub(crate) flip: Vec<Flip>,
    /// `FILE:FUNCTION` of tests that hold it, where the launcher alone does not.
    #[serde(default)]
    held: Option<Vec<String>>,
}

/// What takes more than one launch and its result.
#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Act {
    Busy,
    Daemon,
    Orphan,
    Flood,
    Reuse,
    Swap,
    Credentials,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Granted {
    WriteTemp,
    SpawnChild,
    SignalHandling,
    ReadConfig,
    ReadData,
    WriteData,
    /// From PROCESS up: at NONE nothing needs it.
    Egress,
    /// The same.
    TcpServer,
}

/// Limits that are asked for from PROCESS up.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    memory: Option<u64>,
    cpu: Option<u32>,
    pids: Option<u32>,
    file: Option<u64>,
    files: Option<u32>,
}

/// The same probe by a program without any wall.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Outside {
    /// In place of the row's.
    pub(crate) probe: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) before: Vec<String>,
    pub(crate) seen: Cell,
}

/// The same probe with some walls left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Flip {
    without: Vec<String>,
    level: String,
    pub(crate) seen: Cell,
}

impl Flip {
    pub(crate) fn without(&self) -> Vec<Control> {
        let named = |name: &String| Control::ALL.into_iter().find(|control| control.as_str() == name);
        self.without.iter().map(|name| named(name).unwrap_or_else(|| panic!("{name} is no control"))).collect()
    }

    pub(crate) fn level(&self) -> Level {
        let found = LEVELS.into_iter().find(|level| level.as_str() == self.level);
        found.unwrap_or_else(|| panic!("{} is no level", self.level))
    }
}

/// A verdict and the exact result that it stands for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) struct Cell {
    pub(crate) letter: char,
    pub(crate) result: String,
}

impl TryFrom<String> for Cell {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (letter, result) = text.split_once(':').unwrap_or((&text, "ok"));
        match letter {
            "A" | "D" | "C" | "K" | "G" | "R" => {
                Ok(Self { letter: letter.chars().next().unwrap_or('?'), result: result.to_owned() })
            }
            other => Err(format!("{other:?} is no verdict")),
        }
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.result.as_str() {
            "ok" => write!(f, "{}", self.letter),
            result => write!(f, "{}:{result}", self.letter),
        }
    }
}

impl Row {
    /// The cells of a user; empty where only other tests hold the row.
    pub(crate) fn cells(&self, user: User) -> &[Cell] {
        let own = match user {
            User::Root => None,
            User::Ordinary => self.ordinary.as_ref(),
            User::Delegated => self.delegated.as_ref().or(self.ordinary.as_ref()),
        };
        own.unwrap_or(&self.root)
    }

    /// The cell at VM; none where only other tests hold the row.
    pub(crate) fn at_vm(&self, user: User) -> Option<&Cell> {
        match user {
            User::Ordinary => self.vm_ordinary.as_ref().or(self.vm.as_ref()),
            User::Root | User::Delegated => self.vm.as_ref(),
        }
    }

    /// What is attempted at this level.
    pub(crate) fn words(&self, level: Level) -> Vec<&str> {
        let probe = self.vm_probe.as_ref().filter(|_| level == Level::Vm).unwrap_or(&self.probe);
        self.before.iter().chain(probe).map(String::as_str).collect()
    }

    pub(crate) fn grants(&self, level: Level) -> Vec<Grant> {
        let grant = |granted: &Granted| match granted {
            Granted::WriteTemp => Some(Grant::WriteTemp),
            Granted::SpawnChild => Some(Grant::SpawnChild),
            Granted::SignalHandling => Some(Grant::SignalHandling),
            Granted::ReadConfig => Some(Grant::ReadConfig),
            Granted::ReadData => Some(Grant::ReadData),
            Granted::WriteData => Some(Grant::WriteData),
            Granted::Egress => (level != Level::None).then_some(Grant::Egress),
            Granted::TcpServer => (level != Level::None).then_some(Grant::TcpServer),
        };
        self.grants.iter().filter_map(grant).collect()
    }

    /// None at NONE, which is where a bomb is shown to go off; and none that is left out.
    pub(crate) fn limits(&self, level: Level, without: &[Control]) -> Limits {
        if level == Level::None {
            return Limits::default();
        }
        let unless = |control| !without.contains(&control);
        // A machine that is emulated needs some processor time to start in.
        let cpu = self.limits.cpu.map(|cpu| if level == Level::Vm { cpu.max(50) } else { cpu });
        Limits {
            memory_bytes: self.limits.memory.filter(|_| unless(Control::MemoryLimit)),
            cpu_percent: cpu.filter(|_| unless(Control::CpuLimit)),
            pids: self.limits.pids.filter(|_| unless(Control::PidsLimit)),
            file_size_bytes: self.limits.file,
            open_files: self.limits.files,
        }
    }

    /// Whether the suite makes it.
    pub(crate) fn is_run(&self) -> bool {
        self.vm.is_some()
    }

    /// Whether another test holds it.
    pub(crate) fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

impl Table {
    pub(crate) fn read() -> Self {
        toml::from_str(include_str!("table.toml")).unwrap_or_else(|error| panic!("table.toml: {error}"))
    }
}

/// A cell that a host may be unable to show: its row, level and lane, what is seen instead, and the release of Linux from
/// which on it is not.
pub(crate) struct Unshown {
    row: String,
    level: String,
    lane: String,
    seen: String,
    before: Option<Release>,
}

/// A release of Linux: its two numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Release(u32, u32);

impl Release {
    fn read(text: &str) -> Option<Self> {
        let mut numbers = text.split(['.', '-']);
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    /// The one that runs here.
    pub(crate) fn here() -> Self {
        let text = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
        Self::read(text.trim()).unwrap_or_else(|| panic!("{text:?} is no release"))
    }
}

/// The checked-in list.
pub(crate) fn unshown() -> (Vec<Unshown>, BTreeSet<String>) {
    let (mut cells, mut walls) = (Vec::new(), BTreeSet::new());
    for line in include_str!("../../../../tests/escape-unshown.txt").lines() {
        let (entry, why) = line.split_once('#').unwrap_or((line, ""));
        let mut cell = |row: &str, level: &str, lane: &str, seen: &str, before| {
            let [row, level, lane, seen] = [row, level, lane, seen].map(str::to_owned);
            cells.push(Unshown { row, level, lane, seen, before });
        };
        match *entry.split_whitespace().collect::<Vec<_>>() {
            [] => continue,
            ["wall", control] => drop(walls.insert(control.to_owned())),
            [row, level, lane, seen] => cell(row, level, lane, seen, None),
            [row, level, lane, seen, "before", release] => {
                let before = Release::read(release);
                assert!(before.is_some(), "escape-unshown.txt: {release:?} is no release");
                cell(row, level, lane, seen, before);
            }
            _ => panic!(
                "escape-unshown.txt: {line:?} is neither `ROW LEVEL LANE SEEN [before RELEASE]` nor `wall CONTROL`"
            ),
        }
        assert!(!why.trim().is_empty(), "escape-unshown.txt: {line:?} has no reason");
    }
    (cells, walls)
}

impl Unshown {
    pub(crate) fn covers(&self, row: &Row, place: &str, lane: As, seen: &str, here: Release) -> bool {
        let lane = match lane {
            As::Root => "root",
            As::Ordinary => "ordinary",
        };
        let fits = |pattern: &str, value: &str| pattern == "*" || pattern == value;
        let of_here = self.before.is_none_or(|before| here < before);
        of_here && self.row == row.number && fits(&self.level, place) && fits(&self.lane, lane) && self.seen == seen
    }
}

/// `docs/escape.md`, written from the table.
fn document(table: &Table) -> String {
    use std::fmt::Write as _;
    let mut text = include_str!("page.md").to_owned();
    text.push_str("\n| # | attempt | reference | as root: N, P, C, S | as an ordinary user, where it differs | at VM | held by |\n|---|---|---|---|---|---|---|\n");
    let cells = |cells: &[Cell]| cells.iter().map(Cell::to_string).collect::<Vec<_>>().join(", ");
    for row in &table.row {
        let reference = if row.added { "added" } else { row.reference.as_str() };
        let root = if row.root.is_empty() { "other tests".to_owned() } else { cells(&row.root) };
        let mut ordinary = row.ordinary.as_deref().map(cells).unwrap_or_default();
        match &row.delegated {
            Some(delegated) if *delegated == row.root => ordinary.push_str("; with a delegated cgroup as root"),
            Some(delegated) => {
                let _ = write!(ordinary, "; with a delegated cgroup {}", cells(delegated));
            }
            None => {}
        }
        let why = |why: &Option<String>| why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        let mut vm = row.vm.as_ref().map(Cell::to_string).unwrap_or_default();
        if let Some(ordinary) = &row.vm_ordinary {
            let _ = write!(vm, "; as an ordinary user {ordinary}");
        }
        vm.push_str(&why(&row.vm_differs));
        let _ = writeln!(
            text,
            "| {} | {} | {reference} | {root} | {ordinary} | {vm} | {}{} |",
            row.number,
            row.title,
            row.wall,
            why(&row.differs)
        );
    }
    text
}

#[test]
fn the_page_is_written_from_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/escape.md");
    let document = document(&Table::read());
    if std::env::var_os("PLUGVISOR_BLESS").is_some() {
        fs::write(path, &document).expect("written");
    }
    let written = fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == document,
        "docs/escape.md is out of date: PLUGVISOR_BLESS=1 cargo test -p plugvisor-sandbox --test escape page"
    );
}

/// What leaves a wall out hangs on this one setting.
#[test]
fn a_release_build_leaves_no_wall_out() {
    let workspace: toml::Table = toml::from_str(include_str!("../../../../Cargo.toml")).expect("Cargo.toml");
    let profiles = workspace["profile"].as_table().expect("its profiles");
    for (name, profile) in profiles.iter().filter(|(name, _)| *name != "dev" && *name != "test") {
        let like = profile.get("inherits").and_then(toml::Value::as_str);
        let plain = profile.get("debug-assertions").is_none() && !matches!(like, Some("dev" | "test"));
        assert!(plain, "the profile {name} is one for development");
    }
    assert!(profiles.contains_key("release"));
}

#[test]
fn the_table_is_whole() {
    let table = Table::read();
    let mut numbers = BTreeSet::new();
    let mut flipped = BTreeSet::new();
    for row in &table.row {
        let name = &row.number;
        assert!(numbers.insert(name.as_str()), "row {name} is there twice");
        assert_eq!(row.reference.chars().count(), LEVELS.len() + 1, "row {name}");
        assert!(!row.wall.is_empty() && !row.title.is_empty(), "row {name}");
        let run = !row.probe.is_empty() || row.act.is_some();
        assert!(run != row.root.is_empty(), "row {name} has cells exactly when it is run");
        assert!(run || row.is_held(), "row {name} is neither run nor held by another test");
        let mut differs = false;
        for user in User::ALL {
            let cells = row.cells(user);
            assert!(cells.is_empty() || cells.len() == LEVELS.len(), "row {name}");
            let other = |(cell, letter): (&Cell, char)| cell.letter != letter;
            differs |= cells.iter().zip(row.reference.chars()).any(other);
        }
        assert_eq!(differs, row.differs.is_some(), "row {name}: differs says why a cell is not as in the reference");
        assert_eq!(row.vm.is_some(), run, "row {name} has a cell at VM exactly when it is run");
        let other = |cell: &Cell| !row.reference.ends_with(cell.letter);
        assert_eq!(
            row.vm.iter().chain(&row.vm_ordinary).any(other),
            row.vm_differs.is_some(),
            "row {name}: vm_differs says why its cell at VM is not as in the reference"
        );
        let allowed = User::ALL.iter().any(|user| row.cells(*user).first().is_some_and(|cell| cell.letter == 'A'));
        assert!(
            !run || row.is_held() || allowed || row.outside.is_some() || !row.flip.is_empty(),
            "row {name} has no control"
        );
        for flip in &row.flip {
            let at = LEVELS.iter().position(|level| *level == flip.level()).expect("a level");
            let whole = &row.cells(User::Root)[at];
            assert_ne!(flip.seen, *whole, "row {name}: what is left out changes nothing");
            if let ([only], true) = (flip.without().as_slice(), flip.seen.letter != whole.letter) {
                flipped.insert(only.as_str());
            }
        }
        for test in row.held.iter().flatten() {
            let (file, function) = test.split_once(':').unwrap_or_else(|| panic!("{test:?} is not FILE:FUNCTION"));
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
            let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            assert!(text.contains(&format!("fn {function}(")), "row {name}: {test} is not there");
        }
    }
    for number in 1..=60 {
        let of = |name: &&str| name.trim_end_matches(|letter: char| letter.is_ascii_lowercase()) == number.to_string();
        assert!(numbers.iter().any(of), "row {number} of the reference is not there");
    }
    let (_, named) = unshown();
    for control in Control::ALL {
        let control = control.as_str();
        assert!(
            flipped.contains(control) != named.contains(control),
            "{control}: either a launch without only it turns a verdict, or the list says why none can"
        );
    }
}
