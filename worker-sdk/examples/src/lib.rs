//! Plugins that do real work: `thumbnailer`, `markdown`, and `gallery`, which calls the other two.
//!
//! Each module has the plugin, the generated contract in `v1`, and what its bundle is made of:
//!
//! | in the bundle | comes from |
//! |---|---|
//! | `plugin.json` | `bundles/<name>/plugin.json` of this crate |
//! | `bin/<name>` | `cargo build --package plugvisor-examples --bin <name>` |
//! | `descriptor.binpb` | the module's `DESCRIPTOR_SET`, also printed by `<name> --descriptor-set` |
#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, Write as _},
    process::ExitCode,
};

use plugvisor_worker::{Options, Plugin, serve_with};

/// Compiles and runs the code in the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

pub mod gallery;
pub mod markdown;
pub mod thumbnailer;

/// The `main` of each example: prints the descriptor set when asked for it, else serves the plugin.
pub fn main_of<P: Plugin>(descriptor_set: &[u8], options: Options) -> ExitCode {
    if env::args_os().nth(1).is_some_and(|argument| argument == "--descriptor-set") {
        return match io::stdout().write_all(descriptor_set) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    serve_with::<P>(options)
}
