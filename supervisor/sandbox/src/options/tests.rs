//! Command lines, written and read.

use std::ffi::OsString;

use super::{
    args::{LISTEN, TRACE, WITHOUT, uid_of},
    *,
};

fn parse(args: &[&str]) -> Result<Options, OptionsError> {
    Options::parse(args.iter().map(OsString::from))
}

#[test]
fn what_is_written_is_read_back() {
    let options = Options {
        uids: 5000..=5999,
        max_plugins: 3,
        spares: 5,
        store: Some("/var/lib/s".into()),
        store_bytes: 5 << 30,
        store_bundles: 7,
        import_time: Duration::from_secs(9),
        policy: Some("/etc/p.toml".into()),
        config_root: Some("/etc/c".into()),
        data_root: Some("/var/d".into()),
        variables: vec![Variable { plugin: "a".parse().expect("a name"), name: "TZ".parse().expect("one") }],
        trace: None,
        ..Options::new(
            9,
            "/run/plugvisor".into(),
            vec![
                BundleRoot { tier: Tier::Verified, path: "/srv/a b=c".into() },
                BundleRoot { tier: Tier::Internal, path: "/opt/plugins".into() },
            ],
        )
    };
    assert_eq!(Options::parse(options.to_args()), Ok(options.clone()));
    let traced = Options { trace: Some(10), ..options.clone() };
    assert_eq!(Options::parse(traced.to_args()), Ok(traced));
    for linger in [Linger::For(Duration::ZERO), Linger::For(Duration::from_secs(30)), Linger::Forever] {
        for first in [None, Some(9)] {
            let listen = Listen { path: "/run/plugvisor/launcher.sock".into(), first, uid: 990, linger };
            let options = Options { supervisor: Supervisor::Listen(listen), ..options.clone() };
            assert_eq!(Options::parse(options.to_args()), Ok(options));
        }
    }
}

#[test]
fn a_user_is_found_by_its_whole_name() {
    let users = "root:x:0:0:root:/root:/bin/sh\nplug:x:7:7::/:\nplugvisor:x:998:997:a b:/:/usr/sbin/nologin\nbad\n";
    assert_eq!(uid_of("plugvisor", users), Some(998));
    assert_eq!(uid_of("plug", users), Some(7));
    assert_eq!(uid_of("plugv", users), None);
    assert_eq!(uid_of("bad", users), None);
}

#[test]
fn only_a_build_for_development_leaves_a_wall_out() {
    let base = ["--socket-fd", "3", "--cgroup-root", "p", "--runtime-directory", "/run/p", "--without", "seccomp"];
    let args = || base.iter().map(OsString::from);
    assert_eq!(Options::parse_in(args(), false), Err(OptionsError::Unknown(WITHOUT.to_owned())));
    let options = Options::parse_in(args(), true).expect("parses");
    assert_eq!(options.without, [Control::Seccomp]);
    assert_eq!(Options::parse_in(options.to_args(), true), Ok(options));
    assert_eq!(Options::parse(args()).is_ok(), cfg!(debug_assertions));
    let unknown = base[..7].iter().chain(&["doors"]).map(OsString::from);
    assert!(matches!(Options::parse_in(unknown, true), Err(OptionsError::Value { .. })));
}

#[test]
fn a_launcher_that_listens_traces_nothing() {
    let listening = ["--listen", "/run/l", "--supervisor-uid", "5", "--cgroup-root", "p", "--runtime-directory", "/r"];
    assert!(parse(&listening).is_ok());
    let traced: Vec<&str> = listening.iter().copied().chain(["--trace-fd", "4"]).collect();
    assert_eq!(parse(&traced), Err(OptionsError::Beside(TRACE, LISTEN)));
    let first: Vec<&str> = traced.iter().copied().chain(["--socket-fd", "3"]).collect();
    assert_eq!(parse(&first), Err(OptionsError::Beside(TRACE, LISTEN)));
}

#[test]
fn each_wrong_flag_is_named() {
    let base = ["--socket-fd", "3", "--cgroup-root", "p", "--runtime-directory", "/run/p"];
    assert!(parse(&base).is_ok());
    for (extra, named) in [
        (["--uid-range", "0-5"], "--uid-range"),
        (["--uid-range", "9-5"], "--uid-range"),
        (["--uid-range", "60000-70000"], "--uid-range"),
        (["--max-plugins", "0"], "--max-plugins"),
        (["--spares", "17"], "--spares"),
        (["--bundle-root", "/srv"], "--bundle-root"),
        (["--bundle-root", "root=/srv"], "--bundle-root"),
        (["--bundle-root", "verified=relative"], "--bundle-root"),
        (["--bundle-root", "verified=/a/../b"], "--bundle-root"),
        (["--store", "relative"], "--store"),
        (["--store-bytes", "0"], "--store-bytes"),
        (["--store-bundles", "-1"], "--store-bundles"),
        (["--import-seconds", "soon"], "--import-seconds"),
        (["--policy", "p.toml"], "--policy"),
        (["--config-root", "c"], "--config-root"),
        (["--data-root", "/a/../b"], "--data-root"),
        (["--env", "TZ"], "--env"),
        (["--env", "A=TZ"], "--env"),
        (["--env", "a=LD_PRELOAD"], "--env"),
        (["--socket-fd", "4"], "--socket-fd"),
        (["--trace-fd", "3"], "--trace-fd"),
        (["--trace-fd", "2"], "--trace-fd"),
        (["--verbose", "1"], "--verbose"),
        (["--listen", "/run/p/launcher.sock"], "--supervisor-uid"),
        (["--supervisor-uid", "5"], "--supervisor-uid"),
        (["--linger", "5"], "--linger"),
    ] {
        let args: Vec<&str> = base.iter().copied().chain(extra).collect();
        let error = parse(&args).expect_err(extra[1]).to_string();
        assert!(error.contains(named), "{error}");
    }
    for group in ["", "..", "a/b", "a b"] {
        assert!(parse(&["--socket-fd", "3", "--cgroup-root", group, "--runtime-directory", "/r"]).is_err());
    }
    assert_eq!(parse(&["--socket-fd"]), Err(OptionsError::NoValue("--socket-fd")));
    assert_eq!(parse(&base[2..]), Err(OptionsError::Missing("--socket-fd or --listen")));
    let listen = ["--listen", "/run/l", "--cgroup-root", "p", "--runtime-directory", "/run/p"];
    assert_eq!(parse(&listen), Err(OptionsError::Missing("--supervisor-uid")));
    for (extra, named) in [
        (["--supervisor-uid", "65534"], "--supervisor-uid"),
        (["--supervisor-uid", "-1"], "--supervisor-uid"),
        (["--supervisor-uid", "no:such:user"], "--supervisor-uid"),
        (["--linger", "-1"], "--linger"),
        (["--linger", "always"], "--linger"),
        (["--listen", "relative"], "--listen"),
    ] {
        let args: Vec<&str> = base[2..].iter().copied().chain(extra).collect();
        let error = parse(&args).expect_err(extra[1]).to_string();
        assert!(error.contains(named), "{error}");
    }
}
