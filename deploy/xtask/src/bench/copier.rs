//! The floor of any forwarder: bytes from one socket to another and back, unlooked at.

use std::path::Path;

use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

const BUFFER: usize = 64 * 1024;

/// Copies until dropped.
pub(super) async fn copy(listen: &Path, upstream: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(listen)?;
    println!("ready");
    let mut copying = JoinSet::new();
    loop {
        let (mut near, _) = listener.accept().await?;
        let mut far = UnixStream::connect(upstream).await?;
        // A connection that breaks shows at the caller.
        copying.spawn(async move { drop(copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await) });
        while copying.try_join_next().is_some() {}
    }
}
