//! The codec is total and exact: any bytes give a message or an error, and every message survives the way.
#![allow(missing_docs, reason = "tests")]

use plugvisor_sandbox::{
    codec::{self, DecodeError, FromLauncher, HEADER_LEN},
    protocol::{
        Approval, Condition, Control, ControlState, DirectoryState, Exit, Grant, Hello, Host, Import, ImportBegin,
        ImportFile, Kept, Known, Lacking, Launch, LaunchId, Launched, Level, Limits, Listed, MAX_PACKET, Notice, Over,
        PolicyFile, ProbeState, Probed, ProbedLevel, ReattachState, Reattached, Refusal, RefusalCode, Reply, Request,
        Stats, Stored, Tier, VERSION,
    },
};
use proptest::prelude::*;

fn launch() -> impl Strategy<Value = Launch> {
    let text = || ".{0,40}";
    let limits = (any::<Option<u64>>(), any::<Option<u32>>(), any::<Option<u32>>(), any::<Option<u64>>()).prop_map(
        |(memory_bytes, cpu_percent, pids, file_size_bytes)| Limits {
            memory_bytes,
            cpu_percent,
            pids,
            file_size_bytes,
            open_files: cpu_percent,
        },
    );
    let lists = (
        prop::sample::subsequence(Control::ALL.to_vec(), 0..=Control::ALL.len()),
        prop::sample::subsequence(Grant::ALL.to_vec(), 0..=Grant::ALL.len()),
        prop::collection::vec((text(), text()), 0..4),
    );
    (text(), any::<u64>(), any::<[u8; 32]>(), limits, lists, any::<bool>()).prop_map(
        |(plugin, generation, bundle, limits, (allow_degraded, grants, environment), strong)| Launch {
            plugin,
            generation,
            level: if strong { Level::Vm } else { Level::Process },
            bundle,
            tier: if strong { Tier::Internal } else { Tier::Untrusted },
            approval: strong.then(|| Approval { tier: Tier::Verified, key: "k".into(), signature: vec![7; 64] }),
            limits,
            grants,
            environment,
            inward: u16::from(strong),
            allow_degraded,
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        any::<u16>().prop_map(|version| Request::Hello(Hello { version })),
        Just(Request::Probe),
        Just(Request::Policy),
        launch().prop_map(|launch| Request::Launch(Box::new(launch))),
        (any::<u64>(), any::<i32>()).prop_map(|(id, signal)| Request::Signal { launch: LaunchId(id), signal }),
        (any::<u64>(), any::<u16>()).prop_map(|(id, from)| Request::Inward { launch: LaunchId(id), from }),
        any::<u64>().prop_map(|id| Request::Kill { launch: LaunchId(id) }),
        any::<u64>().prop_map(|id| Request::Inspect { launch: LaunchId(id) }),
        any::<u64>().prop_map(|id| Request::Freeze { launch: LaunchId(id) }),
        any::<u64>().prop_map(|id| Request::Thaw { launch: LaunchId(id) }),
        (any::<u64>(), any::<Option<u64>>(), any::<Option<u32>>()).prop_map(|(id, memory_bytes, pids)| {
            Request::Limits { launch: LaunchId(id), limits: Limits { memory_bytes, pids, ..Limits::default() } }
        }),
        any::<u64>().prop_map(|id| Request::Stats { launch: LaunchId(id) }),
        any::<u64>().prop_map(|id| Request::List { after: LaunchId(id) }),
        ".{0,40}".prop_map(|name| Request::HoldFd { name }),
        (".{0,40}", any::<bool>()).prop_map(|(name, keep)| Request::TakeFd { name, keep }),
        any::<u64>().prop_map(|id| Request::Reattach { launch: LaunchId(id) }),
        any::<u64>().prop_map(|id| Request::Acknowledge { launch: LaunchId(id) }),
        Just(Request::End),
        any::<[u8; 32]>().prop_map(|bundle| Request::Import(Import::Find { bundle })),
        (any::<[u8; 32]>(), any::<u32>(), any::<u64>())
            .prop_map(|(bundle, files, bytes)| Request::Import(Import::Begin(ImportBegin { bundle, files, bytes }))),
        prop::collection::vec((".{0,40}", any::<bool>(), any::<u64>(), any::<[u8; 32]>()), 0..9).prop_map(|files| {
            let file = |(path, executable, size, sha256)| ImportFile { path, executable, size, sha256 };
            Request::Import(Import::Files(files.into_iter().map(file).collect()))
        }),
        Just(Request::Import(Import::Commit)),
        Just(Request::Import(Import::Abort)),
        any::<[u8; 32]>().prop_map(|bundle| Request::Forget { bundle }),
    ]
}

proptest! {
    #[test]
    fn requests_survive(id in any::<u64>(), request in request()) {
        let packet = codec::encode_request(id, &request).expect("fits");
        prop_assert_eq!(codec::decode_request(&packet), Ok((id, request)));
    }

    #[test]
    fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        drop(codec::decode_request(&bytes));
        drop(codec::decode_from_launcher(&bytes));
    }

    /// Random bytes seldom get past the header; these do.
    #[test]
    fn any_body_is_judged(kind in any::<u16>(), known in 0_usize..6, body in prop::collection::vec(any::<u8>(), 0..600)) {
        let known = [codec::kind::HELLO, codec::kind::LAUNCH, codec::kind::SIGNAL, codec::kind::LAUNCHED,
            codec::kind::PROBE_REPLY, codec::kind::EXITED][known];
        for kind in [kind, known] {
            let mut packet = header(VERSION, kind, 5);
            packet.extend_from_slice(&body);
            drop(codec::decode_request(&packet));
            drop(codec::decode_from_launcher(&packet));
        }
    }

    #[test]
    fn a_changed_or_cut_packet_is_judged(request in request(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut packet = codec::encode_request(1, &request).expect("fits");
        let at = at.index(packet.len());
        prop_assert!(codec::decode_request(&packet[..at]).is_err(), "a prefix is not a message");
        packet[at] = value;
        drop(codec::decode_request(&packet));
    }
}

fn header(version: u16, kind: u16, id: u64) -> Vec<u8> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&id.to_le_bytes());
    assert_eq!(bytes.len(), HEADER_LEN);
    bytes
}

