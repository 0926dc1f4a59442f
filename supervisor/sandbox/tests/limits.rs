//! How well limits hold, by the kernel's own accounting: they are in its files as they were asked for, and what a plugin
//! gets is within three percent of them.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs,
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use harness::{As, Harness, Plugin, patience, wait_readable};
use plugvisor_sandbox::protocol::{Control, Exit, Launch, Limits, RefusalCode, Reply, Request};
use rustix::process::Signal;

/// In how many periods of the CPU limit a plugin is made to wait while it is measured. An emulated processor that stands
/// still while it is charged to the plugin makes it use more than a period's share at once; the kernel takes that off the
/// next ones. So the same measurement goes on for longer when that shows at its ends, and never passes where the limit
/// does not hold.
const PERIODS: u64 = 40;
const MOST_PERIODS: u64 = 160;

/// How long one is.
const PERIOD: Duration = Duration::from_millis(100);

/// How often what has no event is looked at.
const AGAIN: Duration = Duration::from_millis(1);

/// Launchers that can hold limits, each of another user.
fn with_limits() -> Vec<Harness> {
    let mut able = Vec::new();
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut probe = harness.request(&["exit", "0"]);
        probe.allow_degraded.retain(|control| *control == Control::OwnUid);
        probe.limits = Limits { memory_bytes: Some(64 << 20), cpu_percent: Some(50), ..Limits::default() };
        match harness.try_launch(probe) {
            Ok(plugin) => {
                assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
                able.push(harness);
            }
            Err(refusal) => {
                assert_eq!((as_, refusal.code), (As::Ordinary, RefusalCode::ControlUnavailable), "{refusal:?}");
                println!("SKIP limits-rootless: {}", refusal.message);
            }
        }
    }
    able
}

/// A launch for which no limit may be lacking.
fn limited(harness: &Harness, limits: Limits, args: &[&str]) -> Launch {
    let mut request = harness.request(args);
    request.allow_degraded.retain(|control| *control == Control::OwnUid);
    request.limits = limits;
    request
}

/// A file of this name in one of the plugin's groups.
fn find(plugin: &Plugin, name: &str) -> Option<PathBuf> {
    plugin.launched.cgroups.iter().map(|group| Path::new(group).join(name)).find(|path| path.exists())
}

