//! What a guest's kernel wants to be different about a file. Pure.

use rustix::{
    fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT},
    io::Errno,
};

use super::wire::Body;

/// `struct fuse_setattr_in`: what is to be set, as far as it is.
pub(super) struct Change {
    pub(super) handle: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) mode: Option<u32>,
    pub(super) owners: [Option<u32>; 2],
    pub(super) times: Option<Timestamps>,
}

impl Change {
    pub(super) fn read(body: &mut Body<'_>) -> Result<Self, Errno> {
        let valid = body.u32()?;
        let has = |bit: u32| valid & 1 << bit != 0;
        body.skip(4)?;
        let (handle, size) = (body.u64()?, body.u64()?);
        // A lock's owner.
        body.skip(8)?;
        let (accessed, modified) = (body.u64()?, body.u64()?);
        // The kernel's own.
        body.skip(8)?;
        let nanos = [body.u32()?, body.u32()?];
        body.skip(4)?;
        let mode = body.u32()?;
        body.skip(4)?;
        let (user, group) = (body.u32()?, body.u32()?);
        let time = |set: bool, now: bool, seconds: u64, nanos: u32| match (set, now) {
            (_, true) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
            (true, false) if nanos < 1_000_000_000 => {
                Ok(Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanos.into() })
            }
            (true, false) => Err(Errno::INVAL),
            (false, false) => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
        };
        let times = Timestamps {
            last_access: time(has(4), has(7), accessed, nanos[0])?,
            last_modification: time(has(5), has(8), modified, nanos[1])?,
        };
        Ok(Self {
            handle: has(6).then_some(handle),
            size: has(3).then_some(size),
            mode: has(0).then_some(mode),
            owners: [has(1).then_some(user), has(2).then_some(group)],
            times: [4, 5, 7, 8].into_iter().any(has).then_some(times),
        })
    }
}
