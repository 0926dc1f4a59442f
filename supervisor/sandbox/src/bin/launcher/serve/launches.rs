//! What happens to launches by themselves: they come up, fail, run out of memory, end.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use plugvisor_sandbox::protocol::{Exit, Notice, Refusal, RefusalCode, Reply};
use rustix::{
    event::epoll,
    io::Errno,
    process::{WaitId, WaitIdOptions, waitid},
};

use super::{Phase, Server, Source};
use crate::{
    directories::{self, Roots},
    launch::{Running, SETUP_TIME, remove_sockets},
    readback::{self, Judgement},
};

impl Server {
    pub(super) fn watch(&self, id: u64, running: &Running) -> io::Result<()> {
        let add = |fd: BorrowedFd<'_>, source: Source, flags| {
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(source.token()), flags)
        };
        add(running.init.as_fd(), Source::Init(id), epoll::EventFlags::IN)?;
        // A spare's line is waited for already.
        let _ = epoll::delete(&self.epoll, &running.report);
        add(running.report.as_fd(), Source::Report(id), epoll::EventFlags::IN)?;
        if let Some(exec) = &running.exec {
            add(exec.as_fd(), Source::Exec(id), epoll::EventFlags::IN)?;
        }
        if let Some(memory) = &running.memory {
            add(memory.as_fd(), Source::Memory(id), memory.interest())?;
        }
        Ok(())
    }

    /// Takes what the child said, and finishes the launch if that decided it.
    pub(super) fn reported(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let was_open = !slot.running.report_closed;
        slot.running.drain();
        if let Some(trace) = &self.launcher.trace
            && let Some(listener) = slot.running.listener.take()
        {
            // Whom it does not reach makes its program's exec fail: nobody answers then. Closing a listener waits for nothing.
            let _ = trace.try_send(&id.to_le_bytes(), &[listener.as_fd()]);
        }
        // Once: the program asks once, and a listener that was answered is gone.
        if let Some(listener) = &slot.running.listener {
            let data = epoll::EventData::new_u64(Source::Listener(id).token());
            match epoll::add(&self.epoll, listener, data, epoll::EventFlags::IN) {
                Ok(()) | Err(Errno::EXIST) => {}
                // Without one its exec fails, and it says so.
                Err(_) => slot.running.listener = None,
            }
        }
        if was_open && slot.running.report_closed {
            let _ = epoll::delete(&self.epoll, &slot.running.report);
        }
        let Phase::Starting { request, .. } = slot.phase else { return };
        let running = &mut slot.running;
        if let Some(failure) = running.failure {
            let of_directory = directories::refusal(Roots::of(&self.launcher.options), &running.plugin, failure);
            let refusal = of_directory.unwrap_or_else(|| failure.step.refusal(&running.plugin, failure.errno));
            self.give_up(id, refusal);
        } else if running.exec.is_none() && running.executing && running.program.is_some() {
            let come_up = match readback::judge(&self.launcher, running) {
                Judgement::Comes(controls) => self.come_up(id, controls),
                Judgement::Refused(refusal) => Err(refusal),
                // Its init tells when it has ended; that takes no longer than the setting up may.
                Judgement::Ending => return,
            };
            match come_up {
                Ok((launched, descriptors)) => self.reply(request, &Reply::Launched(launched), descriptors),
                Err(refusal) => self.give_up(id, refusal),
            }
        }
    }

    /// Starts writing the uids when a launch waits for that.
    pub(super) fn start_saver(&mut self) -> io::Result<()> {
        if self.ending.is_none()
            && let Some(child) = self.launcher.uids.start_saver(self.launcher.store.lock())
        {
            let data = epoll::EventData::new_u64(Source::Saver.token());
            epoll::add(&self.epoll, child, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    /// The uids are on the disk, or cannot be written: who waits for that is executed, or refused.
    pub(super) fn saved(&mut self) {
        let Some((pidfd, result)) = self.launcher.uids.saver_ended() else { return };
        let _ = epoll::delete(&self.epoll, &pidfd);
        let mut refused = Vec::new();
        for (id, slot) in &mut self.slots {
            match result {
                Ok(()) => slot.running.release_if_saved(&self.launcher.uids),
                Err(errno) => refused.extend(slot.running.unsaved(errno).map(|refusal| (*id, refusal))),
            }
        }
        for (id, refusal) in refused {
            self.give_up(id, refusal);
        }
    }

    /// The program of a launch asks for its exec.
    pub(super) fn asked_to_execute(&mut self, id: u64) {
        let listener = self.slots.get_mut(&id).and_then(|slot| slot.running.let_execute());
        if let Some(listener) = listener {
            let _ = epoll::delete(&self.epoll, &listener);
        }
    }

    /// Kills a launch that has not succeeded; the refusal is sent when nothing is left of it.
    pub(super) fn give_up(&mut self, id: u64, refusal: Refusal) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if let Phase::Starting { request, .. } = slot.phase {
            slot.running.kill();
            slot.phase = Phase::Refusing { request, refusal };
        }
    }

    pub(super) fn overdue(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| matches!(slot.phase, Phase::Starting { deadline, .. } if deadline <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let message = format!("it was not set up within {} s; a filesystem may hang", SETUP_TIME.as_secs());
            self.give_up(id, Refusal { code: RefusalCode::Kernel, message });
        }
    }

    pub(super) fn memory_event(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let ran_out = slot.running.memory.as_ref().is_some_and(crate::cgroup::MemoryWatch::ran_out);
        // Of a machine nothing else is told while it runs: with its plugin it ends.
        let inside = slot.gone.is_some() && slot.running.ran_out_in_its_machine();
        if !(ran_out || inside) || slot.running.oom {
            return;
        }
        slot.running.oom = true;
        slot.running.kill();
        if matches!(slot.phase, Phase::Up) {
            let launch = slot.running.id;
            self.notice(&Notice::OutOfMemory { launch });
        }
    }

    pub(super) fn init_ended(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if let Ok(None) = waitid(WaitId::PidFd(slot.running.init.as_fd()), options) {
            return;
        }
        let _ = epoll::delete(&self.epoll, &slot.running.init);
        slot.gone = Some(Instant::now());
        // The last words: how the program ended, or why it never started. Nobody is left to hold the pipe open, though
        // its own event may come later: a program can be executed and end before the launcher looks once.
        slot.running.exec = None;
        self.reported(id);
        let gone = Refusal {
            code: RefusalCode::Kernel,
            message: "its process was killed while it was being set up; its memory limit may be too small".to_owned(),
        };
        self.give_up(id, gone);
    }

    /// Cleans up after launches whose processes are all gone, and says so.
    pub(super) fn finish_gone(&mut self) {
        let gone: Vec<u64> = self.slots.iter().filter(|(_, slot)| slot.gone.is_some()).map(|(id, _)| *id).collect();
        for id in gone {
            self.abandon_change(id);
            // The end may have been seen before its cause.
            self.memory_event(id);
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if let Some(memory) = slot.running.memory.take() {
                let _ = epoll::delete(&self.epoll, memory.as_fd());
            }
            // A process that has been reaped may hold its group for a moment longer. So may one that its guard could not
            // wait for.
            if !slot.running.groups.remove() {
                slot.running.kill_left();
                continue;
            }
            let Some(mut slot) = self.slots.remove(&id) else { continue };
            remove_sockets(slot.running.id);
            // Of a launch that never came up; its program may have connected to its broker all the same.
            let ends = std::mem::take(&mut slot.running.ends);
            self.closer.take(
                ends.into_iter().chain(slot.running.egress.take()).chain(slot.running.inward.drain(..)).collect(),
            );
            match slot.phase {
                Phase::Up => {
                    let exit = slot.running.ended.unwrap_or(Exit::Signal(libc::SIGKILL));
                    self.notice(&Notice::Exited { launch: slot.running.id, exit, oom_killed: slot.running.oom });
                    self.keep(id, slot);
                }
                Phase::Refusing { request, refusal } => self.reply(request, &Reply::Refused(refusal), vec![]),
                Phase::Starting { .. } | Phase::Abandoned => {}
            }
        }
    }
}
