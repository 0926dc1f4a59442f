//! What is said about the launcher's store: bundles come in by an import, in steps, and are known by their content digest.

use plugvisor_package::TrustTier;
use serde::{Deserialize, Serialize};

#[allow(unused_imports, reason = "the documentation names them")]
use super::{MAX_DESCRIPTORS, Reply};

/// The steps of an import. The launcher computes the content digest itself; what it is told only says what to expect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Import {
    /// Asks whether the store has a bundle. Answered by [`Imported`].
    Find {
        /// Its content digest.
        bundle: [u8; 32],
    },
    /// Begins an import. Answered by [`Reply::Done`], or refused when the quota leaves no room.
    Begin(ImportBegin),
    /// Files of the bundle, with a descriptor for each, in the same order: regular files open for reading, at most
    /// [`MAX_DESCRIPTORS`]. Answered by [`Reply::Done`] when they are copied; a refusal ends the import.
    Files(Vec<ImportFile>),
    /// Ends the import. Answered by [`Imported`] when the files that came make up the digest named at its beginning.
    Commit,
    /// Ends the import without a result.
    Abort,
}

/// What an import will bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportBegin {
    /// The bundle's content digest, as `plugvisor_package::content_digest` computes it.
    pub bundle: [u8; 32],
    /// How many files it has, `plugin.json` included.
    pub files: u32,
    /// Their sizes together, in bytes.
    pub bytes: u64,
}

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportFile {
    /// Its path in the bundle, with `/` between components.
    pub path: String,
    /// Whether it gets mode 0755 or 0644. No other bit of the file's own mode counts.
    pub executable: bool,
    /// Its size in bytes; of `plugin.json`, the size of its canonical form.
    pub size: u64,
    /// The digest of its bytes; of `plugin.json`, of its canonical form.
    pub sha256: [u8; 32],
}

/// What the store has under a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The tier that the launcher's policy gives it, whatever the supervisor thinks.
    pub tier: Tier,
    /// The size of its files together, in bytes.
    pub bytes: u64,
}

/// The answer to [`Import::Find`] and [`Import::Commit`].
pub type Imported = Option<Stored>;

/// Trust tiers on the wire, least trusted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the tiers of the manifest, see plugvisor_package::TrustTier")]
pub enum Tier {
    Quarantined,
    Untrusted,
    Community,
    Verified,
    Internal,
}

impl From<TrustTier> for Tier {
    fn from(tier: TrustTier) -> Self {
        match tier {
            TrustTier::Quarantined => Self::Quarantined,
            TrustTier::Untrusted => Self::Untrusted,
            TrustTier::Community => Self::Community,
            TrustTier::Verified => Self::Verified,
            TrustTier::Internal => Self::Internal,
        }
    }
}

impl From<Tier> for TrustTier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Quarantined => Self::Quarantined,
            Tier::Untrusted => Self::Untrusted,
            Tier::Community => Self::Community,
            Tier::Verified => Self::Verified,
            Tier::Internal => Self::Internal,
        }
    }
}

/// An administrator's signed word that a bundle has a tier. It holds for the name and the digest that were signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// The tier that was signed.
    pub tier: Tier,
    /// The key's name in the launcher's policy file.
    pub key: String,
    /// The Ed25519 signature, 64 bytes, over [`approval_text`].
    pub signature: Vec<u8>,
}

/// What an administrator signs: this plugin's name, with this content, has this tier.
#[must_use]
pub fn approval_text(plugin: &str, tier: Tier, bundle: &[u8; 32]) -> String {
    plugvisor_package::approval_text(plugin, tier.into(), &plugvisor_package::Digest::from_bytes(*bundle))
}
