//! A connection of a plugin's with the outside, whose bytes are counted and held to the plugin's bandwidth. Who began it, the
//! plugin or somebody outside, is not known here.

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

use plugvisor_core::{Time, egress::Bandwidth};
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

/// The bandwidth that all connections of a plugin share, those that it makes and those that it takes.
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
    fn poll_ask(&self, wait: &mut Option<Pin<Box<Sleep>>>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(sleep) = wait {
                ready!(sleep.as_mut().poll(context));
                *wait = None;
            }
            match self.bucket.lock().unwrap_or_else(PoisonError::into_inner).ask(self.now()) {
                Ok(()) => return Poll::Ready(()),
                Err(after) => *wait = Some(Box::pin(sleep(after))),
            }
        }
    }

    fn took(&self, bytes: u64) {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).took(bytes, self.now());
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
    meter: Option<Arc<Meter>>,
    traffic: Arc<Traffic>,
    activity: Arc<Activity>,
    reading: Option<Pin<Box<Sleep>>>,
    writing: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    pub(crate) fn new(
        stream: TcpStream,
        meter: Option<Arc<Meter>>,
        traffic: Arc<Traffic>,
        activity: Arc<Activity>,
    ) -> Self {
        Self { stream, meter, traffic, activity, reading: None, writing: None }
    }

    /// What it passes through.
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn passed(&self, bytes: usize) -> u64 {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        if let Some(meter) = &self.meter {
            meter.took(bytes);
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
            ready!(meter.poll_ask(&mut this.reading, context));
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
            ready!(meter.poll_ask(&mut this.writing, context));
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