#[test]
fn answers_survive() {
    let refusal = Refusal { code: RefusalCode::Policy, message: "no".into() };
    let state = ControlState {
        control: Control::Seccomp,
        requested: "a".into(),
        enforced: Some("b".into()),
        read_from: "c".into(),
        unavailable: String::new(),
    };
    let lacking = ProbeState::Lacking { why: "w".into(), fix: "f".into() };
    let directory = DirectoryState {
        place: "/plugvisor/data".into(),
        requested: "r".into(),
        enforced: Some("e".into()),
        read_from: "f".into(),
    };
    let launched = Launched {
        launch: LaunchId(3),
        pid: 4,
        uid: 5,
        controls: vec![state.clone()],
        directories: vec![directory],
        cgroups: vec!["/x".into()],
        launch_exec_nanos: 6,
        parts: vec![("tree".to_owned(), 7)],
    };
    let over = Over { exit: Exit::Signal(9), oom_killed: true, ago_nanos: 8 };
    let known = |condition| Known {
        launch: LaunchId(3),
        plugin: "p".into(),
        generation: 4,
        level: Level::Process,
        tier: Tier::Community,
        bundle: [7; 32],
        limits: Limits { pids: Some(4), ..Limits::default() },
        grants: vec![Grant::WriteTemp],
        inward: 3,
        environment: [8; 32],
        allow_degraded: vec![Control::OwnUid],
        age_nanos: 5,
        condition,
    };
    let listed = Listed {
        launches: vec![known(Condition::Up { pid: 1, uid: 2, frozen: true }), known(Condition::Over(over))],
        more: true,
        held: vec!["calls".into()],
        ends_forgotten: 6,
        unattended_nanos: Some(7),
    };
    let missing = Lacking { control: None, why: "not here".into(), fix: "elsewhere".into(), may_be_allowed: false };
    let host = Host {
        controls: vec![Probed { control: Control::OwnUid, state: lacking }],
        levels: vec![ProbedLevel { level: Level::Vm, lacking: vec![missing] }],
    };
    let kept = Kept { bytes: 1, lost: 2 };
    let reattached = |state| Reply::Reattached(Reattached { state, stdout: kept, stderr: Kept::default() });
    let stats = Stats { memory_bytes: Some(1), frozen: Some(false), ..Stats::default() };
    for reply in [
        Reply::Limited(vec![state.clone()]),
        Reply::Stats(stats),
        Reply::Listed(listed),
        Reply::Taken,
        Reply::Inward { all: 9 },
        reattached(ReattachState::Up(launched.clone())),
        reattached(ReattachState::Over(over)),
        Reply::Hello { version: 1, pid: 2 },
        Reply::Probe(host),
        Reply::Policy(PolicyFile::Absent),
        Reply::Policy(PolicyFile::Usable { path: "/p".into() }),
        Reply::Policy(PolicyFile::Unusable { path: "/p".into(), why: "w".into() }),
        Reply::Launched(launched),
        Reply::Done,
        Reply::Inspected(vec![state]),
        Reply::Imported(Some(Stored { tier: Tier::Verified, bytes: 9 })),
        Reply::Imported(None),
        Reply::Refused(refusal),
    ] {
        let packet = codec::encode_reply(9, &reply).expect("fits");
        assert_eq!(codec::decode_from_launcher(&packet), Ok(FromLauncher::Reply { id: 9, reply }));
        assert!(matches!(codec::decode_request(&packet), Err(DecodeError::Kind { id: 9, .. })), "the wrong direction");
    }
    for notice in [
        Notice::Exited { launch: LaunchId(1), exit: Exit::Signal(9), oom_killed: true },
        Notice::OutOfMemory { launch: LaunchId(2) },
    ] {
        let packet = codec::encode_notice(&notice).expect("fits");
        assert_eq!(codec::decode_from_launcher(&packet), Ok(FromLauncher::Notice(notice)));
    }
}

