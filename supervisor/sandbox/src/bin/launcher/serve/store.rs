//! The store's requests, and its children in the loop.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, time::SystemTime};

use plugvisor_sandbox::protocol::{Import, Refusal, Reply, Stored};
use rustix::event::epoll;

use super::{Server, Source};
use crate::admit::claimed;

impl Server {
    /// Answers a step of an import; `None` when the answer comes later.
    pub(super) fn import(&mut self, id: u64, step: Import, descriptors: &[OwnedFd]) -> Option<Reply> {
        let in_use = self.bundles_in_use();
        let roots = match self.launcher.policy.roots() {
            Ok(roots) => roots,
            Err(refusal) => return Some(Reply::Refused(refusal)),
        };
        let store = &mut self.launcher.store;
        let result = match step {
            Import::Find { bundle } => self.stored(&bundle).map(Reply::Imported),
            Import::Begin(begin) => store.begin(begin, &in_use).map(|()| Reply::Done),
            Import::Files(files) => match store.take_files(id, files, descriptors, &roots) {
                Ok(pidfd) => {
                    let data = epoll::EventData::new_u64(Source::Copier.token());
                    if epoll::add(&self.epoll, pidfd, data, epoll::EventFlags::IN).is_err() {
                        // Its end would not be seen; the time limit would tell of it instead.
                        self.launcher.store.abort();
                    }
                    return None;
                }
                Err(refusal) => Err(refusal),
            },
            Import::Commit => store.commit(&roots).and_then(|bundle| self.stored(&bundle)).map(Reply::Imported),
            Import::Abort => {
                store.abort();
                Ok(Reply::Done)
            }
        };
        Some(result.unwrap_or_else(Reply::Refused))
    }

    pub(super) fn forget_bundle(&mut self, bundle: &[u8; 32]) -> Reply {
        let in_use = self.bundles_in_use();
        self.launcher.store.forget(bundle, &in_use).map_or_else(Reply::Refused, |()| Reply::Done)
    }

    fn stored(&mut self, bundle: &[u8; 32]) -> Result<Option<Stored>, Refusal> {
        let Some(found) = self.launcher.store.get(bundle) else { return Ok(None) };
        let tier = self.launcher.policy.tier(&found.name, bundle, &found.origins, None, SystemTime::now())?;
        Ok(Some(Stored { tier: claimed(tier, found), bytes: found.bytes }))
    }

    /// The bundles that a launch runs from.
    fn bundles_in_use(&self) -> BTreeSet<[u8; 32]> {
        self.slots.values().map(|slot| slot.running.bundle).collect()
    }

    /// The files of a packet are copied, or one is wrong.
    pub(super) fn copied(&mut self) {
        let Some((request, result, pidfd)) = self.launcher.store.copied() else { return };
        let _ = epoll::delete(&self.epoll, &pidfd);
        if let Some(request) = request {
            self.reply(request, &result.map_or_else(Reply::Refused, |()| Reply::Done), vec![]);
        }
    }

    /// Lets the store do what waits.
    pub(super) fn start_chore(&mut self) -> io::Result<()> {
        if self.ending.is_some() {
            return Ok(());
        }
        if let Some(child) = self.launcher.store.start_chore() {
            let data = epoll::EventData::new_u64(Source::Chore.token());
            epoll::add(&self.epoll, child, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    /// Takes down what is mounted: the launcher ends.
    pub(crate) fn release_store(&mut self) {
        self.launcher.store.release();
    }
}