fn value(plugin: &Plugin, name: &str) -> String {
    let path = find(plugin, name).unwrap_or_else(|| panic!("no {name} in {:?}", plugin.launched.cgroups));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// The number behind a key.
fn keyed(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or_else(|| panic!("no {key} in {text:?}"))
}

/// What the kernel's files are to say. It counts memory in pages: all that is asked for here is a whole number of the
/// largest ones.
fn assert_in_force(plugin: &Plugin, memory: u64, cpu: u64, pids: u64) {
    let quota = (cpu * 1000).to_string();
    let mut wanted = vec![("pids.max", pids.to_string())];
    if find(plugin, "memory.max").is_some() {
        wanted.extend([
            ("memory.max", memory.to_string()),
            ("memory.high", "max".to_owned()),
            ("memory.swap.max", "0".to_owned()),
            ("memory.oom.group", "1".to_owned()),
            ("cpu.max", format!("{quota} 100000")),
        ]);
    } else {
        wanted.extend([
            ("memory.limit_in_bytes", memory.to_string()),
            ("memory.swappiness", "0".to_owned()),
            ("cpu.cfs_quota_us", quota),
            ("cpu.cfs_period_us", "100000".to_owned()),
        ]);
        // Where the kernel accounts swap.
        if find(plugin, "memory.memsw.limit_in_bytes").is_some() {
            wanted.push(("memory.memsw.limit_in_bytes", memory.to_string()));
        }
    }
    for (file, wanted) in wanted {
        assert_eq!(value(plugin, file), wanted, "{file} of {:?}", plugin.launched.cgroups);
    }
}

#[test]
fn limits_are_in_the_kernels_files_as_they_were_asked_for() {
    for mut harness in with_limits() {
        let limits = |memory, cpu, pids| Limits {
            memory_bytes: Some(memory),
            cpu_percent: Some(cpu),
            pids: Some(pids),
            ..Limits::default()
        };
        let request = limited(&harness, limits(100 << 20, 25, 16), &["pause"]);
        let plugin = harness.launch(request);
        // And one for its init.
        assert_in_force(&plugin, 100 << 20, 25, 17);
        let launch = plugin.launched.launch;
        for (memory, cpu, pids) in [(200 << 20, 150, 40), (50 << 20, 5, 4)] {
            let limits = limits(memory, cpu, pids);
            let reply = harness.ask(&Request::Limits { launch, limits }, &[]).0;
            assert!(matches!(reply, Reply::Limited(_)), "{reply:?}");
            assert_in_force(&plugin, memory, cpu.into(), u64::from(pids) + 1);
        }
    }
}

/// What a plugin has used at a moment in which it waits for its next period.
struct Used {
    at: Instant,
    cpu: Duration,
    periods: u64,
    throttled: u64,
}

impl Used {
    /// Once the plugin was made to wait so often, or this time has come, and it stands still again.
    fn when_throttled(plugin: &Plugin, times: u64, until: Instant) -> Self {
        loop {
            let text = value(plugin, "cpu.stat");
            let (periods, throttled) = (keyed(&text, "nr_periods"), keyed(&text, "nr_throttled"));
            assert!(Instant::now() < until + patience(), "throttled {throttled} times in {periods} periods");
            if throttled >= times || Instant::now() >= until {
                // Counted at the period's end, so that it runs now until it has used the next one's share.
                let (at, cpu) = (Instant::now(), cpu_of(plugin));
                std::thread::sleep(AGAIN * 5);
                if cpu_of(plugin) == cpu {
                    return Self { at, cpu, periods, throttled };
                }
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// The time that all threads of the program had a processor, by the scheduler's own count in nanoseconds.
fn cpu_of(plugin: &Plugin) -> Duration {
    let tasks = format!("/proc/{}/task", plugin.launched.pid);
    let threads = fs::read_dir(&tasks).unwrap_or_else(|error| panic!("{tasks}: {error}"));
    let nanos = threads.map(|thread| {
        let text = fs::read_to_string(thread.expect("a thread").path().join("schedstat")).expect("a thread's count");
        text.split_whitespace().next().and_then(|nanos| nanos.parse::<u64>().ok()).expect("a number")
    });
    Duration::from_nanos(nanos.sum())
}

/// What a plugin got between two moments, in words, and whether it is within three percent of its limit.
fn judged(before: &Used, after: &Used, percent: u32) -> (String, bool) {
    let (cpu, wall) = ((after.cpu - before.cpu).as_secs_f64(), (after.at - before.at).as_secs_f64());
    let (periods, throttled) = (after.periods - before.periods, after.throttled - before.throttled);
    let share = f64::from(percent) / 100.0;
    // A machine that is busy may give less than the limit. In a period in which it was made to wait it had all.
    let had = share * PERIOD.as_secs_f64() * f64::from(u32::try_from(throttled).expect("few"));
    let held = cpu <= 1.03 * share * wall && cpu >= 0.97 * had;
    let got = 100.0 * cpu / wall;
    (format!("{got:.2} % of {wall:.2} s, made to wait in {throttled} of {periods} periods"), held)
}

#[test]
fn a_cpu_limit_holds_within_three_percent() {
    for mut harness in with_limits() {
        for percent in [25, 50] {
            let limits = Limits { cpu_percent: Some(percent), ..Limits::default() };
            // More threads than there are processors: what one cannot use another one can.
            let request = limited(&harness, limits, &["spin", "4"]);
            let plugin = harness.launch(request);
            // What it got before it was limited by its use, such as its start, is not measured.
            let before = Used::when_throttled(&plugin, 3, Instant::now() + PERIOD * 30);
            let mut periods = PERIODS;
            loop {
                // A machine with more to do than it can never lets it have the whole of its share. What then is left to be
                // shown is that it has no more.
                let until = before.at + PERIOD * u32::try_from(2 * periods).expect("few");
                let after = Used::when_throttled(&plugin, before.throttled + periods, until);
                let (told, held) = judged(&before, &after, percent);
                if held || periods == MOST_PERIODS {
                    println!("MEASURED {:?}, CPU limit {percent} %: {told}", harness.as_);
                    assert!(held, "{told} is not within three percent of {percent} %");
                    break;
                }
                periods *= 2;
            }
            harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]);
            harness.exit_of(plugin.launched.launch);
        }
    }
}

/// A launcher that stands still until this is dropped: the groups of what ended meanwhile are still there.
struct Standing<'a>(&'a Harness);

impl<'a> Standing<'a> {
    fn still(harness: &'a Harness) -> Self {
        harness.stop();
        Self(harness)
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::CONT);
    }
}

#[test]
fn a_memory_limit_holds_within_three_percent() {
    // No more: on v2 whoever has nothing to give back is slowed down for some seconds between nine tenths and the limit.
    const LIMIT: u64 = 32 << 20;
    for mut harness in with_limits() {
        let limits = Limits { memory_bytes: Some(LIMIT), ..Limits::default() };
        let request = limited(&harness, limits, &["accept", "eat", "1073741824", "pause"]);
        let hog = harness.launch(request);
        let mut worker = UnixStream::connect(format!("/proc/self/fd/{}", hog.worker.as_raw_fd())).expect("its socket");
        let most = {
            let _standing = Standing::still(&harness);
            worker.write_all(b"go").expect("asks");
            let began = Instant::now();
            assert!(wait_readable(hog.pidfd.as_fd(), Instant::now() + patience()), "it is killed");
            let name = ["memory.peak", "memory.max_usage_in_bytes"].into_iter().find(|name| find(&hog, name).is_some());
            let most = value(&hog, name.expect("the kernel keeps the most that was charged"));
            let took = began.elapsed().as_secs_f64();
            println!("MEASURED {:?}, memory limit {LIMIT}: killed with {most} bytes after {took:.2} s", harness.as_);
            most.parse::<u64>().expect("a number")
        };
        assert!(most <= LIMIT, "{most} bytes is more than {LIMIT}");
        assert!(most >= LIMIT / 100 * 97, "{most} bytes is less than {LIMIT}");
        assert_eq!(harness.exit_of(hog.launched.launch), (Exit::Signal(9), true));
    }
}
