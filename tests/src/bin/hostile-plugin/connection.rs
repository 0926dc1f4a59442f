//! Connections that misbehave below HTTP/2.

use std::{
    io::{self, Write as _},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tonic::transport::server::Connected;

use crate::socket;

/// Writes bytes that are no HTTP/2 on every connection, until the peer has had enough.
pub(crate) fn garbage() -> anyhow::Result<()> {
    // The high bit makes the frame's length, type and stream nonsense whatever the peer takes them for.
    let block: Vec<u8> = (0..=u8::MAX).cycle().map(|byte| byte ^ 0xA5).take(16 * 1024).collect();
    for stream in socket::listener()?.incoming() {
        let (mut stream, block) = (stream?, block.clone());
        thread::spawn(move || while stream.write_all(&block).is_ok() {});
    }
    Ok(())
}

/// Accepts every connection and closes it at once.
pub(crate) fn closes() -> anyhow::Result<()> {
    for stream in socket::listener()?.incoming() {
        drop(stream?);
    }
    Ok(())
}

/// Closes, when told, every connection that is open at that moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scissors(Arc<AtomicU64>);

impl Scissors {
    /// Every connection so far fails at its next read or write.
    pub(crate) fn cut(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// A connection that can be cut.
    pub(crate) fn around(&self, stream: UnixStream) -> Cuttable {
        Cuttable { stream, scissors: self.clone(), born: self.0.load(Ordering::SeqCst) }
    }
}

/// A connection that ends when its scissors are used.
#[derive(Debug)]
pub(crate) struct Cuttable {
    stream: UnixStream,
    scissors: Scissors,
    born: u64,
}

impl Cuttable {
    fn intact(&self) -> io::Result<()> {
        let cut = self.scissors.0.load(Ordering::SeqCst) != self.born;
        if cut { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl Connected for Cuttable {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Cuttable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.intact()?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Cuttable {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.intact()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.intact()?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
