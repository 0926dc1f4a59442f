//! How often what happens to a plugin's connections becomes an event: whoever makes it happen must not be able to fill the
//! log. What was not told is counted, and told with the next one.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use crate::bucket::{Bucket, Rate};

/// Of one kind of event of one plugin.
const RATE: Rate = Rate { per_second: 1, burst: 10 };

/// What was told.
#[derive(Debug)]
pub(crate) struct Told(Mutex<State>);

#[derive(Debug)]
struct State {
    left: Bucket,
    /// Those since the last event.
    untold: u64,
}

impl Told {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State { left: Bucket::new(RATE, Instant::now()), untold: 0 }))
    }

    /// Whether to tell of what has just happened: then how many more there were since the last event.
    pub(crate) fn tell(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.left.take(1, Instant::now()) {
            state.untold += 1;
            return None;
        }
        Some(std::mem::take(&mut state.untold))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_not_told_is_counted_in_the_next_one() {
        let told = Told::new();
        assert_eq!((0..15).map(|_| told.tell()).collect::<Vec<_>>(), [[Some(0); 10].as_slice(), &[None; 5]].concat());
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!([told.tell(), told.tell(), told.tell()], [Some(5), Some(0), None]);
    }
}
