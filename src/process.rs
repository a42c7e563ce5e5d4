//! Identity of the process across fork: a child must not change resources of its parent while the parent runs.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use once_cell::race::OnceRef;

use crate::sys::{self, Identity};

/// Returns a number that differs in a forked child. It is never 0.
///
/// A PID does not distinguish a child from its parent if they are in different PID namespaces, and PIDs are reused.
pub(crate) fn generation() -> u64 {
    // Of `race`, because no thread may wait for another here: in a forked child the other thread would not exist. If two
    // threads map a page at once, one page is never used.
    static WIPED_ON_FORK: OnceRef<'static, AtomicU64> = OnceRef::new();
    let Ok(cell) = WIPED_ON_FORK.get_or_try_init(sys::memory_wiped_on_fork) else {
        // Before Linux 4.14 such memory does not exist, and the PID is used.
        return u64::from(std::process::id());
    };
    match cell.load(Ordering::Acquire) {
        // At the fork, the clock was already past the parent's number.
        0 => match cell.compare_exchange(0, sys::monotonic_ns() | 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => cell.load(Ordering::Acquire),
            Err(first) => first,
        },
        known => known,
    }
}

/// A revision number that a process and its forked children share, for an object of the kernel that they share too. It is odd
/// while a change is in progress.
#[derive(Debug)]
pub(crate) struct Revision(*mut AtomicU64);

// SAFETY: an atomic number, which any thread and process may use.
#[allow(unsafe_code)]
unsafe impl Send for Revision {}

// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Revision {}

impl Revision {
    pub fn first() -> sys::Result<Revision> {
        sys::memory_shared_with_children().map(Revision)
    }

    fn cell(&self) -> &AtomicU64 {
        // SAFETY: the mapping is zero-filled, page-aligned, and exists until the value is dropped.
        #[allow(unsafe_code)]
        unsafe {
            &*self.0
        }
    }

    pub fn get(&self) -> u64 {
        self.cell().load(Ordering::Acquire)
    }

    /// Begins a change.
    pub fn begin(&self) {
        self.cell().fetch_or(1, Ordering::AcqRel);
    }

    /// Ends a change, and returns the new revision.
    pub fn finish(&self) -> u64 {
        let next = (self.get() | 1).wrapping_add(1);
        self.cell().store(next, Ordering::Release);
        next
    }
}

impl Drop for Revision {
    fn drop(&mut self) {
        // SAFETY: the pointer came from that function, and is not used after this.
        #[allow(unsafe_code)]
        unsafe {
            sys::unmap_shared(self.0);
        }
    }
}

/// Relation of this process to the process that created a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relation {
    Itself,
    /// A descendant of the creator, while the creator runs.
    ChildOfLiving,
    /// A descendant of the creator, after the creator has ended, executed another program, or released the resource.
    ChildOfEnded,
}

/// The process that created a resource.
#[derive(Debug)]
pub(crate) struct Maker {
    pub pid: u32,
    generation: u64,
    /// A file that the process keeps locked until it ends. (A pidfd would show the end too. Before Linux 6.9, however, all pidfds
    /// have the same inode as epoll instances and others, so a descriptor that the program has closed and reused could not be
    /// detected.) `None`: the file could not be created, for example in a sandbox.
    lock: Option<Held>,
}

impl Maker {
    /// Returns this process as the creator.
    pub fn new() -> Maker {
        let lock = sys::file_locked_by_this_process().ok().map(Held::new);
        Maker { pid: std::process::id(), generation: generation(), lock }
    }

    pub fn relation(&self) -> Relation {
        if self.generation == generation() {
            return Relation::Itself;
        }
        let lives = match self.lock.as_ref().and_then(Held::get) {
            Some(lock) => sys::is_locked_by_another(lock),
            None => sys::process_exists(self.pid),
        };
        if lives { Relation::ChildOfLiving } else { Relation::ChildOfEnded }
    }
}

