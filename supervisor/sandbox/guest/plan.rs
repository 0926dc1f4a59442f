//! What a guest is told in its archive: what to start, and how. Written by the host, read once and removed by the guest.
//!
//! Records of a tag, a length of four bytes in little endian, and a text without a zero byte. Pure.

use std::ffi::CString;

/// Where the archive has it.
pub(crate) const PATH: &str = "plugvisor.plan";
/// Where the archive has the kernel's modules, numbered in the order in which they are loaded.
pub(crate) const MODULES: &str = "plugvisor.modules";

/// The plugin's sockets and its bundle, in a guest as at the levels without one.
pub(crate) const SOCKETS: &str = "/run/plugvisor";
pub(crate) const BUNDLE: &str = "/plugin";

/// Who the plugin is in its guest: there is nobody else.
pub(crate) const USER: u32 = 60_000;

/// What the plugin may do with its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// What a guest starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    /// The plugin inherits its worker socket.
    pub(crate) inherits: bool,
    /// It may reach the egress proxy.
    pub(crate) egress: bool,
    /// How many connections to ports of it there may be at once.
    pub(crate) inward: u64,
    /// Its data, which the host answers for.
    pub(crate) data: Option<Access>,
    /// How many modules there are.
    pub(crate) modules: u64,
    /// The size of /tmp in bytes, when the plugin has one.
    pub(crate) temp: Option<u64>,
    /// Bytes of memory of all its processes together.
    pub(crate) memory: Option<u64>,
    /// Processes and threads together.
    pub(crate) pids: Option<u64>,
    pub(crate) open_files: u64,
    pub(crate) file_size: Option<u64>,
}

impl Plan {
    /// As bytes.
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { argv, envp, inherits, egress, inward, data, modules, temp, memory, pids, open_files, file_size } =
            self;
        let mut bytes = Vec::new();
        let mut put = |tag: u8, text: &[u8]| {
            bytes.push(tag);
            bytes.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend_from_slice(text);
        };
        argv.iter().for_each(|text| put(b'a', text.as_bytes()));
        envp.iter().for_each(|text| put(b'e', text.as_bytes()));
        let numbers = [
            (b'i', inherits.then_some(1)),
            (b'x', egress.then_some(1)),
            (b'n', Some(*inward)),
            (b'd', data.map(|access| u64::from(access == Access::Write))),
            (b'm', Some(*modules)),
            (b't', *temp),
            (b'r', *memory),
            (b'p', *pids),
            (b'o', Some(*open_files)),
            (b's', *file_size),
        ];
        for (tag, number) in numbers {
            if let Some(number) = number {
                put(tag, number.to_string().as_bytes());
            }
        }
        bytes
    }

    /// Out of bytes; `None` when they are no plan.
    pub(crate) fn read(mut bytes: &[u8]) -> Option<Self> {
        let mut plan = Self::default();
        while let Some((tag, rest)) = bytes.split_first() {
            let (length, rest) = rest.split_first_chunk()?;
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            let text = rest.get(..length)?;
            bytes = &rest[length..];
            let string = || CString::new(text).ok();
            let number = || std::str::from_utf8(text).ok()?.parse::<u64>().ok();
            match tag {
                b'a' => plan.argv.push(string()?),
                b'e' => plan.envp.push(string()?),
                b'i' => plan.inherits = true,
                b'x' => plan.egress = true,
                b'n' => plan.inward = number()?,
                b'd' => plan.data = Some(if number()? == 0 { Access::Read } else { Access::Write }),
                b'm' => plan.modules = number()?,
                b't' => plan.temp = Some(number()?),
                b'r' => plan.memory = Some(number()?),
                b'p' => plan.pids = Some(number()?),
                b'o' => plan.open_files = number()?,
                b's' => plan.file_size = Some(number()?),
                _ => return None,
            }
        }
        Some(plan)
    }
}
