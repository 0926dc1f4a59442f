//! Printing without end.

use std::{
    io::{self, Write as _},
    thread,
};

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Short lines.
    Lines,
    /// One line that never ends.
    OneLine,
}

/// Begins to print on standard output, on a thread of its own, as fast as it is read.
pub(crate) fn begin(shape: Shape) -> anyhow::Result<()> {
    let block = match shape {
        Shape::Lines => b"all work and no play makes a dull log\n".repeat(256),
        Shape::OneLine => vec![b'x'; 8192],
    };
    thread::Builder::new().name("flood".to_owned()).spawn(move || {
        let mut output = io::stdout().lock();
        while output.write_all(&block).is_ok() {}
    })?;
    Ok(())
}
