//! One connection from outside, from its acceptance to its end.

use std::{
    io,
    net::{SocketAddr, TcpStream as StdStream},
    sync::Arc,
};

use plugvisor_core::egress::Origin;
use rustix::net::sockopt;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::{Current, Front, figures::Outcome, inner, pool::Lease};
use crate::{
    config::{ListenConfig, defaults},
    meter::{Activity, Metered},
};

const BUFFER: usize = 16 * 1024;

/// Carries a connection; why it was not carried is told.
pub(super) async fn serve(front: &Front, listen: &ListenConfig, outer: TcpStream, peer: SocketAddr) {
    let open = front.figures.open();
    let outcome = match carry(front, listen, outer).await {
        Ok(outcome) => outcome,
        Err(failure) => {
            front.tell(listen, peer, &failure);
            failure.outcome
        }
    };
    drop(open);
    front.figures.ended(outcome);
}

/// Why a connection was not carried.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) outcome: Outcome,
    pub(super) why: String,
    pub(super) hint: &'static str,
}

impl Failure {
    fn new(outcome: Outcome, why: impl Into<String>, hint: &'static str) -> Self {
        Self { outcome, why: why.into(), hint }
    }
}

async fn carry(front: &Front, listen: &ListenConfig, outer: TcpStream) -> Result<Outcome, Failure> {
    let deadline = Instant::now() + listen.connect_timeout;
    let failed = |error: io::Error| {
        Failure::new(Outcome::Failed, format!("the kernel refused: {error}"), "look at the limits of the host")
    };
    // Whatever ends it, this supervisor's own end too, the other side is told by a reset, so that it does not take what it has
    // for everything; until both sides have ended it in order.
    outer.set_zero_linger().and_then(|()| outer.set_nodelay(true)).map_err(failed)?;
    let (current, lease, mut plugin) = connect(front, listen, deadline).await?;
    let activity = Activity::new();
    let mut outer = Metered::new(
        outer,
        Origin::Outside,
        current.meter.clone(),
        front.figures.traffic_counter(),
        Arc::clone(&activity),
    );
    let outcome = {
        let copying = copy_bidirectional_with_sizes(&mut plugin, &mut outer, BUFFER, BUFFER);
        tokio::pin!(copying);
        let of = |copied: io::Result<(u64, u64)>| if copied.is_ok() { Outcome::Ended } else { Outcome::Broken };
        tokio::select! {
            copied = &mut copying => of(copied),
            () = activity.idle(listen.idle_timeout) => Outcome::Idle,
            // The process has ended, and with it this end of the connection: what it said last is on its way.
            () = current.over.cancelled() => {
                timeout(defaults::INGRESS_SETTLE, &mut copying).await.map_or(Outcome::Cut, of)
            }
        }
    };
    let mut lingers = Ok(());
    let back = if outcome == Outcome::Ended {
        lingers = sockopt::set_socket_linger(outer.stream(), None);
        inner::settle(plugin, defaults::INGRESS_SETTLE).await
    } else {
        inner::reset(plugin)
    };
    match back {
        Ok(socket) => lease.give_back(socket),
        Err(error) => front.lose(&current, lease, &error),
    }
    lingers.map_err(|errno| failed(errno.into()))?;
    Ok(outcome)
}

type Connected = (Arc<Current>, Lease<StdStream>, TcpStream);

/// Connects to the generation that is ready, waiting for one until the deadline.
async fn connect(front: &Front, listen: &ListenConfig, deadline: Instant) -> Result<Connected, Failure> {
    loop {
        let Ok(current) = timeout_at(deadline, front.current()).await else {
            let why = "the plugin was not ready in time";
            return Err(Failure::new(Outcome::NotReady, why, "`plugvisor status` shows what it waits for"));
        };
        let failure = match connect_to(front, &current, listen, deadline).await {
            Ok((lease, plugin)) => return Ok((current, lease, plugin)),
            Err(failure) => failure,
        };
        // A process that has just ended refuses before anybody here has heard of its end.
        let heard = deadline.min(Instant::now() + defaults::INGRESS_END_HEARD);
        let over = failure.outcome == Outcome::Refused && timeout_at(heard, current.over.cancelled()).await.is_ok();
        if !over {
            return Err(failure);
        }
    }
}

async fn connect_to(
    front: &Front,
    current: &Current,
    listen: &ListenConfig,
    deadline: Instant,
) -> Result<(Lease<StdStream>, TcpStream), Failure> {
    let no_socket = || {
        let why = "every socket into the plugin is in use or could not be used again";
        Failure::new(Outcome::NoSocket, why, "`plugvisor restart` gives it new ones")
    };
    let mut lease = timeout_at(deadline, current.pool.take()).await.map_err(|_late| no_socket())?;
    let socket = lease.socket().ok_or_else(no_socket)?;
    let (back, error) = match inner::connect(socket, listen.port, deadline).await {
        Ok(plugin) => return Ok((lease, plugin)),
        Err(failed) => failed,
    };
    match back {
        Ok(socket) => lease.give_back(socket),
        Err(why) => front.lose(current, lease, &why),
    }
    Err(match error.kind() {
        io::ErrorKind::ConnectionRefused => Failure::new(
            Outcome::Refused,
            format!("the plugin does not listen at port {} of its network namespace", listen.port),
            "see its logs; it must listen there, at 127.0.0.1 or 0.0.0.0, before it says that it serves",
        ),
        io::ErrorKind::TimedOut => Failure::new(
            Outcome::NotTaken,
            format!("the plugin did not take it at port {} in time", listen.port),
            "it accepts too slowly, or not at all; see its logs",
        ),
        _ => {
            Failure::new(Outcome::Failed, format!("connecting to it failed: {error}"), "look at the limits of the host")
        }
    })
}
