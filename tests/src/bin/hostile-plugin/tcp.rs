//! Serving TCP in the plugin's own network namespace, well or badly.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    thread,
};

use anyhow::Context as _;

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tcp {
    /// Lines come back one by one; when the other side has said everything, how much that was.
    Echo,
    /// Nobody accepts them.
    NeverAccepts,
    /// They are closed with what was sent unread, which resets them.
    Resets,
}

impl Tcp {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "echo" => Self::Echo,
            "never-accepts" => Self::NeverAccepts,
            "resets" => Self::Resets,
            _ => return None,
        })
    }

    /// Listens, and serves on threads of its own.
    pub(crate) fn begin(self, port: u16) -> anyhow::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).context("listening for TCP")?;
        thread::spawn(move || match self {
            Self::Echo => {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || {
                        if let Err(error) = echo(&stream) {
                            eprintln!("hostile-plugin: a connection ended: {error}");
                        }
                    });
                }
            }
            Self::Resets => {
                for stream in listener.incoming().flatten() {
                    // Something is there before it is closed.
                    let _ = stream.peek(&mut [0]);
                }
            }
            Self::NeverAccepts => loop {
                thread::park();
                let _ = &listener;
            },
        });
        Ok(())
    }
}

fn echo(stream: &TcpStream) -> io::Result<()> {
    let (mut reader, mut writer, mut all) = (BufReader::new(stream), stream, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        if read == 0 {
            let generation = std::env::var("PLUGVISOR_GENERATION").unwrap_or_default();
            return writeln!(writer, "generation {generation} heard {all} bytes");
        }
        all += read;
        writer.write_all(&line)?;
    }
}
