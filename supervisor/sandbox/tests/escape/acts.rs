//! The rows that take more than one launch and its result. Each gives what was seen, in the words of the table.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Control, Exit, Level, Reply, Request};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{
    harness::{As, Harness, Plugin, patience, read_all, wait_readable},
    table::{Act, Row},
    world::{World, read_until},
};

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;
/// How often what has no event is looked at.
const AGAIN: Duration = Duration::from_millis(5);

/// How it ends at this level.
pub(crate) fn play(world: &mut World, row: &Row, act: Act, level: Level, without: &[Control]) -> String {
    match act {
        Act::Busy => busy(world, row, level),
        Act::Daemon => daemon(world, row, level),
        Act::Orphan => orphan(world.another(without), level, without),
        Act::Flood => flood(world, row, level),
        Act::Reuse => reuse(world, row, level),
        Act::Swap => swap(world, level),
        Act::Credentials => credentials(world, row, level),
    }
}

/// The same without walls, for those that have such a control.
pub(crate) fn play_outside(world: &mut World, row: &Row, act: Act) -> String {
    match act {
        Act::Daemon => daemon_outside(&world.harness.path("bundles/walled/bin/walled")),
        // A launch that lives is signalled.
        Act::Reuse => {
            let plugin = world.launch(row, Level::Process, &["pause"]).expect("launched");
            let told = signalled(world, &plugin);
            // It ends by that, so there may be nothing left to kill.
            assert_eq!(world.harness.exit_of(plugin.launched.launch).0, Exit::Signal(SIGTERM));
            told
        }
        // What was swapped in runs when it is what was named.
        Act::Swap => swapped_in(world),
        Act::Busy | Act::Orphan | Act::Flood | Act::Credentials => "it has no such control".to_owned(),
    }
}

/// Kills all of it; a rootless launch at NONE has nothing that a Kill could go by but its first process.
fn end(world: &mut World, plugin: &Plugin, level: Level) -> Exit {
    let launch = plugin.launched.launch;
    let request = match (world.lane, level) {
        (As::Ordinary, Level::None) => Request::Signal { launch, signal: SIGKILL },
        _ => Request::Kill { launch },
    };
    assert_eq!(world.harness.ask(&request, &[]).0, Reply::Done);
    world.harness.exit_of(launch).0
}

/// Judged by the kernel's count of periods in which it was made to wait, once it has run for some.
fn busy(world: &mut World, row: &Row, level: Level) -> String {
    let mut plugin = match world.launch(row, level, &["spin", "4"]) {
        Ok(plugin) => plugin,
        Err(refused) => return refused,
    };
    read_until(&mut plugin, "spin");
    let limited = row.limits(level, &[]).cpu_percent.is_some()
        && plugin.launched.controls.iter().any(|state| state.control == Control::CpuLimit);
    let deadline = Instant::now() + patience();
    // A machine was made to wait before: as it started.
    let mut before = None;
    let seen = loop {
        let request = Request::Stats { launch: plugin.launched.launch };
        let Reply::Stats(stats) = world.harness.ask(&request, &[]).0 else { break "no statistics".to_owned() };
        let all = stats.cpu_throttled_periods.unwrap_or(0);
        let throttled = all - *before.get_or_insert(if level == Level::Vm { all } else { 0 });
        if throttled >= 3 {
            break "throttled".to_owned();
        }
        // Without a limit: far more than a fifth of one period of its accounting.
        if !limited && ticks(plugin.launched.pid) >= 30 {
            break if throttled == 0 { "not throttled".to_owned() } else { format!("throttled {throttled} times") };
        }
        if Instant::now() > deadline {
            break format!("throttled {throttled} times after {} ticks", ticks(plugin.launched.pid));
        }
        std::thread::sleep(AGAIN);
    };
    end(world, &plugin, level);
    seen
}

/// The processor time of all its threads, in hundredths of a second.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    // utime and stime, the 14th and 15th field of all.
    after.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

fn daemon(world: &mut World, row: &Row, level: Level) -> String {
    let mut plugin = match world.launch(row, level, &["deaf", "daemon", "pause"]) {
        Ok(plugin) => plugin,
        Err(refused) => return refused,
    };
    read_until(&mut plugin, "daemon-is");
    let request = Request::Signal { launch: plugin.launched.launch, signal: SIGTERM };
    assert_eq!(world.harness.ask(&request, &[]).0, Reply::Done);
    match end(world, &plugin, level) {
        Exit::Signal(SIGKILL) => {}
        other => return format!("{other:?}"),
    }
    // The daemon holds this pipe as long as it lives.
    read_all(&mut plugin.stdout);
    "all of it is gone".to_owned()
}

