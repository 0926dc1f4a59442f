//! `plugvisor approve`: an administrator's signed word that a bundle has a tier.
//!
//! Keys are files of 64 hexadecimal digits, the seed of an Ed25519 key, for their owner's eyes alone. The approval is
//! written beside the bundle, where plugvisord finds it; the launcher verifies it with the key in its policy file. This is
//! done where the key is, which need not be the host that runs the plugin.

mod ceiling;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signer, SigningKey};
use plugvisor_package::{Approval, Bundle, BundleLimits, Digest, IsolationLevel, Manifest, TrustTier, approval_text};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde_json::json;

use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::Line;

/// What is signed.
pub(crate) struct Asked {
    pub(crate) bundle: PathBuf,
    pub(crate) tier: TrustTier,
    /// What was reviewed; anything else is not signed.
    pub(crate) digest: Option<Digest>,
}

/// Signs that the bundle has the tier, and writes that beside it.
pub(crate) fn approve(output: &Output, asked: &Asked, key_file: &Path) -> Result<(), Failure> {
    let Asked { bundle: path, tier, digest: reviewed } = asked;
    let place = Place::open(path).map_err(|error| failed("opened", path, &error))?;
    let bundle = Bundle::open_at(place.parent.as_fd(), &place.path, &place.name, &BundleLimits::default())
        .map_err(|error| Failure::new(Outcome::Failed, error.to_string(), error.hint()))?;
    let (manifest, digest) = (bundle.manifest, bundle.digest);
    // Under another name it would be given another plugin's uid and data.
    if manifest.name.as_str() != place.name {
        let message = format!("the bundle in {} calls itself {}: nothing was signed", path.display(), manifest.name);
        let hint = format!("if that is the plugin you mean, call its directory {}", manifest.name);
        return Err(Failure::new(Outcome::Failed, message, hint));
    }
    if let Some(reviewed) = reviewed.filter(|reviewed| *reviewed != digest) {
        let message = format!("{} has the digest {digest}, and not {reviewed}: nothing was signed", path.display());
        return Err(Failure::new(Outcome::Failed, message, "it was changed after the review: review it again"));
    }
    let (id, key) = read_key(key_file)?;
    let name = manifest.name.clone();
    let signature = key.sign(approval_text(name.as_str(), *tier, &digest).as_bytes()).to_bytes();
    let approval = Approval { name: name.clone(), tier: *tier, digest, key: id.clone(), signature };
    let beside = place.write(&approval.write()).map_err(|error| failed("written", path, &error))?;
    // It may be for other hosts, so that it is written all the same.
    if let Some(warning) = ceiling::warning(Path::new(ceiling::POLICY), &id, &public(&key), *tier) {
        eprintln!("plugvisor: {warning}");
    }
    match output.format {
        Format::Json | Format::Jsonl => output.json(&json!({
            "approval": beside.display().to_string(), "name": name.as_str(), "tier": tier.as_str(),
            "digest": digest.to_string(), "key": id, "public_key": public(&key),
        })),
        Format::Name => output.line(&Line::new(beside.display().to_string())),
        Format::Table | Format::Wide => {
            output.line(&Line::new(format!("{name} {digest} is {tier} by the key {id}: {}", beside.display())))?;
            output.line(&Line::new(asks(&manifest)))
        }
    }
}

/// What the tier may now open.
fn asks(manifest: &Manifest) -> String {
    let sandbox = &manifest.security.sandbox;
    let level = match (sandbox.enabled, sandbox.isolation_level) {
        (false, _) => IsolationLevel::None,
        (true, asked) => asked.unwrap_or(IsolationLevel::Process),
    };
    let capabilities: Vec<&str> = manifest.security.capabilities.iter().map(|asked| asked.as_str()).collect();
    let capabilities = if capabilities.is_empty() { "no capability".to_owned() } else { capabilities.join(", ") };
    format!("it asks for the level {} and for {capabilities}", level.as_str())
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
        Format::Table | Format::Wide => entry(output, &id, &key),
    }
}

/// What the launcher's administrator writes for this key.
fn entry(output: &Output, id: &str, key: &SigningKey) -> Result<(), Failure> {
    let public = public(key);
    let lines = [
        "# in the launcher's policy file, such as /etc/plugvisor/launcher.toml, once; tier is the most that it may give".to_owned(),
        "# a new file begins with the line: version = 1; a new file is found when plugvisord starts, and is read at each launch from then on".to_owned(),
        "[[key]]".to_owned(),
        format!("id = \"{id}\""),
        format!("public_key = \"{public}\""),
        format!("tier = \"{}\"", TrustTier::Verified),
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
    // With somebody else's key it would be somebody else's word.
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(wrong("belongs to another user", "make a key of your own with `plugvisor approve --new-key FILE`"));
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

/// Where the bundle is. Opened once: whoever may rename directories there cannot have another one's approval replaced.
struct Place {
    parent: OwnedFd,
    path: PathBuf,
    name: String,
}

impl Place {
    fn open(bundle: &Path) -> io::Result<Self> {
        let bundle = fs::canonicalize(bundle)?;
        let name = bundle.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let path = bundle.parent().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let parent = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self { parent, path, name })
    }

    /// Whoever reads it finds the old one or the new one.
    fn write(&self, text: &str) -> io::Result<PathBuf> {
        let name = format!("{}{}", self.name, Approval::SUFFIX);
        let new = format!("{name}.new");
        match rustix::fs::unlinkat(&self.parent, &new, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&self.parent, &new, flags, Mode::from_raw_mode(0o644))?);
        // It is no secret, and plugvisord reads it as another user, whatever the umask here is.
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        rustix::fs::renameat(&self.parent, &new, &self.parent, &name)?;
        rustix::fs::fsync(&self.parent)?;
        Ok(self.path.join(name))
    }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(Outcome::Failed, format!("{} was not {what}: {error}", path.display()), "correct that, and try again")
}
