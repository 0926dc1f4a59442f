//! `plugvisor approve`: an administrator's signed word that a bundle has a tier.
//!
//! Keys are files of 64 hexadecimal digits, the seed of an Ed25519 key, for their owner's eyes alone. The approval is
//! written beside the bundle, where plugvisord finds it; the launcher verifies it with the key in its policy file. This is
//! done where the key is, which need not be the host that runs the plugin.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signer, SigningKey};
use plugvisor_package::{Approval, Bundle, BundleLimits, TrustTier, approval_text};
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::Line;

/// Signs that the bundle has the tier, and writes that beside it.
pub(crate) fn approve(output: &Output, path: &Path, tier: TrustTier, key_file: &Path) -> Result<(), Failure> {
    let bundle = Bundle::open(path, &BundleLimits::default())
        .map_err(|error| Failure::new(Outcome::Failed, error.to_string(), error.hint()))?;
    let (id, key) = read_key(key_file)?;
    let (name, digest) = (bundle.manifest.name, bundle.digest);
    let signature = key.sign(approval_text(name.as_str(), tier, &digest).as_bytes()).to_bytes();
    let approval = Approval { name: name.clone(), tier, digest, key: id.clone(), signature };
    let beside = write_beside(path, &approval.write()).map_err(|error| failed("written", path, &error))?;
    match output.format {
        Format::Json | Format::Jsonl => output.json(&json!({
            "approval": beside.display().to_string(), "name": name.as_str(), "tier": tier.as_str(), "digest": digest.to_string(), "key": id,
            "public_key": public(&key),
        })),
        Format::Name => output.line(&Line::new(beside.display().to_string())),
        Format::Table | Format::Wide => {
            output.line(&Line::new(format!("{name} {digest} is {tier} by the key {id}: {}", beside.display())))?;
            entry(output, &id, &key, tier)
        }
    }
}

/// Makes a key.
pub(crate) fn new_key(output: &Output, path: &Path) -> Result<(), Failure> {
    let id = id_of(path)?;
    let mut seed = [0; 32];
    let mut filled = 0;
    while filled < seed.len() {
        filled += rustix::rand::getrandom(&mut seed[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| failed("made", path, &errno.into()))?;
    }
    let text: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    made.and_then(|mut file| {
        writeln!(file, "{text}")?;
        file.sync_all()
    })
    .map_err(|error| failed("made", path, &error))?;
    let key = SigningKey::from_bytes(&seed);
    match output.format {
        Format::Json | Format::Jsonl => {
            output.json(&json!({ "key": id, "public_key": public(&key), "file": path.display().to_string() }))
        }
        Format::Name => output.line(&Line::new(id)),
        Format::Table | Format::Wide => entry(output, &id, &key, TrustTier::Verified),
    }
}

/// What the launcher's administrator writes for this key.
fn entry(output: &Output, id: &str, key: &SigningKey, tier: TrustTier) -> Result<(), Failure> {
    let public = public(key);
    let lines = [
        "# in the launcher's policy file, such as /etc/plugvisor/launcher.toml, once; tier is the most that it may give".to_owned(),
        "[[key]]".to_owned(),
        format!("id = \"{id}\""),
        format!("public_key = \"{public}\""),
        format!("tier = \"{tier}\""),
    ];
    output.lines(&lines.map(Line::new))
}

fn public(key: &SigningKey) -> String {
    key.verifying_key().as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A key is called what its file is called.
fn id_of(path: &Path) -> Result<String, Failure> {
    let id = path.file_stem().and_then(|stem| stem.to_str()).filter(|id| Approval::is_key_name(id));
    id.map(str::to_owned).ok_or_else(|| {
        let message = format!("{} is no name for a key", path.display());
        Failure::new(Outcome::Failed, message, "call it by 1 to 64 letters, digits, '-', '_' or '.', such as ops.key")
    })
}

fn read_key(path: &Path) -> Result<(String, SigningKey), Failure> {
    let wrong = |what: &str, hint: &str| Failure::new(Outcome::Failed, format!("{} {what}", path.display()), hint);
    // Opened once and then looked at, so that what is read is what was looked at; a FIFO has no writer to wait for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed("read", path, &errno.into()))?;
    let file = File::from(file);
    let found = file.metadata().map_err(|error| failed("read", path, &error))?;
    if !found.is_file() {
        return Err(wrong("is not a regular file", "make a key with `plugvisor approve --new-key FILE`"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(wrong("is open to others", "chmod it 600; if others were on this host, make another key"));
    }
    let mut text = String::new();
    file.take(1024).read_to_string(&mut text).map_err(|error| failed("read", path, &error))?;
    let digits = text.trim();
    let mut seed = [0; 32];
    let byte = |at: usize| digits.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let hexadecimal = digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    for (index, place) in seed.iter_mut().enumerate() {
        *place = byte(2 * index).filter(|_| hexadecimal).ok_or_else(|| {
            wrong("is not a key of 64 hexadecimal digits", "make a key with `plugvisor approve --new-key FILE`")
        })?;
    }
    Ok((id_of(path)?, SigningKey::from_bytes(&seed)))
}

/// Whoever reads it finds the old one or the new one.
fn write_beside(bundle: &Path, text: &str) -> io::Result<PathBuf> {
    let bundle = fs::canonicalize(bundle)?;
    let mut name = bundle.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(Approval::SUFFIX);
    let beside = bundle.with_file_name(&name);
    name.push(".new");
    let new = bundle.with_file_name(name);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&new)?;
    // It is no secret, and plugvisord reads it as another user, whatever the umask here is.
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, &beside)?;
    Ok(beside)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(Outcome::Failed, format!("{} was not {what}: {error}", path.display()), "correct that, and try again")
}
