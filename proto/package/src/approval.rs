//! Approvals: an administrator's signed word that a plugin with this content has a tier.
//!
//! It lies beside the bundle, in a file named like the bundle's directory with [`Approval::SUFFIX`] behind it, because in
//! it it would change the digest that it states. This module knows no keys: whoever has the public one verifies the
//! signature over [`approval_text`].

use serde::{Deserialize, Serialize};

use crate::{Digest, PluginName, TrustTier};

/// The length of an Ed25519 signature, in bytes.
const SIGNATURE: usize = 64;

/// A signed approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approval {
    /// The plugin's name.
    pub name: PluginName,
    /// The tier that was signed.
    pub tier: TrustTier,
    /// The content digest of its bundle.
    pub digest: Digest,
    /// The key's name in the launcher's policy file.
    pub key: String,
    /// The Ed25519 signature over [`approval_text`].
    pub signature: [u8; SIGNATURE],
}

/// Why a file is no approval.
#[derive(Debug, thiserror::Error)]
pub enum ApprovalError {
    /// It is not the JSON of one.
    #[error("it is not an approval: {0}; make it again with `plugvisor approve`")]
    Json(#[from] serde_json::Error),
    /// The signature is not 64 bytes in hexadecimal digits.
    #[error("its signature is not 64 bytes in hexadecimal digits; make it again with `plugvisor approve`")]
    Signature,
    /// The key's name is none.
    #[error(
        "its key has no plain name of at most 64 letters, digits, '-', '_' and '.'; make it again with `plugvisor approve`"
    )]
    Key,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: PluginName,
    tier: TrustTier,
    digest: Digest,
    key: String,
    signature: String,
}

impl Approval {
    /// What stands behind the name of the bundle's directory.
    pub const SUFFIX: &'static str = ".approval.json";

    /// The largest file that is one, in bytes.
    pub const MOST_BYTES: u64 = 4096;

    /// Whether a key may be called so: what stands in policy files, messages and logs as it is.
    #[must_use]
    pub fn is_key_name(name: &str) -> bool {
        (1..=64).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    }

    /// Reads the file.
    ///
    /// # Errors
    ///
    /// See [`ApprovalError`].
    pub fn read(bytes: &[u8]) -> Result<Self, ApprovalError> {
        let File { name, tier, digest, key, signature } = serde_json::from_slice(bytes)?;
        let signature = from_hex(&signature).ok_or(ApprovalError::Signature)?;
        if !Self::is_key_name(&key) {
            return Err(ApprovalError::Key);
        }
        Ok(Self { name, tier, digest, key, signature })
    }

    /// The file's text.
    #[must_use]
    pub fn write(&self) -> String {
        let Self { name, tier, digest, key, signature } = self.clone();
        let signature = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        let file = File { name, tier, digest, key, signature };
        format!("{}\n", serde_json::to_string_pretty(&file).expect("texts can be written as JSON"))
    }
}

/// What an administrator signs: this plugin's name, with this content, has this tier.
#[must_use]
pub fn approval_text(plugin: &str, tier: TrustTier, digest: &Digest) -> String {
    format!("plugvisor approval 1\n{plugin}\n{tier}\n{digest}\n")
}

fn from_hex(text: &str) -> Option<[u8; SIGNATURE]> {
    if text.len() != 2 * SIGNATURE || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; SIGNATURE];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let approval = Approval {
            name: "gallery".parse().expect("a name"),
            tier: TrustTier::Verified,
            digest: Digest::of(b"content"),
            key: "ops".to_owned(),
            signature: [0xa5; SIGNATURE],
        };
        assert_eq!(Approval::read(approval.write().as_bytes()).expect("it is one"), approval);
        let text = approval.write();
        for wrong in [
            String::new(),
            text.replace("a5", "g5"),
            text.replacen("a5", "", 1),
            text.replacen("a5", "é", 1),
            text.replace("verified", "trusted"),
            text.replace("\"key\"", "\"kee\""),
            text.replace("\"ops\"", "\"\""),
            text.replace("\"ops\"", "\"o\\nps\""),
            text.replace("\"ops\"", &format!("\"{}\"", "o".repeat(65))),
            format!("{text}{text}"),
            "[".repeat(4096),
        ] {
            assert!(Approval::read(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
