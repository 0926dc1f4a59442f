//! The plugin that misbehaves on request, and the good citizen beside it.
//!
//! Its first argument picks the behaviour (see [`Behaviour`]); once it serves, `HostileService/Act` picks a deed per
//! call. It uses none of the SDK, so that what is tested is the least that a plugin is: a gRPC server on the socket it
//! was given.
#![forbid(unsafe_code)]

mod assault;
mod caller;
mod connection;
mod deed;
mod echo;
mod flood;
mod health;
mod serve;
mod socket;
mod tcp;

use std::process::ExitCode;

use flood::Shape;
use serve::Manners;
use tcp::Tcp;

/// What the process does from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    /// `echo`: serves everything well.
    Echo,
    /// `never-listens`: neither binds nor accepts.
    NeverListens,
    /// `listens-late MS`: begins to serve after this time.
    ListensLate(u64),
    /// `garbage`: answers every connection with bytes that are no HTTP/2.
    Garbage,
    /// `closes`: accepts every connection and closes it.
    Closes,
    /// `exits-at-once CODE`: says why on stderr and ends.
    ExitsAtOnce(u8),
    /// `floods-lines`: serves, and prints lines without end.
    FloodsLines,
    /// `floods-bytes`: serves, and prints one line without end.
    FloodsBytes,
    /// `ignores-sigterm`: serves, and goes on after SIGTERM.
    IgnoresSigterm,
    /// `hangs-in-health`: serves, and never answers a health check.
    HangsInHealth,
    /// `not-serving`: serves, and says NOT_SERVING for ever.
    NotServing,
    /// `serves-tcp PORT HOW`: serves, and TCP too at this port of its network namespace, see [`Tcp`].
    ServesTcp(u16, Tcp),
    /// `probes`: looks for a configuration and for a port to listen at, and serves whatever came of that.
    Probes,
    /// `keeps-calling`: serves, and calls the echo service all the time.
    KeepsCalling,
    /// `orphan`: not a plugin; leaves its session, starts `lingers` and ends.
    Orphan,
    /// `lingers`: not a plugin; waits for ever.
    Lingers,
}

impl Behaviour {
    fn parse(arguments: &[String]) -> Option<Self> {
        let number = || arguments.get(1)?.parse::<u64>().ok();
        Some(match arguments.first()?.as_str() {
            "echo" => Self::Echo,
            "never-listens" => Self::NeverListens,
            "listens-late" => Self::ListensLate(number()?),
            "garbage" => Self::Garbage,
            "closes" => Self::Closes,
            "exits-at-once" => Self::ExitsAtOnce(number()?.try_into().ok()?),
            "floods-lines" => Self::FloodsLines,
            "floods-bytes" => Self::FloodsBytes,
            "ignores-sigterm" => Self::IgnoresSigterm,
            "hangs-in-health" => Self::HangsInHealth,
            "not-serving" => Self::NotServing,
            "serves-tcp" => Self::ServesTcp(number()?.try_into().ok()?, Tcp::parse(arguments.get(2)?)?),
            "probes" => Self::Probes,
            "keeps-calling" => Self::KeepsCalling,
            "orphan" => Self::Orphan,
            "lingers" => Self::Lingers,
            _ => return None,
        })
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(behaviour) = Behaviour::parse(&arguments) else {
        eprintln!("hostile-plugin: no behaviour is called {arguments:?}");
        return ExitCode::from(64);
    };
    let done = match behaviour {
        Behaviour::ExitsAtOnce(code) => {
            eprintln!("hostile-plugin: the flux capacitor is missing");
            return ExitCode::from(code);
        }
        Behaviour::Orphan => deed::orphan(),
        Behaviour::NeverListens | Behaviour::Lingers => serve::wait_for_sigterm(),
        Behaviour::Garbage => connection::garbage(),
        Behaviour::Closes => connection::closes(),
        Behaviour::ListensLate(milliseconds) => {
            std::thread::sleep(std::time::Duration::from_millis(milliseconds));
            serve::serve(Manners::default())
        }
        Behaviour::Echo => serve::serve(Manners::default()),
        Behaviour::FloodsLines => flood::begin(Shape::Lines).and_then(|()| serve::serve(Manners::default())),
        Behaviour::FloodsBytes => flood::begin(Shape::OneLine).and_then(|()| serve::serve(Manners::default())),
        Behaviour::ServesTcp(port, how) => how.begin(port).and_then(|()| serve::serve(Manners::default())),
        Behaviour::Probes => {
            let _ = std::fs::read("/plugvisor/config/settings");
            let _ = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 9090));
            serve::serve(Manners::default())
        }
        Behaviour::KeepsCalling => caller::begin().and_then(|()| serve::serve(Manners::default())),
        Behaviour::IgnoresSigterm => serve::serve(Manners { ignore_sigterm: true, ..Manners::default() }),
        Behaviour::HangsInHealth => serve::serve(Manners { hang_health: true, ..Manners::default() }),
        Behaviour::NotServing => serve::serve(Manners { not_serving: true, ..Manners::default() }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostile-plugin: {error:#}");
            ExitCode::FAILURE
        }
    }
}
