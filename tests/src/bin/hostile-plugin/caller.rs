//! A plugin that calls another one all the time, as the SDK does it, and prints each call that failed.

use std::{thread, time::Duration};

use anyhow::Context;
use plugvisor_client::Client;
use plugvisor_tests::contract::{SayRequest, echo_service_client::EchoServiceClient};
use tonic::Request;

/// Between two calls.
const PACE: Duration = Duration::from_millis(5);
/// How long one call may take: longer than any gap of a test.
const PATIENCE: Duration = Duration::from_secs(30);

/// Begins to call, on a thread of its own.
pub(crate) fn begin() -> anyhow::Result<()> {
    let broker = std::env::var_os("PLUGVISOR_BROKER").context("no PLUGVISOR_BROKER")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("caller".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let mut echo = EchoServiceClient::new(Client::lazy(broker));
            loop {
                let mut request = Request::new(SayRequest { text: "again".to_owned() });
                request.set_timeout(PATIENCE);
                if let Err(status) = echo.say(request).await {
                    println!("failed {:?}", status.code());
                }
                tokio::time::sleep(PACE).await;
            }
        });
    })?;
    Ok(())
}
