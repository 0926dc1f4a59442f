//! A child that is made before anybody asks for it: in its namespaces and its cgroups, with the part of the mount tree that
//! is the same for every plugin. It waits for one order and becomes that plugin by the same steps as any other child.
//!
//! It closes at once everything that the launcher has open, so that it holds nothing of any plugin, and is used once.
//! Until the order comes it has the launcher's privileges, in a root without the host's tree, and listens to the launcher
//! alone. Only for a launcher with privileges: without them, the user namespace in which a plugin's mounts are copied is
//! the plugin's own.

use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use rustix::{
    fs::Mode,
    io::Errno,
    process::{setsid, umask},
};

use super::{Ends, Entry, Failure, Kit, NAME, Order, at, fail, join, lift, network, start, tie_to, wall_in};
use crate::{
    kernel,
    level::{self, Tree},
    mounts::{self, Common},
    report::{self, Message},
    step::Step,
    timing::{Marks, Part},
};

/// The number of its line to the launcher; the launcher's pidfd and the member lists follow.
const LINE: RawFd = 3;

/// Runs the spare. Never returns to the launcher's code.
pub(crate) fn run(kit: &Kit<'_>) -> ! {
    kernel::set_name(c"plugvisor-early");
    let (kit, common) = match prepare(kit) {
        Ok(prepared) => prepared,
        Err(failure) => fail(kit, failure),
    };
    let failure = match obey(&kit, common) {
        Ok((order, marks)) => start(&kit, Entry::InBundle, &order, marks),
        Err(failure) => failure,
    };
    fail(&kit, failure)
}

fn prepare<'a>(kit: &Kit<'a>) -> Result<(Kit<'a>, Common), Failure> {
    let kit = keep_only(kit).map_err(|error| Failure::io(Step::Descriptors, &error))?;
    umask(Mode::empty());
    tie_to(&kit)?;
    join(&kit)?;
    setsid().map_err(at(Step::Session))?;
    kernel::unshare(level::LATER).map_err(|error| Failure::io(Step::Namespaces, &error))?;
    network::bound_buffers();
    mounts::separate(Tree::Own)?;
    let common = Common::enter(Tree::Own)?;
    // For whoever looks from outside: from here on it only waits.
    kernel::set_name(c"plugvisor-spare");
    report::send(kit.report, &Message::Ready, None).map_err(|error| Failure::io(Step::Descriptors, &error))?;
    Ok((kit, common))
}

/// Closes all descriptors but those of the kit.
fn keep_only<'a>(kit: &Kit<'a>) -> std::io::Result<Kit<'a>> {
    let kept = [kit.report, kit.launcher].into_iter().chain(kit.cgroups.iter().copied());
    let lifted = kept.map(lift).collect::<Result<Vec<_>, _>>()?;
    let mut placed = Vec::new();
    for (from, to) in lifted.into_iter().zip(LINE..) {
        kernel::place(from, to, false)?;
        placed.push(kernel::fixed(to));
    }
    let end = LINE + RawFd::try_from(placed.len()).unwrap_or(RawFd::MAX);
    kernel::close_from(end)?;
    let cgroups = placed.split_off(2);
    Ok(Kit { report: placed[0], launcher: placed[1], cgroups, landlock: kit.landlock, filters: kit.filters })
}

/// Waits for the order and carries it out up to the fork of the program.
fn obey(kit: &Kit<'_>, common: Common) -> Result<(Order, Marks), Failure> {
    let Some((order, sent)) = receive(kit.report).map_err(|error| Failure::io(Step::Descriptors, &error))? else {
        // Nobody wants it.
        kernel::exit_now(0)
    };
    let mut marks = order.marks;
    marks.done(Part::Started);
    kernel::set_name(NAME);
    network::make(kit, &order)?;
    // Whoever has directories of its name is not made from a spare: it no longer sees the host's tree.
    common.complete(sent.own, Vec::new(), order.socket, order.temp)?;
    marks.done(Part::Tree);
    // Owned by nobody from here on: they are closed with all others when the descriptors are arranged.
    let lend = |fd: OwnedFd| kernel::fixed(fd.into_raw_fd());
    let ends = Ends { stdout: lend(sent.stdout), stderr: lend(sent.stderr), worker: sent.worker.map(lend) };
    wall_in(kit, Entry::InBundle, &ends, &order, &mut marks)?;
    Ok((order, marks))
}

/// What comes with an order.
struct Sent {
    stdout: OwnedFd,
    stderr: OwnedFd,
    own: mounts::Own,
    worker: Option<OwnedFd>,
}

/// The largest order, in bytes: more than a request can ask for.
const MOST: usize = 2 * plugvisor_sandbox::protocol::MAX_PACKET;

/// Sends an order. An error when it cannot be sent now; the spare has nothing of it then.
pub(crate) fn send(line: BorrowedFd<'_>, order: &Order, own: &mounts::Own, ends: &Ends<'_>) -> std::io::Result<()> {
    let bytes = postcard::to_extend(order, Vec::new()).map_err(std::io::Error::other)?;
    if bytes.len() > MOST {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    let mut descriptors = vec![ends.stdout, ends.stderr, own.bundle.as_fd(), own.broker.as_fd(), own.worker.as_fd()];
    descriptors.extend(ends.worker);
    report::send_packet(line, &bytes, &descriptors)
}

fn receive(line: BorrowedFd<'_>) -> std::io::Result<Option<(Order, Sent)>> {
    let mut bytes = vec![0; MOST];
    let Some((length, descriptors)) = report::receive_packet(line, &mut bytes)? else { return Ok(None) };
    let order = postcard::from_bytes(&bytes[..length]).map_err(std::io::Error::other)?;
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().ok_or_else(|| std::io::Error::from(Errno::BADF));
    let (stdout, stderr) = (next()?, next()?);
    let own = mounts::Own { bundle: next()?, broker: next()?, worker: next()?, machine: Vec::new() };
    Ok(Some((order, Sent { stdout, stderr, own, worker: descriptors.next() })))
}
