//! The plugin's data directory: the host's, whose files the host opens, reads and writes.
//!
//! The guest's kernel asks by FUSE (`linux/fuse.h`), and what it asks goes to the host as it is, over a connection of the
//! link: one thread carries the requests, another the replies. Their ends are found in them; nothing else here knows what
//! is asked.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::Path,
    sync::Arc,
    thread,
};

use super::{
    plan::Access,
    system::{self, NO_DEVICES, NO_EXEC, NO_SUID},
};

/// Where the plugin sees it, as at the levels without a guest.
const PLACE: &std::ffi::CStr = c"/plugvisor/data";

const DEVICE: &str = "/dev/fuse";

const READ_ONLY: u64 = 1;

/// The longest request, and the longest reply: 128 KiB and what stands before it. The kernel wants to be read with as much.
const LONGEST: usize = (128 << 10) + 4096;

/// The shortest reply: its head.
const SHORTEST: usize = 16;

/// It was asked for something that is not wanted any more.
const NO_SUCH_REQUEST: i32 = 2;

/// A directory that is mounted and that nobody answers for yet.
pub(crate) struct Files {
    device: File,
    /// The end of the connection on this side; the relay has the other.
    ours: UnixStream,
}

/// Keeps the device from the plugin, which has no use for it, whether there are data or not.
pub(crate) fn close_device() -> io::Result<()> {
    match fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o600)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Mounts it, and gives the end that is for the relay.
pub(crate) fn mount(access: Access) -> io::Result<(Files, UnixStream)> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    fs::create_dir_all(Path::new("/plugvisor/data"))?;
    // What the plugin may do with a file is the host's to say.
    let how = format!("fd={},rootmode=40700,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let how = CString::new(how).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let flags = match access {
        Access::Read => READ_ONLY,
        Access::Write => 0,
    };
    system::mounted(c"fuse", PLACE, flags | NO_SUID | NO_DEVICES | NO_EXEC, &how)?;
    let (ours, for_relay) = UnixStream::pair()?;
    Ok((Files { device, ours }, for_relay))
}

impl Files {
    /// Carries requests and replies from here on. The guest ends when that does: what the plugin has open would never be
    /// answered for.
    pub(crate) fn serve(self) -> io::Result<()> {
        let Self { device, ours } = self;
        let (device, replies) = (Arc::new(device), ours.try_clone()?);
        let asks = Arc::clone(&device);
        thread::Builder::new().spawn(move || ends(requests(&asks, &ours)))?;
        thread::Builder::new().spawn(move || ends(answers(&replies, &device)))?;
        Ok(())
    }
}

fn ends(carried: io::Result<()>) -> ! {
    let why = carried.err().map_or_else(|| "nobody answers for them any more".to_owned(), |error| error.to_string());
    eprintln!("plugvisor: the guest ends: its data: {why}");
    system::power_off()
}

fn requests(mut device: &File, mut connection: &UnixStream) -> io::Result<()> {
    let mut request = vec![0; LONGEST];
    loop {
        // Whole or not at all.
        match device.read(&mut request) {
            Ok(length) => connection.write_all(&request[..length])?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(NO_SUCH_REQUEST) => {}
            Err(error) => return Err(error),
        }
    }
}

fn answers(mut connection: &UnixStream, mut device: &File) -> io::Result<()> {
    let mut reply = vec![0; LONGEST];
    loop {
        connection.read_exact(&mut reply[..4])?;
        let length = usize::try_from(u32::from_le_bytes([reply[0], reply[1], reply[2], reply[3]])).unwrap_or(0);
        let whole = reply.get_mut(..length).filter(|whole| whole.len() >= SHORTEST);
        let whole = whole.ok_or_else(|| io::Error::from(ErrorKind::InvalidData))?;
        connection.read_exact(&mut whole[4..])?;
        match device.write(whole) {
            Err(error) if error.raw_os_error() != Some(NO_SUCH_REQUEST) => return Err(error),
            _ => {}
        }
    }
}
