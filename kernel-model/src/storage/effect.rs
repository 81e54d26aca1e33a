//! The effects of operations on files, at the moment when they end.

use super::{DriveLoss, FileState, Inner, IoCounts, OpenFile, Running, Slot};
use crate::faults::{Fault, IoOp, SYNC_LOST, SyncErrors};
use crate::inode::Pending;
use crate::pages::PAGE;
use sim::{Entity, Timed};
use std::rc::Rc;
use tap_host::{Errno, SECTOR_BYTES, ZeroMode};

impl Inner {
    pub(super) fn effect(&self, running: &mut Running) -> Result<usize, Errno> {
        let len = running.len as usize;
        let mut counts = self.counts.get();
        counts.bytes += len as u64;
        self.counts.set(counts);
        let device = running.open.file.device.get();
        if let Fault::Error(error, _) = running.fault {
            let drops = match running.op {
                IoOp::Zero(_) if device => error != Errno::EAGAIN,
                IoOp::Zero(mode) => self.drops_first(mode, error),
                _ => false,
            };
            if drops {
                self.drop_pages(running);
            }
        }
        let landed = match running.fault {
            Fault::None | Fault::Stuck => len,
            Fault::Error(_, part) => part_of(len, part),
            Fault::DropsPages(early) => {
                if !early {
                    self.drop_pages(running);
                }
                return Err(Errno::ENOSPC);
            }
            Fault::Nothing if running.open.direct => len,
            Fault::Nothing => 0,
            Fault::Short(part) => {
                // A direct transfer ends with a whole sector of its drive.
                let sector =
                    if running.open.direct { self.direct_align() as usize } else { SECTOR_BYTES as usize };
                let moved = part_of(len, part);
                (moved - moved % sector).max(len.min(sector))
            }
        };
        let landed = if device && running.op == IoOp::Write {
            // The space of a device is finite.
            let room = running.open.file.inode.borrow().live.size.saturating_sub(running.offset);
            if room == 0 && landed > 0 {
                return Err(Errno::ENOSPC);
            }
            landed.min(room.min(len as u64) as usize)
        } else {
            landed
        };
        // An operation that fails for another reason stops at a bad place as well.
        let Some(landed) = self.up_to_bad(running, landed) else {
            return Err(self.meets_bad(running));
        };
        let done = match running.op {
            IoOp::Read => self.effect_read(running, landed),
            IoOp::Write => self.effect_write(running, landed),
            IoOp::Zero(mode) => self.effect_zero(running, mode, landed),
            IoOp::Sync => return self.effect_sync(running),
        };
        match running.fault {
            Fault::Error(error, _) => {
                if error == Errno::EIO {
                    self.count_failed();
                }
                Err(error)
            }
            _ => Ok(done),
        }
    }

    fn count_failed(&self) {
        let counts = self.counts.get();
        self.counts.set(IoCounts { failed: counts.failed + 1, ..counts });
    }

    /// The operation fails at a sector that cannot be read.
    fn meets_bad(&self, running: &Running) -> Errno {
        let drawn = match running.fault {
            Fault::Error(error, _) => Some(error),
            _ => None,
        };
        if drawn.is_none()
            && let IoOp::Zero(mode) = running.op
            && self.drops_first(mode, Errno::EIO)
        {
            self.drop_pages(running);
        }
        let error = drawn.unwrap_or(Errno::EIO);
        if error == Errno::EIO {
            self.count_failed();
        }
        error
    }

    /// Whether zeros of a file that end with `error` have dropped the dirty pages of their range before.
    fn drops_first(&self, mode: ZeroMode, error: Errno) -> bool {
        error == Errno::EIO && (mode == ZeroMode::Keep || !self.config.borrow().holes_write_back)
    }

    fn effect_read(&self, running: &mut Running, landed: usize) -> usize {
        let inode = running.open.file.inode.borrow();
        let there = inode.live.size.saturating_sub(running.offset).min(landed as u64) as usize;
        let mut at = running.offset;
        let mut left = there;
        for buf in &mut running.bufs {
            let n = left.min(buf.len());
            inode.live.pages.read(at, &mut buf[..n]);
            at += n as u64;
            left -= n;
        }
        there
    }

    pub(super) fn effect_write(&self, running: &Running, landed: usize) -> usize {
        let mut inode = running.open.file.inode.borrow_mut();
        let pieces = running.bufs.iter().map(|buf| &buf[..]);
        inode.write_pieces(running.io, running.offset, landed as u64, pieces);
        if inode.pending_bytes() > self.config.borrow().write_back_bytes {
            inode.write_back_half();
        }
        drop(inode);
        let counts = self.counts.get();
        self.counts.set(IoCounts { written_bytes: counts.written_bytes + landed as u64, ..counts });
        landed
    }

