//! The plugin `markdown`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use plugvisor_examples::{main_of, markdown};
use plugvisor_worker::Options;

fn main() -> ExitCode {
    main_of::<markdown::Markdown>(markdown::DESCRIPTOR_SET, Options::default())
}
