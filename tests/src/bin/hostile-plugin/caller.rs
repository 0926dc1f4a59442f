//! A plugin that calls another one all the time, as the SDK does it, and prints each call that failed, and the first one
//! after it that was answered.

use std::{thread, time::Duration};

use anyhow::Context;
use plugvisor_client::Client;
use plugvisor_tests::contract::{SayRequest, echo_service_client::EchoServiceClient};
use tonic::Request;

/// Between two calls.
const PACE: Duration = Duration::from_millis(5);
/// How long one call may take: longer than any gap of a test, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Begins to call, on a thread of its own.
pub(crate) fn begin() -> anyhow::Result<()> {
    let broker = std::env::var_os("PLUGVISOR_BROKER").context("no PLUGVISOR_BROKER")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("caller".to_owned()).spawn(move || {
        runtime.block_on(async move {
            let mut echo = EchoServiceClient::new(Client::lazy(broker));
            let mut answered = false;
            loop {
                let mut request = Request::new(SayRequest { text: "again".to_owned() });
                request.set_timeout(PATIENCE);
                let said = echo.say(request).await;
                match &said {
                    Err(status) => println!("failed {:?}", status.code()),
                    // Whoever reads this line has every earlier one too.
                    Ok(_) if !answered => println!("answered"),
                    Ok(_) => {}
                }
                answered = said.is_ok();
                tokio::time::sleep(PACE).await;
            }
        });
    })?;
    Ok(())
}
