//! The targets, and the bounds that all of them are held to.

mod bundle;
mod configuration;
mod http2;
mod launcher;
mod link;
mod manifest;
mod request;

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// What reads strangers' bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// Packets between supervisor and launcher, in both directions.
    Launcher,
    /// `plugin.json`.
    Manifest,
    /// `plugvisor.toml`.
    Configuration,
    /// A bundle's directory, described by lines.
    Bundle,
    /// The head of a request to the egress proxy.
    Request,
    /// What a peer of the broker writes, as a caller or as a provider.
    Http2,
    /// What a guest says to its host, and a host to its guest.
    Link,
}

/// What an input led to, without its particulars: two inputs with the same shape went the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape(u64);

impl Shape {
    /// The shape of an outcome that was said in words: numbers, and what stands in quotes, are the input's.
    fn of(outcome: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        let mut quoted = false;
        for byte in outcome.bytes() {
            if matches!(byte, b'"' | b'`') {
                quoted = !quoted;
            } else if !quoted && !byte.is_ascii_digit() {
                byte.hash(&mut hasher);
            }
        }
        Self(hasher.finish())
    }
}

/// The processor time that one input may take. Debug builds of all targets take a hundredth of it.
const TIME: Duration = Duration::from_secs(4);

impl Target {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Launcher, Self::Manifest, Self::Configuration, Self::Bundle, Self::Request, Self::Http2, Self::Link];

    /// Its name on the command line and its corpus' directory.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Launcher => "launcher",
            Self::Manifest => "manifest",
            Self::Configuration => "configuration",
            Self::Bundle => "bundle",
            Self::Request => "request",
            Self::Http2 => "http2",
            Self::Link => "link",
        }
    }

    /// The longest input that is tried; longer ones are cut.
    #[must_use]
    pub const fn longest(self) -> usize {
        match self {
            // A little more than a packet may be.
            Self::Launcher => plugvisor_sandbox::protocol::MAX_PACKET + 16,
            // With some frames of the largest size among them.
            Self::Manifest | Self::Configuration | Self::Http2 | Self::Link => 48 * 1024,
            Self::Bundle => 8 * 1024,
            // A little more than a head may have.
            Self::Request => 20 * 1024,
        }
    }

    /// How many bytes may be allocated at once for an input of this length.
    const fn memory(self, length: usize) -> u64 {
        let length = length as u64;
        match self {
            // The fields are read where they lie.
            Self::Request => 64 * 1024 + 8 * length,
            // What decodes is at most a few times what came in.
            Self::Launcher => 256 * 1024 + 64 * length,
            // A value of JSON or TOML costs some hundred bytes, and can be written with two.
            Self::Manifest | Self::Configuration => (4 << 20) + 512 * length,
            // The buffers of the walk, and the manifest and descriptors as their limits allow.
            Self::Bundle => 16 << 20,
            // One frame lies where it came; written again it is one of the largest.
            Self::Link => 64 * 1024,
            // Windows, tables and what waits to be written are bounded whatever comes in.
            Self::Http2 => 1 << 20,
        }
    }

    /// Inputs beside the corpus' files, made by what the corpus refers to.
    pub(crate) fn seeds(self) -> Vec<Vec<u8>> {
        match self {
            Self::Launcher => launcher::seeds(),
            Self::Manifest | Self::Configuration | Self::Bundle | Self::Request | Self::Http2 | Self::Link => {
                Vec::new()
            }
        }
    }

    /// Tries one input.
    ///
    /// # Panics
    /// When a property of the target does not hold, or the input cost more memory or time than any may.
    #[must_use]
    pub fn check(self, input: &[u8]) -> Shape {
        let input = &input[..input.len().min(self.longest())];
        let run = match self {
            Self::Launcher => launcher::check,
            Self::Manifest => manifest::check,
            Self::Configuration => configuration::check,
            Self::Bundle => bundle::check,
            Self::Request => request::check,
            Self::Http2 => http2::check,
            Self::Link => link::check,
        };
        let began = processor_time();
        let mut outcome = String::new();
        let allocated = allocation_counter::measure(|| outcome = run(input));
        let took = processor_time().saturating_sub(began);
        let (most, allowed) = (allocated.bytes_max, self.memory(input.len()));
        assert!(most <= allowed, "{most} bytes were allocated at once for {} of input, over {allowed}", input.len());
        assert!(took <= TIME, "{took:?} of processor time for {} bytes of input", input.len());
        Shape::of(&outcome)
    }
}

/// What this thread has used: a busy machine does not count.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}
