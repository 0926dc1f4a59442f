//! The path of a call through plugins, kept in the metadata `plugvisor-hops` as names joined by commas.
//!
//! A plugin hands the value on from the call that it serves to the calls that it makes (the SDKs do). What it hands on
//! is only a claim, and it can only narrow what the broker allows: a forged path gets the forger's own calls refused,
//! and a dropped path is bounded by the deadline, which shrinks with every hop. Providers must not take it as identity.

use plugvisor_package::PluginName;

use super::{Reason, Refusal};

/// The most plugins that one call may pass through on its way, the first caller included.
pub const MAX_HOPS: usize = 8;

/// Checks that `caller`, whose call came with the path `hops`, may call `provider`. Allocates nothing on success.
///
/// # Errors
///
/// [`Reason::Loop`] when `provider` is `caller` or on the path, or the path would be longer than [`MAX_HOPS`];
/// [`Reason::BadRequest`] when `hops` is not a path.
pub fn check_hops(hops: Option<&str>, caller: &PluginName, provider: &PluginName) -> Result<(), Refusal> {
    let path = hops.filter(|path| !path.is_empty()).unwrap_or_default();
    if path.len() > MAX_HOPS * (PluginName::MAX_LEN + 1) {
        return Err(too_many(caller, provider));
    }
    let mut length = 1;
    let mut comes_back = caller == provider;
    for name in path.split(',').filter(|_| !path.is_empty()) {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
            return Err(Refusal::new(
                Reason::BadRequest,
                format!("plugin {caller} sent a metadata value plugvisor-hops that is not a list of plugin names"),
                "pass on the value of the call being served, unchanged, or leave it out",
            ));
        }
        length += 1;
        comes_back |= name == provider.as_str();
    }
    if comes_back {
        let path = if path.is_empty() { String::new() } else { path.replace(',', " -> ") + " -> " };
        return Err(Refusal::new(
            Reason::Loop,
            format!("the call came back to a plugin that is waiting for it: {path}{caller} -> {provider}"),
            "break the circle: one of these plugins must not call the next while it serves this call",
        ));
    }
    if length > MAX_HOPS { Err(too_many(caller, provider)) } else { Ok(()) }
}

/// The value of `plugvisor-hops` that goes on to the provider: the path, and the caller at its end.
#[must_use]
pub fn extend_hops(hops: Option<&str>, caller: &PluginName) -> String {
    match hops {
        Some(path) if !path.is_empty() => format!("{path},{caller}"),
        Some(_) | None => caller.as_str().to_owned(),
    }
}

fn too_many(caller: &PluginName, provider: &PluginName) -> Refusal {
    Refusal::new(
        Reason::Loop,
        format!("the call from {caller} to {provider} would pass through more than {MAX_HOPS} plugins"),
        "shorten the chain of plugins that call one another",
    )
}