/// A descriptor that is used and closed only if it still refers to the same file: a program may have closed all descriptors, and
/// opened another file with the same number.
#[derive(Debug)]
pub(crate) struct Held {
    fd: ManuallyDrop<OwnedFd>,
    identity: Option<Identity>,
}

impl Held {
    pub fn new(fd: impl Into<OwnedFd>) -> Held {
        let fd = fd.into();
        Held { identity: sys::identity_of(fd.as_fd()), fd: ManuallyDrop::new(fd) }
    }

    /// Returns the descriptor, if it still refers to the same file.
    pub fn get(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd()).filter(|fd| self.identity.is_some() && sys::identity_of(*fd) == self.identity)
    }

    /// Returns the descriptor without a check: only for the call that opened it or has called [`Held::get`].
    #[inline(always)]
    pub fn get_unchecked(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Another file that has the number now must not be closed.
        if self.get().is_some() {
            // SAFETY: the value is not used after this.
            #[allow(unsafe_code)]
            unsafe {
                ManuallyDrop::drop(&mut self.fd);
            }
        }
    }
}

/// The number of a descriptor that another value owns, and the identity of its file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    number: RawFd,
    identity: Identity,
}

impl Descriptor {
    pub fn of(fd: BorrowedFd<'_>) -> Option<Descriptor> {
        sys::identity_of(fd).map(|identity| Descriptor { number: fd.as_raw_fd(), identity })
    }

    /// Closes the descriptor, if it still refers to the same file. The owner must not be used or dropped afterwards.
    pub fn close(self) {
        // SAFETY: if the descriptor is not open, it is not used.
        #[allow(unsafe_code)]
        unsafe {
            if sys::identity_of(BorrowedFd::borrow_raw(self.number)) == Some(self.identity) {
                drop(OwnedFd::from_raw_fd(self.number));
            }
        }
    }
}

/// The mutex was locked by another thread when this process was forked, and is never unlocked in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LockedAtFork;

/// A mutex that reports if the thread that holds it exists only in the parent of this forked process.
#[derive(Debug)]
pub(crate) struct ForkMutex<T> {
    mutex: Mutex<T>,
    /// Generation of the process whose thread holds the lock; 0: not locked, or being locked.
    holder: AtomicU64,
}

pub(crate) struct ForkGuard<'a, T> {
    guard: MutexGuard<'a, T>,
    holder: &'a AtomicU64,
}

impl<T> ForkMutex<T> {
    /// Number of checks, one per millisecond, for the generation of the thread that is locking the mutex.
    const TRIES: u32 = 1000;

    pub fn new(value: T) -> ForkMutex<T> {
        ForkMutex { mutex: Mutex::new(value), holder: AtomicU64::new(0) }
    }

    pub fn lock(&self) -> Result<ForkGuard<'_, T>, LockedAtFork> {
        for _ in 0..Self::TRIES {
            let guard = match self.mutex.try_lock() {
                Ok(guard) => guard,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => match self.holder.load(Ordering::Acquire) {
                    0 => {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    holder if holder == generation() => self.mutex.lock().unwrap_or_else(PoisonError::into_inner),
                    _ => return Err(LockedAtFork),
                },
            };
            self.holder.store(generation(), Ordering::Release);
            return Ok(ForkGuard { guard, holder: &self.holder });
        }
        Err(LockedAtFork)
    }

    /// Returns the value, unless a thread of the parent holds the lock.
    pub fn into_inner(self) -> Result<T, LockedAtFork> {
        match self.lock().map(drop) {
            Ok(()) => Ok(self.mutex.into_inner().unwrap_or_else(PoisonError::into_inner)),
            Err(locked) => {
                // The value may be inconsistent: it is neither used nor dropped.
                std::mem::forget(self);
                Err(locked)
            }
        }
    }
}

