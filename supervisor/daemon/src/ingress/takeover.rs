//! Taking all sockets of a generation from the launcher, in bounded time.
//!
//! A call on a socket waits for whoever is using a copy of it, and that wait cannot be broken off (`lock_sock`): an earlier
//! supervisor that was taken over, and whatever it gave a copy to, may hold one for as long as it likes. It then costs its
//! plugin the sockets, and a thread that nobody waits for.

use std::{net::TcpStream, os::fd::OwnedFd, time::Duration};

use tokio::time::timeout;

use crate::aside::aside;

/// What became of them.
#[derive(Debug, Default)]
pub(super) struct Taken {
    pub(super) fit: Vec<TcpStream>,
    /// Why the first of those is not there that are not.
    pub(super) why: Option<String>,
}

/// Takes each. At the deadline none of them is there: nobody knows which one it waits for.
pub(super) async fn take_all(
    sockets: Vec<OwnedFd>,
    patience: Duration,
    take: impl Fn(OwnedFd) -> Result<TcpStream, String> + Send + 'static,
) -> Taken {
    if sockets.is_empty() {
        return Taken::default();
    }
    let taking = aside("ingress", move || {
        let mut taken = Taken { fit: Vec::with_capacity(sockets.len()), why: None };
        for socket in sockets {
            match take(socket) {
                Ok(socket) => taken.fit.push(socket),
                Err(unfit) => taken.why = taken.why.or(Some(unfit)),
            }
        }
        taken
    });
    let why = match taking {
        Ok(taking) => match timeout(patience, taking).await {
            Ok(Ok(taken)) => return taken,
            Ok(Err(_)) => "taking them over ended in a panic".to_owned(),
            Err(_) => format!(
                "taking them over took longer than {} s: a process that has copies of them, such as an earlier supervisor that \
                 still runs, is holding one; end it",
                patience.as_secs()
            ),
        },
        Err(error) => format!("there is no thread to take them over with: {error}"),
    };
    Taken { fit: Vec::new(), why: Some(why) }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use tokio::task::spawn_blocking;

    use super::*;

    fn sockets(count: usize) -> Vec<OwnedFd> {
        let one =
            || rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
        (0..count).map(|_| one()).collect()
    }

    #[tokio::test]
    async fn what_is_not_fit_is_left_out_and_said() {
        let taken = take_all(sockets(3), Duration::from_secs(60), super::super::inner::take).await;
        assert_eq!((taken.fit.len(), taken.why), (3, None));
        let left = Mutex::new(0);
        let taken = take_all(sockets(3), Duration::from_secs(60), move |socket| {
            let mut left = left.lock().unwrap();
            *left += 1;
            if *left == 1 { Ok(socket.into()) } else { Err(format!("no {left}")) }
        });
        let taken = taken.await;
        assert_eq!((taken.fit.len(), taken.why.as_deref()), (1, Some("no 2")));
        assert_eq!(take_all(Vec::new(), Duration::ZERO, |_| panic!("there is none")).await.why, None);
    }

    /// The runtime has one thread for other work, which is not held, and its end waits for nobody.
    #[test]
    fn one_that_hangs_costs_its_plugin_the_sockets_and_nobody_anything() {
        let (hold, held_up) = mpsc::channel::<()>();
        let held_up = Mutex::new(held_up);
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().max_blocking_threads(1).start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let taken = take_all(sockets(2), Duration::from_secs(5), move |socket| {
                let _ = held_up.lock().unwrap().recv();
                Ok(socket.into())
            });
            let taken = taken.await;
            assert!(taken.fit.is_empty());
            let why = taken.why.unwrap();
            assert!(why.contains("longer than 5 s") && why.contains("an earlier supervisor"), "{why}");
            assert_eq!(spawn_blocking(|| "done").await.unwrap(), "done");
        });
        drop(runtime);
        drop(hold);
    }
}
