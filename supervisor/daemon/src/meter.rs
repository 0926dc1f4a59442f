//! A connection of a plugin's with the outside, whose bytes are counted and held to the plugin's bandwidth, in the half of who
//! began it, the plugin or somebody outside.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use plugvisor_core::{
    Time,
    egress::{Bandwidth, Origin},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep, sleep_until},
};

/// What passed between a plugin and the outside, over all its generations.
#[derive(Debug, Default)]
pub struct Traffic {
    out: AtomicU64,
    r#in: AtomicU64,
}

impl Traffic {
    /// Bytes from the plugin.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        self.out.load(Ordering::Relaxed)
    }

    /// Bytes to it.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.r#in.load(Ordering::Relaxed)
    }
}

/// The bandwidth that all connections of a plugin share, those that it makes and those that it takes; each of the two has half
/// when both want it, and all that the other leaves.
#[derive(Debug)]
pub struct Meter {
    bucket: Mutex<Bandwidth>,
    piece: usize,
    began: Instant,
}

impl Meter {
    /// So many bytes per second, both directions together.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        let bucket = Bandwidth::new(rate, Time::ZERO);
        Self { piece: bucket.piece(), bucket: Mutex::new(bucket), began: Instant::now() }
    }

    fn now(&self) -> Time {
        Time::after_start(self.began.elapsed())
    }

    /// Waits until a piece may pass.
    fn poll_ask(&self, origin: Origin, wait: &mut Option<Pin<Box<Sleep>>>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(sleep) = wait {
                ready!(sleep.as_mut().poll(context));
                *wait = None;
            }
            match self.bucket.lock().unwrap_or_else(PoisonError::into_inner).ask(origin, self.now()) {
                Ok(()) => return Poll::Ready(()),
                Err(after) => *wait = Some(Box::pin(sleep(after))),
            }
        }
    }

    fn took(&self, origin: Origin, bytes: u64) {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).took(origin, bytes, self.now());
    }
}

/// When something last passed through a connection.
#[derive(Debug)]
pub(crate) struct Activity {
    began: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
}

impl Activity {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), last: AtomicU64::new(0) })
    }

    fn note(&self) {
        let since = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(since, Ordering::Relaxed);
    }

    /// Ends when nothing has passed for so long.
    pub(crate) async fn idle(&self, limit: Duration) {
        loop {
            let last = self.began + Duration::from_millis(self.last.load(Ordering::Relaxed));
            if last.elapsed() >= limit {
                return;
            }
            sleep_until(last + limit).await;
        }
    }
}

/// The connection with the outside.
#[derive(Debug)]
pub(crate) struct Metered {
    stream: TcpStream,
    origin: Origin,
    meter: Option<Arc<Meter>>,
    traffic: Arc<Traffic>,
    activity: Arc<Activity>,
    reading: Option<Pin<Box<Sleep>>>,
    writing: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    pub(crate) fn new(
        stream: TcpStream,
        origin: Origin,
        meter: Option<Arc<Meter>>,
        traffic: Arc<Traffic>,
        activity: Arc<Activity>,
    ) -> Self {
        Self { stream, origin, meter, traffic, activity, reading: None, writing: None }
    }

    /// What it passes through.
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn passed(&self, bytes: usize) -> u64 {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        if let Some(meter) = &self.meter {
            meter.took(self.origin, bytes);
        }
        self.activity.note();
        bytes
    }
}

impl AsyncRead for Metered {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut most = buffer.remaining();
        if let Some(meter) = &this.meter {
            ready!(meter.poll_ask(this.origin, &mut this.reading, context));
            most = most.min(meter.piece);
        }
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(most));
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut part))?;
        let read = part.filled().len();
        buffer.advance(read);
        let read = this.passed(read);
        this.traffic.r#in.fetch_add(read, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut bytes = bytes;
        if let Some(meter) = &this.meter {
            ready!(meter.poll_ask(this.origin, &mut this.writing, context));
            bytes = &bytes[..bytes.len().min(meter.piece)];
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(context, bytes))?;
        let sent = this.passed(written);
        this.traffic.out.fetch_add(sent, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinSet,
        time::timeout,
    };

    use super::*;

    /// Many who connect from outside, and one connection of the plugin's own, all of which take what they get.
    #[tokio::test(flavor = "multi_thread")]
    async fn those_outside_leave_the_plugin_its_half() {
        const RATE: u64 = 2_000_000;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let meter = Arc::new(Meter::new(RATE));
        let traffic = [Origin::Inside, Origin::Outside].map(|_| Arc::new(Traffic::default()));
        let mut connections = JoinSet::new();
        for origin in [[Origin::Outside; 16].as_slice(), &[Origin::Inside]].concat() {
            let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (traffic, mut far) = (Arc::clone(&traffic[origin as usize]), far.unwrap().0);
            let mut near = Metered::new(near.unwrap(), origin, Some(Arc::clone(&meter)), traffic, Activity::new());
            connections.spawn(async move { while far.write_all(&[7; 64 * 1024]).await.is_ok() {} });
            connections.spawn(async move {
                let mut piece = vec![0; 64 * 1024];
                while near.read(&mut piece).await.is_ok_and(|read| read > 0) {}
            });
        }
        let began = Instant::now();
        let _ = timeout(Duration::from_secs(2), async { while connections.join_next().await.is_some() {} }).await;
        let seconds = began.elapsed().as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let [inside, outside] = traffic.map(|traffic| traffic.bytes_in() as f64 / seconds / RATE as f64);
        assert!(inside + outside <= 1.05, "{inside} and {outside} of the limit");
        // Lower bounds depend on the machine; that the two are alike does not.
        assert!(inside >= 0.4 * (inside + outside), "{inside} and {outside} of the limit");
        assert!(outside >= 0.4 * (inside + outside), "{inside} and {outside} of the limit");
    }
}