impl<T> std::ops::Deref for ForkGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> std::ops::DerefMut for ForkGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T> Drop for ForkGuard<'_, T> {
    fn drop(&mut self) {
        self.holder.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_time::limit;
    use std::time::Instant;

    /// Runs a function in a forked child, and returns its exit status.
    #[allow(unsafe_code)]
    fn in_child(body: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child takes no lock of another thread, and ends by _exit.
        unsafe {
            match libc::fork() {
                0 => libc::_exit(i32::from(!body())),
                pid => {
                    let mut status = 0;
                    assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
                    status == 0
                }
            }
        }
    }

    #[test]
    fn generation_in_child_differs() {
        let own = generation();
        assert_eq!(own, generation());
        assert!(in_child(|| generation() != own && generation() == generation()));
        assert_eq!(own, generation());
    }

    #[test]
    fn relation_in_child_depends_on_life_of_maker() {
        let maker = Maker::new();
        assert_eq!(maker.relation(), Relation::Itself);
        assert!(in_child(|| maker.relation() == Relation::ChildOfLiving));
        // A grandchild continues after its parent, the creator, has ended.
        let (reader, writer) = std::io::pipe().unwrap();
        let deadline = Instant::now() + limit(10_000);
        assert!(in_child(|| {
            let maker = Maker::new();
            #[allow(unsafe_code)]
            // SAFETY: as in in_child().
            if unsafe { libc::fork() } == 0 {
                let mut ended = false;
                while !ended && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                    ended = maker.relation() == Relation::ChildOfEnded;
                }
                let _ = std::io::Write::write_all(&mut &writer, &[u8::from(ended)]);
            }
            true
        }));
        drop(writer);
        let mut said = Vec::new();
        std::io::Read::read_to_end(&mut &reader, &mut said).unwrap();
        assert_eq!(said, [1]);
    }

    #[test]
    fn revision_changed_in_child_is_seen_by_parent_and_odd_meanwhile() {
        let revision = Revision::first().unwrap();
        let before = revision.get();
        assert!(in_child(|| {
            revision.begin();
            true
        }));
        assert!(!revision.get().is_multiple_of(2));
        // The next change continues from the number of the interrupted one.
        revision.begin();
        let after = revision.finish();
        assert!(after == revision.get() && after != before && after.is_multiple_of(2));
    }

    /// All epoll instances have the same inode, and so do pidfds before Linux 6.9.
    #[test]
    fn maker_with_replaced_file_does_not_close_the_other() {
        let maker = Maker::new();
        let number = maker.lock.as_ref().and_then(Held::get).unwrap().as_raw_fd();
        // SAFETY: plain system calls on descriptors of this test.
        #[allow(unsafe_code)]
        let reused = unsafe {
            let other = OwnedFd::from_raw_fd(libc::epoll_create1(0));
            assert_eq!(libc::dup2(other.as_raw_fd(), number), number);
            OwnedFd::from_raw_fd(number)
        };
        drop(maker);
        assert!(sys::identity_of(reused.as_fd()).is_some(), "it was closed");
    }

    #[test]
    fn descriptor_replaced_is_neither_used_nor_closed() {
        let file = |name: &str| OwnedFd::from(std::fs::File::open(name).unwrap());
        let held = Held::new(file("/dev/null"));
        let number = held.get().unwrap().as_raw_fd();
        let other = file("/dev/zero");
        // SAFETY: plain system calls on descriptors of this test.
        #[allow(unsafe_code)]
        let reused = unsafe {
            assert_eq!(libc::dup2(other.as_raw_fd(), number), number);
            OwnedFd::from_raw_fd(number)
        };
        assert!(held.get().is_none());
        drop(held);
        assert!(sys::identity_of(reused.as_fd()).is_some(), "it was closed");
    }

    #[test]
    fn mutex_held_at_fork_is_refused_in_child() {
        let mutex = ForkMutex::new(7);
        let (locked, unlock) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _guard = mutex.lock().unwrap();
                locked.wait();
                unlock.wait();
            });
            locked.wait();
            assert!(in_child(|| mutex.lock().err() == Some(LockedAtFork)));
            unlock.wait();
            assert_eq!(*mutex.lock().unwrap(), 7);
        });
        assert!(in_child(|| mutex.lock().is_ok()));
        assert_eq!(mutex.into_inner(), Ok(7));
    }
}
