//! What a plugin can do to the broker through its own socket, below HTTP/2: all of it at once, from inside the walls.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::Context as _;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// What is written of a flood, in bytes; each ends sooner when the broker closes.
const FLOOD: usize = 4 << 20;

/// A flood that is no longer taken is over: the broker neither reads on nor has it closed yet.
const STUCK: Duration = Duration::from_secs(1);

/// Attacks in several ways at once, on a connection each; how many of them there were.
pub(crate) fn assault() -> anyhow::Result<usize> {
    let socket = PathBuf::from(std::env::var_os("PLUGVISOR_BROKER").context("no PLUGVISOR_BROKER")?);
    let ways: [(Vec<u8>, Vec<u8>); 7] = [
        (vec![], b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n".to_vec()),
        (vec![], vec![0xa5; 4096]),
        // Pings whose answers nobody reads.
        (PREFACE.to_vec(), frame(6, 0, 0, &[7; 8])),
        // A head that never ends.
        (head(0), frame(9, 0, 1, &[0, 1, b'a', 1, b'b'])),
        // Calls taken back as soon as they are made.
        (PREFACE.to_vec(), taken_back()),
        // A field of the table, named four thousand times.
        (head(0), [frame(9, 0, 1, &bomb()), frame(9, 4, 1, &[0xbe; 4000])].concat()),
        // Empty pieces of a message that never comes.
        (head(4), frame(0, 0, 1, &[])),
    ];
    let attacks: Vec<_> = ways
        .into_iter()
        .map(|(before, again)| {
            let socket = socket.clone();
            thread::spawn(move || attack(&socket, &before, &again))
        })
        .collect();
    let count = attacks.len();
    for attack in attacks {
        // That the broker closed in the middle is what is expected of it.
        attack.join().map_err(|_| anyhow::anyhow!("an attack panicked"))??;
    }
    Ok(count)
}

fn attack(socket: &std::path::Path, before: &[u8], again: &[u8]) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).context("the broker's socket")?;
    stream.set_write_timeout(Some(STUCK))?;
    stream.set_read_timeout(Some(STUCK))?;
    let batch = again.repeat((16 * 1024 / again.len()).max(1));
    if stream.write_all(before).is_ok() {
        let mut left = FLOOD;
        while left > 0 && stream.write_all(&batch).is_ok() {
            left = left.saturating_sub(batch.len());
        }
    }
    // Whatever it answered, to its end or for a moment.
    let mut answer = [0; 4096];
    while stream.read(&mut answer).is_ok_and(|count| count > 0) {}
    Ok(())
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or_default().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn fields() -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", "/plugvisor.test.v1.EchoService/Collect"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        // A literal without indexing; its name and its value, each after its length.
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap_or_default());
            block.extend(text.as_bytes());
        }
    }
    block
}

/// The beginning of a connection and of a call on it.
fn head(flags: u8) -> Vec<u8> {
    [PREFACE, &frame(1, flags, 1, &fields())].concat()
}

fn bomb() -> Vec<u8> {
    // A literal with a value of 127 + 3873 bytes, for the table.
    let value = vec![b'x'; 4000];
    [&[0x40, 4][..], b"bomb", &[127, 0xa1, 0x1e], &value].concat()
}

fn taken_back() -> Vec<u8> {
    let fields = fields();
    (0..200_u32)
        .flat_map(|call| [frame(1, 4, 2 * call + 1, &fields), frame(3, 0, 2 * call + 1, &[0, 0, 0, 8])].concat())
        .collect()
}