fn daemon_outside(program: &Path) -> String {
    let mut command = Command::new(program);
    command.args(["deaf", "daemon", "pause"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = command.spawn().expect("it starts");
    let mut lines = BufReader::new(process.stdout.take().expect("its output")).lines();
    let pid =
        lines.find_map(|line| line.expect("a line").strip_prefix("daemon-is ").map(str::to_owned)).expect("its daemon");
    let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a process");
    process.kill().expect("SIGKILL");
    process.wait().expect("it ends");
    let daemon = pidfd_open(pid, PidfdFlags::empty());
    let lives = daemon.as_ref().is_ok_and(|daemon| pidfd_send_signal(daemon, Signal::KILL).is_ok());
    if lives { "the daemon lives".to_owned() } else { "the daemon is gone".to_owned() }
}

fn orphan(mut harness: Harness, level: Level, without: &[Control]) -> String {
    let request = harness.request_at(level, &["steps"]);
    let mut plugin = harness.launch(request);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&plugin.worker));
    let mut worker = UnixStream::connect(path).expect("the worker socket");
    worker.set_read_timeout(Some(patience())).expect("a timeout");
    let mut step = |letter: &[u8; 1]| worker.write_all(letter).and_then(|()| worker.read_exact(&mut [0]));
    step(b"a").expect("it lives");
    harness.process.kill().expect("SIGKILL");
    harness.process.wait().expect("it ends");
    if without.contains(&Control::DiesWithLauncher) {
        let lives = step(b"b").is_ok();
        pidfd_send_signal(&plugin.pidfd, Signal::KILL).expect("it is ours");
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "it ends");
        return if lives { "it lives on" } else { "it does not answer" }.to_owned();
    }
    assert!(
        wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()),
        "{:?} {level:?}: it outlived the launcher",
        harness.as_
    );
    read_all(&mut plugin.stdout);
    "all of it is gone".to_owned()
}

/// A hundred megabytes into a pipe that nobody reads.
fn flood(world: &mut World, row: &Row, level: Level) -> String {
    let plugin = match world.launch(row, level, &["lines", "1000000", "100"]) {
        Ok(plugin) => plugin,
        Err(refused) => return refused,
    };
    assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()), "it writes");
    let answers = matches!(world.harness.ask(&Request::Probe, &[]).0, Reply::Probe(_));
    let ended = wait_readable(plugin.pidfd.as_fd(), Instant::now());
    end(world, &plugin, level);
    match (answers, ended) {
        (true, false) => "it waits, the launcher answers".to_owned(),
        _ => format!("the launcher answers: {answers}, it ended: {ended}"),
    }
}

/// What comes of signalling this launch.
pub(crate) fn signalled(world: &mut World, plugin: &Plugin) -> String {
    let request = Request::Signal { launch: plugin.launched.launch, signal: SIGTERM };
    match world.harness.ask(&request, &[]).0 {
        Reply::Done => "ok".to_owned(),
        Reply::Refused(refusal) => format!("{:?}", refusal.code),
        other => format!("{other:?}"),
    }
}

/// Whoever has its number now is not signalled in its place.
fn reuse(world: &mut World, row: &Row, level: Level) -> String {
    let plugin = match world.launch(row, level, &["exit", "0"]) {
        Ok(plugin) => plugin,
        Err(refused) => return refused,
    };
    world.harness.exit_of(plugin.launched.launch);
    signalled(world, &plugin)
}

const SWAPPED: &str = "#!/bin/sh\necho say swapped\n";

fn swap(world: &mut World, level: Level) -> String {
    let mut request = world.harness.request_at(level, &["say", "verified"]);
    request.plugin = format!("walled-swap-{}", level.as_str());
    let request = world.harness.prepared(request);
    let binary = world.harness.place_of(request.bundle).join("bin/walled");
    // Another file: this one is also in other bundles.
    fs::remove_file(&binary).and_then(|()| fs::write(&binary, SWAPPED)).expect("swapped");
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("chmod");
    world.swapped = world.harness.place_of(request.bundle);
    let mut plugin = match world.harness.launch_stored(request) {
        Ok(plugin) => plugin,
        Err(refusal) => return format!("{:?}", refusal.code),
    };
    let said = read_all(&mut plugin.stdout);
    world.harness.exit_of(plugin.launched.launch);
    if said == "say verified\n" { "what was verified ran".to_owned() } else { format!("it said {said:?}") }
}

fn swapped_in(world: &mut World) -> String {
    let bundle = world.swapped.clone();
    let mut request = world.harness.request_at(Level::Sandbox, &["say", "verified"]);
    request.plugin = format!("walled-swap-{}", Level::Sandbox.as_str());
    request.bundle = super::harness::digest(&bundle);
    world.harness.import(&bundle).expect("imported");
    let mut plugin = world.harness.launch_stored(request).expect("launched");
    let said = read_all(&mut plugin.stdout);
    world.harness.exit_of(plugin.launched.launch);
    if said == "say swapped\n" { "ok".to_owned() } else { format!("it said {said:?}") }
}

/// Who the broker sees at the other end of the plugin's own socket.
fn credentials(world: &mut World, row: &Row, level: Level) -> String {
    let path = if level == Level::None { "/plugvisor/broker.sock" } else { "/run/plugvisor/broker.sock" };
    let plugin = match world.launch(row, level, &["unix", path]) {
        Ok(plugin) => plugin,
        Err(refused) => return refused,
    };
    let seen = seen_by_the_broker(&plugin);
    world.harness.exit_of(plugin.launched.launch);
    seen
}

/// Who connected to this plugin's broker socket.
pub(crate) fn seen_by_the_broker(plugin: &Plugin) -> String {
    assert!(wait_readable(plugin.broker.as_fd(), Instant::now() + patience()), "it connects");
    let broker = UnixListener::from(plugin.broker.try_clone().expect("a copy"));
    let (connection, _) = broker.accept().expect("a connection");
    let seen = rustix::net::sockopt::socket_peercred(&connection).expect("its credentials").uid.as_raw();
    if seen == plugin.launched.uid { "its own uid".to_owned() } else { format!("uid {seen}") }
}
