//! The sockets by which one generation of a plugin is connected to: each is free, lent to one connection, or lost. What a
//! socket is, and what is done with it, is not known here.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::Semaphore;

/// All of them.
#[derive(Debug)]
pub(super) struct Pool<S> {
    free: Mutex<Vec<S>>,
    /// As many permits as are free.
    places: Semaphore,
    /// How many there were for it, fit or not.
    all: usize,
    /// Those that were not fit, or did not come back.
    lost: AtomicU64,
    /// The same over all generations.
    lost_of_all: Arc<AtomicU64>,
}

/// How many there are of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// Those that were made for it.
    pub all: u64,
    /// Those that cannot be used again.
    pub lost: u64,
}

impl<S> Pool<S> {
    /// Of `all` sockets these are fit.
    pub(super) fn new(fit: Vec<S>, all: usize, lost_of_all: Arc<AtomicU64>) -> Arc<Self> {
        let places = Semaphore::new(fit.len());
        let lost = all.saturating_sub(fit.len()) as u64;
        lost_of_all.fetch_add(lost, Ordering::Relaxed);
        Arc::new(Self { free: Mutex::new(fit), places, all, lost: AtomicU64::new(lost), lost_of_all })
    }

    pub(super) fn sockets(&self) -> Sockets {
        Sockets { all: self.all as u64, lost: self.lost.load(Ordering::Relaxed) }
    }

    /// Waits for a free one. Whoever waits longest is served first. Cancel-safe.
    pub(super) async fn take(self: &Arc<Self>) -> Lease<S> {
        let place = self.places.acquire().await.expect("the semaphore is never closed");
        place.forget();
        let socket = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        debug_assert!(socket.is_some(), "there is a socket for every permit");
        Lease { pool: Arc::clone(self), lent: true, socket }
    }
}

/// One that is lent. Dropped without having been given back it is lost: nobody knows what it is connected to.
#[derive(Debug)]
pub(super) struct Lease<S> {
    pool: Arc<Pool<S>>,
    lent: bool,
    socket: Option<S>,
}

impl<S> Lease<S> {
    /// The socket, to be used; it is given back by [`Lease::give_back`].
    pub(super) fn socket(&mut self) -> Option<S> {
        self.socket.take()
    }

    /// It is free again.
    pub(super) fn give_back(mut self, socket: S) {
        self.lent = false;
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        self.pool.places.add_permits(1);
    }
}

impl<S> Drop for Lease<S> {
    fn drop(&mut self) {
        if self.lent {
            self.pool.lost.fetch_add(1, Ordering::Relaxed);
            self.pool.lost_of_all.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn pool<S>(sockets: Vec<S>) -> (Arc<Pool<S>>, Arc<AtomicU64>) {
        let lost = Arc::new(AtomicU64::new(0));
        let all = sockets.len();
        (Pool::new(sockets, all, Arc::clone(&lost)), lost)
    }

    #[tokio::test]
    async fn each_is_lent_to_one_at_a_time_and_comes_back() {
        let (pool, lost) = pool(vec![1, 2]);
        let (mut one, mut two) = (pool.take().await, pool.take().await);
        let (first, second) = (one.socket().unwrap(), two.socket().unwrap());
        assert_ne!(first, second);
        assert!(pool.take().now_or_never().is_none(), "both are lent");
        one.give_back(first);
        let mut three = pool.take().now_or_never().expect("one is free");
        assert_eq!(three.socket(), Some(first));
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_is_not_given_back_is_lost_and_nobody_gets_it() {
        let (pool, lost) = pool(vec![1, 2]);
        drop(pool.take().await);
        assert_eq!((lost.load(Ordering::Relaxed), pool.sockets()), (1, Sockets { all: 2, lost: 1 }));
        let mut left = pool.take().await;
        let socket = left.socket().unwrap();
        assert!(pool.take().now_or_never().is_none());
        left.give_back(socket);
        assert!(pool.take().now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_waits_is_served_in_order_and_who_gives_up_takes_nothing() {
        let (pool, lost) = pool(vec![7]);
        let mut lent = pool.take().await;
        let mut early = Box::pin(pool.take());
        let mut late = Box::pin(pool.take());
        assert!((&mut early).now_or_never().is_none() && (&mut late).now_or_never().is_none());
        let socket = lent.socket().unwrap();
        lent.give_back(socket);
        drop(early);
        let mut served = late.now_or_never().expect("the one that gave up left it");
        assert_eq!(served.socket(), Some(7));
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_was_not_fit_is_lost_and_counted_over_all_generations() {
        let lost = Arc::new(AtomicU64::new(3));
        let pool = Pool::new(vec![1], 3, Arc::clone(&lost));
        assert_eq!((lost.load(Ordering::Relaxed), pool.sockets()), (5, Sockets { all: 3, lost: 2 }));
    }

    #[tokio::test]
    async fn without_any_nobody_is_served() {
        assert!(pool::<u8>(Vec::new()).0.take().now_or_never().is_none());
    }
}