    pub(super) fn effect_zero(&self, running: &Running, mode: ZeroMode, landed: usize) -> usize {
        let mut inode = running.open.file.inode.borrow_mut();
        inode.zero(running.io, running.offset, landed as u64, mode);
        if inode.pending_bytes() > self.config.borrow().write_back_bytes {
            inode.write_back_half();
        }
        landed
    }

    /// Drops dirty pages, as ext4 does for a buffered file before it finds that there is no space for zeros, and Linux
    /// for a block device before it asks the drive.
    pub(super) fn drop_pages(&self, running: &Running) {
        self.drop_range(&running.open, running.offset, running.len);
    }

    /// Counts zeros that are refused.
    pub(crate) fn refuse_zeros(&self) -> Errno {
        let counts = self.counts.get();
        self.counts.set(IoCounts { refused_zeros: counts.refused_zeros + 1, ..counts });
        Errno::EOPNOTSUPP
    }

    pub(crate) fn drop_range(&self, open: &OpenFile, offset: u64, len: u64) {
        if !open.direct {
            let counts = self.counts.get();
            self.counts.set(IoCounts { dropped: counts.dropped + 1, ..counts });
            // If a device drops a part of a page, it forgets the sectors in that part.
            let block = if open.file.device.get() { SECTOR_BYTES } else { PAGE as u64 };
            open.file.inode.borrow_mut().drop_pages(offset, len, block);
        }
    }

    fn effect_sync(&self, running: &Running) -> Result<usize, Errno> {
        let file = &running.open.file;
        let lies = self.config.borrow().flush_lies;
        if file.sync_latched.get() {
            return Err(Errno::EIO);
        }
        let Fault::Error(error, _) = running.fault else {
            if !lies {
                file.inode.borrow_mut().harden(running.covers);
            }
            return Ok(0);
        };
        // Interrupted: nothing was given up.
        if error == Errno::EINTR {
            return Err(error);
        }
        let counts = self.counts.get();
        self.counts.set(IoCounts { failed_syncs: counts.failed_syncs + 1, ..counts });
        // A drive cannot be asked for the result of a flush whose caller died before it could note the answer, so that
        // is not in the fault model. What the drive gave up counts once the caller has the answer.
        if !running.open.direct {
            self.losses.set(self.losses.get() + 1);
            self.give_up(file, running.covers);
        }
        Err(error)
    }

    /// What a failed synchronisation does to the writes numbered below `covers`.
    pub(super) fn give_up(&self, file: &FileState, covers: u64) {
        let lost = |p: &Pending| {
            !(self.sim.decide(self.pending_entity(p), &SYNC_LOST, 0, |d| d.bits() & 0xff) as u8)
        };
        match self.config.borrow().sync_errors {
            SyncErrors::Retryable => {}
            SyncErrors::Linux => file.inode.borrow_mut().forget(covers, false, lost),
            SyncErrors::Reverts => file.inode.borrow_mut().forget(covers, true, |_| 0),
            SyncErrors::Latched => file.sync_latched.set(true),
        }
    }

    /// The entity of one page of one write.
    pub(super) fn pending_entity(&self, p: &Pending) -> Entity {
        let entity = p.io.child("page", p.page);
        self.sim.name_entity(entity, || format!("{}, page {}", self.sim.name_of(p.io), p.page));
        entity
    }
}

/// How an operation on `len` bytes ended, in words.
fn ended(result: Result<usize, Errno>, len: u64) -> String {
    match result {
        Ok(done) if (done as u64) < len => format!("ok, {done} of {len} bytes"),
        Ok(_) => "ok".into(),
        Err(error) => format!("failed with {error:?}"),
    }
}

/// `part`/255 of `len` bytes, in whole sectors; 255 is everything.
fn part_of(len: usize, part: u8) -> usize {
    if part == 255 {
        return len;
    }
    let sector = SECTOR_BYTES as usize;
    (len * usize::from(part) / 255) / sector * sector
}

impl Timed for Inner {
    fn fire(self: Rc<Self>, token: u64) {
        let index = token as usize;
        let taken = std::mem::replace(&mut self.slots.borrow_mut()[index], Slot::Free);
        let Slot::Running(mut running) = taken else { unreachable!("an operation ends once") };
        let result = self.effect(&mut running);
        self.sim.end_span(running.span, || ended(result, running.len));
        self.ops.set(self.ops.get() + 1);
        let Running { op, covers, bufs, waker, orphan, open, .. } = running;
        if orphan {
            self.free.borrow_mut().push(token as u32);
            drop(bufs);
        } else {
            let failed = op == IoOp::Sync && result.is_err_and(|e| e != Errno::EINTR);
            let lost = failed && open.direct && !open.file.sync_latched.get();
            let loss = lost.then(|| DriveLoss { file: Rc::clone(&open.file), covers });
            self.slots.borrow_mut()[index] = Slot::Done(result, bufs, loss);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        drop(open);
        let hook = self.hook.borrow().clone();
        if let Some(hook) = hook {
            hook(self.ops.get());
        }
    }
}