#[test]
fn each_error_is_typed() {
    use codec::kind;
    assert_eq!(codec::decode_request(&[1, 0, 1]), Err(DecodeError::Short { len: 3 }));
    assert_eq!(codec::decode_request(&vec![0; MAX_PACKET + 1]), Err(DecodeError::Long { len: MAX_PACKET + 1 }));
    let next = VERSION + 1;
    assert_eq!(
        codec::decode_request(&header(next, kind::PROBE, 7)),
        Err(DecodeError::Version { id: 7, version: next })
    );
    for reserved in [0, 99, kind::DONE] {
        assert_eq!(
            codec::decode_request(&header(VERSION, reserved, 7)),
            Err(DecodeError::Kind { id: 7, kind: reserved })
        );
    }
    let mut trailing = header(VERSION, kind::PROBE, 7);
    trailing.push(0);
    assert!(matches!(codec::decode_request(&trailing), Err(DecodeError::Body { id: 7, .. })));
    // A length that claims more than the packet holds must not be believed.
    let mut huge = header(VERSION, kind::LAUNCH, 7);
    huge.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]);
    assert!(matches!(codec::decode_request(&huge), Err(DecodeError::Body { .. })));
    let long = "x".repeat(MAX_PACKET);
    let refusal = Reply::Refused(Refusal { code: RefusalCode::Kernel, message: long });
    assert!(matches!(codec::encode_reply(1, &refusal), Err(codec::EncodeError::Long { .. })));
}
