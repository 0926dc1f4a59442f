//! The least that is a plugin: the standard health service on the socket that it binds itself. For the daemon's tests.
//!
//! `crash` as its argument makes it end at once, `hang` makes it listen and never answer.
#![forbid(unsafe_code)]

use std::error::Error;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve())
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let how = std::env::args().nth(1);
    if how.as_deref() == Some("crash") {
        eprintln!("this plugin crashes on purpose");
        std::process::exit(3);
    }
    let path = std::env::var_os("PLUGVISOR_LISTEN").ok_or("PLUGVISOR_LISTEN is not set")?;
    let listener = UnixListener::bind(path)?;
    println!("listening");
    if how.as_deref() == Some("hang") {
        std::future::pending::<()>().await;
    }
    let (_reporter, health) = tonic_health::server::health_reporter();
    tonic::transport::Server::builder()
        .add_service(health)
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}
