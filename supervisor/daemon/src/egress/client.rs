//! The plugin's side of a connection: heads read strictly and in bounded time, what was read too much kept for what follows.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use plugvisor_core::egress::head_end;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use super::{EgressLimits, refusal::Refusal};

/// After a refusal, what still comes is read and dropped for so long and so much: a connection that is closed with something
/// unread is reset, and the answer may be lost with it.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 4 << 20;

/// Both directions.
pub(super) struct Client {
    pub(super) reader: Reader,
    pub(super) writer: OwnedWriteHalf,
}

/// What the plugin says.
pub(super) struct Reader {
    half: OwnedReadHalf,
    /// Read and not used yet.
    ahead: BytesMut,
}

/// Why there is no head.
pub(super) enum NoHead {
    /// The plugin closed the connection, or rested for too long.
    Over,
    Refused(Refusal),
}

impl Client {
    pub(super) fn new(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        let (half, writer) = stream.into_split();
        Self { reader: Reader { half, ahead: BytesMut::new() }, writer }
    }

    /// Answers with a refusal and closes.
    pub(super) async fn refuse(self, refusal: &Refusal, head_only: bool) {
        self.answer(&refusal.to_bytes(head_only)).await;
    }

    /// Answers with these bytes and closes.
    pub(super) async fn answer(mut self, bytes: &[u8]) {
        let answered = async {
            self.writer.write_all(bytes).await?;
            self.writer.shutdown().await?;
            let mut sink = [0; 4096];
            let mut left = LINGER_BYTES;
            while left > 0 {
                let read = self.reader.half.read(&mut sink).await?;
                if read == 0 {
                    break;
                }
                left = left.saturating_sub(read);
            }
            Ok::<(), io::Error>(())
        };
        // Whoever does not take the answer does not get it.
        let _ = timeout(LINGER, answered).await;
    }
}

impl Reader {
    /// The next head. The first one may take no longer than any head does; later ones wait for the rest first.
    pub(super) async fn head(&mut self, limits: &EgressLimits, first: bool) -> Result<Bytes, NoHead> {
        if !first && self.ahead.is_empty() {
            match timeout(limits.rest, self.fill()).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) | Err(_) => return Err(NoHead::Over),
            }
        }
        let whole = async {
            loop {
                match head_end(&self.ahead, limits.head) {
                    Ok(Some(end)) => return Ok(self.ahead.split_to(end).freeze()),
                    Ok(None) => {}
                    Err(error) => return Err(NoHead::Refused(Refusal::head(error))),
                }
                // Looked at again only when a line has ended, of which there are few: not for every byte of a slow sender.
                loop {
                    let before = self.ahead.len();
                    if !matches!(self.fill().await, Ok(1..)) {
                        return Err(NoHead::Over);
                    }
                    if self.ahead.len() >= limits.head.bytes || self.ahead[before..].contains(&b'\n') {
                        break;
                    }
                }
            }
        };
        match timeout(limits.head_time, whole).await {
            Ok(head) => head,
            Err(_late) => Err(NoHead::Refused(Refusal::head_late(limits.head_time))),
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.ahead.reserve(4096);
        self.half.read_buf(&mut self.ahead).await
    }

    /// Some of a body's next bytes, at most so many.
    pub(super) async fn some(&mut self, most: u64) -> io::Result<Bytes> {
        if self.ahead.is_empty() && self.fill().await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(self.ahead.len());
        Ok(self.ahead.split_to(length).freeze())
    }

    /// A line that ends in CR LF, without these, of at most so many bytes; `None` when it is another.
    pub(super) async fn line(&mut self, most: usize) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(end) = self.ahead.iter().position(|byte| *byte == b'\n') {
                let line = self.ahead.split_to(end + 1).freeze();
                let line = line.strip_suffix(b"\r\n").map(|text| line.slice_ref(text));
                return Ok(line.filter(|line| line.len() <= most && !line.contains(&b'\r')));
            }
            // Its CR may be there without its LF.
            if self.ahead.len() > most.saturating_add(1) {
                return Ok(None);
            }
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_empty() {
            return Pin::new(&mut this.half).poll_read(context, buffer);
        }
        let length = this.ahead.len().min(buffer.remaining());
        buffer.put_slice(&this.ahead[..length]);
        this.ahead.advance(length);
        Poll::Ready(Ok(()))
    }
}
