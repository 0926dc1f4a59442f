//! How many plugins start at once, and who comes next.
//!
//! A start takes a place before it reads its bundle and gives it back when it is loaded or has failed. Waiting for
//! dependencies takes none, so that places never wait for one another. Who waits is served by `loadOrder`, then in the
//! order of coming.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// The places. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Starts(Arc<Mutex<Places>>);

#[derive(Debug)]
struct Places {
    free: usize,
    held_back: bool,
    came: u64,
    waiting: BTreeMap<(i32, u64), oneshot::Sender<Place>>,
}

/// A place. Dropping it lets the next one start.
#[derive(Debug)]
pub struct Place(Option<Starts>);

/// While this lives nobody is given a place, so that those who come meanwhile are served in their order.
#[derive(Debug)]
pub struct HeldBack(Starts);

impl Starts {
    /// As many places, but at least one.
    #[must_use]
    pub fn new(places: u32) -> Self {
        let free = usize::try_from(places.max(1)).unwrap_or(usize::MAX);
        Self(Arc::new(Mutex::new(Places { free, held_back: false, came: 0, waiting: BTreeMap::new() })))
    }

    /// Waits for a place. Cancel-safe: a place that came too late is given to the next.
    pub async fn place(&self, load_order: i32) -> Place {
        let waiting = {
            let mut places = self.places();
            if places.free > 0 && !places.held_back && places.waiting.is_empty() {
                places.free -= 1;
                return Place(Some(self.clone()));
            }
            let (sender, receiver) = oneshot::channel();
            places.came += 1;
            let came = places.came;
            places.waiting.insert((load_order, came), sender);
            receiver
        };
        // The other end is in the list until it is served.
        waiting.await.unwrap_or(Place(None))
    }

    /// Gives no place until the answer is dropped.
    #[must_use]
    pub fn hold_back(&self) -> HeldBack {
        self.places().held_back = true;
        HeldBack(self.clone())
    }

    fn give(&self) {
        loop {
            let next = {
                let mut places = self.places();
                if places.held_back || places.free == 0 {
                    return;
                }
                let Some((_, next)) = places.waiting.pop_first() else { return };
                places.free -= 1;
                next
            };
            if let Err(mut place) = next.send(Place(Some(self.clone()))) {
                // It no longer waits.
                mem::take(&mut place.0);
                self.places().free += 1;
            }
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(starts) = self.0.take() {
            starts.places().free += 1;
            starts.give();
        }
    }
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.0.places().held_back = false;
        self.0.give();
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, task::Poll};

    use super::*;

    /// Whether the future is over already.
    async fn polled<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            Poll::Ready(match pin!(&mut *future).poll(context) {
                Poll::Ready(output) => Some(output),
                Poll::Pending => None,
            })
        })
        .await
    }

    #[tokio::test]
    async fn no_more_than_there_are_places_and_by_load_order() {
        let starts = Starts::new(2);
        let held_back = starts.hold_back();
        let mut waiting: Vec<_> = [0, 5, -1, 0].map(|order| Box::pin(starts.place(order))).into();
        for place in &mut waiting {
            assert!(polled(place).await.is_none());
        }
        drop(held_back);
        let lowest = polled(&mut waiting[2]).await.expect("the lowest loadOrder comes first");
        let first = polled(&mut waiting[0]).await.expect("then who came first");
        assert!(polled(&mut waiting[3]).await.is_none() && polled(&mut waiting[1]).await.is_none());
        drop(first);
        let third = polled(&mut waiting[3]).await.expect("the place is given on");
        assert!(polled(&mut waiting[1]).await.is_none());
        drop((lowest, third));
        polled(&mut waiting[1]).await.expect("the last one");
    }

    #[tokio::test]
    async fn who_no_longer_waits_takes_no_place() {
        let starts = Starts::new(1);
        let place = starts.place(0).await;
        let mut gone = Box::pin(starts.place(-1));
        let mut served = Box::pin(starts.place(0));
        let mut patient = Box::pin(starts.place(1));
        for waiting in [&mut gone, &mut served, &mut patient] {
            assert!(polled(waiting).await.is_none());
        }
        drop(gone);
        drop(place);
        // The place has been sent and not taken yet.
        drop(served);
        polled(&mut patient).await.expect("the place went on to who still waits");
    }
}
