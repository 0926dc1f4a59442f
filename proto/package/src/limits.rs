//! The bounds that a caller sets on what strangers wrote.
//!
//! This module owns the numbers and their defaults, in one place; it does not know who enforces them.

/// Bounds on a manifest. Everything above them is a problem, never a truncation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestLimits {
    /// The size of `plugin.json`, in bytes.
    pub bytes: usize,
    /// How deeply objects and arrays may nest. Never more than 100: the reader recurses.
    pub depth: usize,
    /// JSON values altogether, keys not counted.
    pub values: usize,
    /// Entries of one list or map.
    pub items: usize,
    /// The length of one text, in bytes.
    pub text: usize,
    /// Problems reported; one more says that the rest was left out.
    pub problems: usize,
}

impl Default for ManifestLimits {
    /// 256 KiB, 32 levels, 16,384 values, 256 items, 4 KiB of text, 100 problems: about ten times the largest manifest
    /// that a person would write, and small enough to be judged in milliseconds.
    fn default() -> Self {
        Self { bytes: 256 * 1024, depth: 32, values: 16_384, items: 256, text: 4096, problems: 100 }
    }
}

/// Bounds on a bundle's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleLimits {
    /// Bounds on its manifest.
    pub manifest: ManifestLimits,
    /// Files and directories altogether.
    pub entries: usize,
    /// How deeply directories may nest below the bundle.
    pub depth: usize,
    /// The size of all files together, in bytes.
    pub total_bytes: u64,
    /// The size of one file, in bytes.
    pub file_bytes: u64,
    /// The length of one file's or directory's name, in bytes.
    pub name_bytes: usize,
    /// The size of the descriptor set, which is held in memory, in bytes.
    pub descriptor_bytes: usize,
    /// Services in the descriptor set.
    pub services: usize,
}

impl Default for BundleLimits {
    /// 4,096 entries, 16 levels, 512 MiB altogether, 256 MiB a file, names of 128 bytes, a descriptor set of 4 MiB with
    /// at most 1,024 services.
    fn default() -> Self {
        Self {
            manifest: ManifestLimits::default(),
            entries: 4096,
            depth: 16,
            total_bytes: 512 * 1024 * 1024,
            file_bytes: 256 * 1024 * 1024,
            name_bytes: 128,
            descriptor_bytes: 4 * 1024 * 1024,
            services: 1024,
        }
    }
}
