//! What a supervisor does: it connects, asks, is answered and is told.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    protocol::{
        Exit, Hello, LaunchId, Listed, Notice, ReattachState, Reattached, Refusal, RefusalCode, Reply, Request, VERSION,
    },
    seqpacket::{Received, Seqpacket},
};
use rustix::fs::Uid;

use super::{Harness, Plugin, is_root, patience, supervisor_uid, wait_readable};

impl Harness {
    /// Connects as the supervisor's user and says Hello.
    pub fn connect(&mut self) {
        let deadline = Instant::now() + patience();
        loop {
            self.connection = self.knock();
            let hello = codec::encode_request(0, &Request::Hello(Hello { version: VERSION })).expect("encodes");
            // Whoever is turned away may be told so before it has sent anything.
            let _ = self.connection.try_send(&hello, &[]);
            match self.receive(deadline) {
                Some((FromLauncher::Reply { reply: Reply::Hello { version: VERSION, pid }, .. }, _))
                    if pid == self.process.id() =>
                {
                    return;
                }
                // A process that another test forks holds a copy of the last connection until it executes. And where
                // very many are turned away, not everybody is told why.
                Some((
                    FromLauncher::Reply { reply: Reply::Refused(Refusal { code: RefusalCode::Busy, .. }), .. },
                    _,
                ))
                | None
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// A further connection, by the supervisor's user.
    pub fn knock(&self) -> Seqpacket {
        self.knock_as(supervisor_uid())
    }

    /// A further connection, by this user; waits until the launcher listens.
    pub fn knock_as(&self, uid: u32) -> Seqpacket {
        let deadline = Instant::now() + patience();
        loop {
            // The credentials are those of the thread.
            let connected = std::thread::scope(|scope| {
                let connect = scope.spawn(|| {
                    if is_root() {
                        let uid = Uid::from_raw(uid);
                        rustix::thread::set_thread_res_uid(uid, uid, uid).expect("becomes another user");
                    }
                    Seqpacket::connect(&self.path("run/launcher.sock"))
                });
                connect.join().expect("the thread")
            });
            match connected {
                Ok(connection) => return connection,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            // There is no event for a path that comes to be listened at.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As if this supervisor were killed: its connection and what it knows is gone.
    pub fn disconnect(&mut self) {
        let (unused, _) = Seqpacket::pair().expect("a pair");
        self.connection = unused;
        self.notices.clear();
    }

    /// Sends a request and waits for its answer; notices on the way are kept.
    pub fn ask(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        let id = self.send(request, descriptors);
        let deadline = Instant::now() + patience();
        loop {
            match self.receive(deadline).expect("an answer") {
                (FromLauncher::Reply { id: of, reply }, descriptors) if of == id => return (reply, descriptors),
                (FromLauncher::Reply { .. }, _) => {}
                (FromLauncher::Notice(notice), _) => self.notices.push(notice),
            }
        }
    }

    pub fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> u64 {
        self.last += 1;
        let packet = codec::encode_request(self.last, request).expect("encodes");
        self.connection.try_send(&packet, descriptors).expect("sends");
        self.last
    }

    /// The next message; `None` when the launcher closed the connection.
    pub fn receive(&self, deadline: Instant) -> Option<(FromLauncher, Vec<OwnedFd>)> {
        loop {
            match self.connection.try_recv() {
                Ok(Received::Packet(packet)) => {
                    let message = codec::decode_from_launcher(&packet.bytes).expect("decodes");
                    return Some((message, packet.descriptors));
                }
                Ok(Received::Closed) => return None,
                Ok(Received::Truncated(_)) => panic!("a truncated packet"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(wait_readable(self.connection.as_fd(), deadline), "nothing came in time");
                }
                Err(error) => panic!("recv: {error}"),
            }
        }
    }

    /// Waits until a notice matches, now or among those that came before.
    pub fn await_notice<T>(&mut self, mut matches: impl FnMut(&Notice) -> Option<T>) -> T {
        let deadline = Instant::now() + patience();
        loop {
            if let Some(at) = self.notices.iter().position(|notice| matches(notice).is_some()) {
                return matches(&self.notices.remove(at)).expect("it matched");
            }
            if let (FromLauncher::Notice(notice), _) = self.receive(deadline).expect("the launcher lives") {
                self.notices.push(notice);
            }
        }
    }

    pub fn exit_of(&mut self, id: LaunchId) -> (Exit, bool) {
        self.await_notice(|notice| match notice {
            Notice::Exited { launch, exit, oom_killed } if *launch == id => Some((*exit, *oom_killed)),
            _ => None,
        })
    }

    /// Everything that the launcher knows.
    pub fn list(&mut self) -> Listed {
        let mut all: Option<Listed> = None;
        loop {
            let after = all.as_ref().and_then(|all| all.launches.last()).map_or(LaunchId(0), |known| known.launch);
            let Reply::Listed(mut page) = self.ask(&Request::List { after }, &[]).0 else { panic!("not listed") };
            let more = page.more;
            match &mut all {
                None => all = Some(page),
                Some(all) => all.launches.append(&mut page.launches),
            }
            if !more {
                return all.expect("a page");
            }
        }
    }

    /// Takes a launch over: how it is, and what its two streams wrote meanwhile.
    pub fn reattach(&mut self, launch: LaunchId) -> (Reattached, [String; 2], Option<Plugin>) {
        let (reply, mut descriptors) = self.ask(&Request::Reattach { launch }, &[]);
        let Reply::Reattached(reattached) = reply else { panic!("{reply:?}") };
        let ends = descriptors.split_off(2);
        let mut texts = descriptors.into_iter().map(|file| {
            let mut bytes = Vec::new();
            let mut file = File::from(file);
            file.seek(SeekFrom::Start(0)).expect("seek");
            file.read_to_end(&mut bytes).expect("reads");
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let texts = [texts.next().expect("stdout"), texts.next().expect("stderr")];
        assert_eq!([reattached.stdout.bytes, reattached.stderr.bytes], [texts[0].len() as u64, texts[1].len() as u64]);
        let plugin = match &reattached.state {
            ReattachState::Up(launched) => Some(Plugin::of(launched.clone(), ends)),
            ReattachState::Over(_) => {
                assert!(ends.is_empty());
                None
            }
        };
        (reattached, texts, plugin)
    }
}
