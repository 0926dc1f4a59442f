//! Standard output in the form that was asked for.

use std::io::{self, IsTerminal, Write};

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::args::{Format, Global};
use crate::failure::{Failure, Outcome};
use crate::text::{Line, Style, clean_json};

/// Writes lines and JSON to standard output.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) format: Format,
    colour: bool,
    contracts: DescriptorPool,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        let contracts = DescriptorPool::decode(plugvisor_proto::FILE_DESCRIPTOR_SET).map_err(|error| {
            Failure::new(Outcome::Failed, format!("the contracts in this program are broken: {error}"), "reinstall it")
        })?;
        Ok(Self {
            format: global.output,
            colour: colour_wanted(global.no_color, io::stdout().is_terminal()),
            contracts,
        })
    }

    /// Prints one line.
    pub(crate) fn line(&self, line: &Line) -> Result<(), Failure> {
        self.write(&line.render(self.colour))
    }

    /// Prints lines of our own, such as a table's.
    pub(crate) fn lines(&self, lines: &[Line]) -> Result<(), Failure> {
        lines.iter().try_for_each(|line| self.line(line))
    }

    /// Prints a title above a section.
    pub(crate) fn title(&self, title: &str) -> Result<(), Failure> {
        self.line(&Line::default())?;
        self.line(&Line::default().add(Style::Title, title))
    }

    /// Prints a JSON document: over several lines for `json`, on one line otherwise.
    pub(crate) fn json(&self, value: &serde_json::Value) -> Result<(), Failure> {
        let text = if self.format == Format::Jsonl { value.to_string() } else { format!("{value:#}") };
        self.write(&clean_json(&text))
    }

    /// Prints JSON on one line whatever the format, for members of a stream.
    pub(crate) fn json_line(&self, value: &serde_json::Value) -> Result<(), Failure> {
        self.write(&clean_json(&value.to_string()))
    }

    /// One of our contracts' messages as JSON: the fields' names as in the `.proto` file, fields with default values
    /// too, 64-bit numbers as numbers.
    pub(crate) fn to_json<M: Message>(&self, name: &str, message: &M) -> Result<serde_json::Value, Failure> {
        let broken = |error: &dyn std::fmt::Display| {
            Failure::new(
                Outcome::Failed,
                format!("cannot show {name} as JSON: {error}"),
                "use -o table, and report this",
            )
        };
        let descriptor =
            self.contracts.get_message_by_name(name).ok_or_else(|| broken(&"it is not in the contracts"))?;
        let message =
            DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).map_err(|error| broken(&error))?;
        message
            .serialize_with_options(serde_json::value::Serializer, &json_options().use_proto_field_name(true))
            .map_err(|error| broken(&error))
    }

    /// Prints bytes of our own as they are.
    pub(crate) fn script(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        Self::written(out.write_all(bytes).and_then(|()| out.flush()))
    }

    fn write(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        Self::written(writeln!(out, "{text}").and_then(|()| out.flush()))
    }

    fn written(result: io::Result<()>) -> Result<(), Failure> {
        result.map_err(|error| match error.kind() {
            // The reader, such as `head`, has seen enough.
            io::ErrorKind::BrokenPipe => Failure::silent(Outcome::ReaderGone),
            _ => Failure::new(Outcome::Failed, format!("cannot write to standard output: {error}"), ""),
        })
    }
}

/// How messages become JSON everywhere in this program.
pub(crate) fn json_options() -> SerializeOptions {
    SerializeOptions::new().skip_default_fields(false).stringify_64_bit_integers(false)
}

/// Colours are for terminals, unless the user says no (<https://no-color.org>).
pub(crate) fn colour_wanted(no_color: bool, terminal: bool) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    terminal && !no_color && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}
