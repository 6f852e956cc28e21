//! Locks that a `fork` cannot leave locked for ever.
//!
//! A forked child has a copy of all memory but only the thread that forked: what another thread had
//! locked stays locked. These locks know in which process they were taken, and a child takes over
//! what its parent's threads held.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How many forks lie between this process and the one that loaded kconv.
static GENERATION: AtomicU64 = AtomicU64::new(0);

extern "C" fn forked_child() {
    // One atomic add: all that may be done safely between fork and the child's own code.
    GENERATION.fetch_add(1, Ordering::SeqCst);
}

/// The process's number: another one in a forked child. The first call must come before there are
/// threads to fork beside.
pub fn generation() -> u64 {
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if !REGISTERED.load(Ordering::Relaxed) && !REGISTERED.swap(true, Ordering::Relaxed) {
        // Neither Miri nor Windows has `pthread_atfork`, and neither forks.
        #[cfg(all(unix, not(miri)))]
        // SAFETY: registers a handler that does one atomic add.
        unsafe {
            libc::pthread_atfork(None, None, Some(forked_child))
        };
        #[cfg(not(all(unix, not(miri))))]
        let _ = forked_child;
    }
    GENERATION.load(Ordering::Acquire)
}

/// A value that one thread at a time may change, for moments: who waits keeps asking.
#[derive(Debug, Default)]
pub struct Lock<T> {
    /// 0 when free, else the generation that has taken it, plus 1.
    holder: AtomicU64,
    value: UnsafeCell<T>,
}

// SAFETY: one thread at a time has access to the value.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T: Default> Lock<T> {
    /// A free lock.
    pub const fn new(value: T) -> Self {
        Self { holder: AtomicU64::new(0), value: UnsafeCell::new(value) }
    }

    /// Changes the value. `change` must not use this lock, and should do nothing that takes long.
    pub fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        struct Held<'a>(&'a AtomicU64);
        impl Drop for Held<'_> {
            fn drop(&mut self) {
                self.0.store(0, Ordering::Release);
            }
        }
        let own = generation() + 1;
        let orphaned = loop {
            match self.holder.compare_exchange_weak(0, own, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break false,
                // Its holder is a thread of the parent's, which this process does not have.
                Err(holder) if holder != 0 && holder != own => {
                    if self.holder.compare_exchange(holder, own, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                        break true;
                    }
                }
                Err(_) => std::thread::yield_now(),
            }
        };
        let held = Held(&self.holder);
        if orphaned {
            // Whatever state the change was in: the old value is left alone, and with it what it
            // owns.
            // SAFETY: this thread holds the lock.
            unsafe { self.value.get().write(T::default()) };
        }
        // SAFETY: as above, until `held` is dropped.
        let result = change(unsafe { &mut *self.value.get() });
        drop(held);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time() {
        let (lock, rounds) = (Lock::new(0usize), if cfg!(miri) { 10 } else { 10_000 });
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..rounds).for_each(|_| lock.with(|sum| *sum += 1)));
            }
        });
        assert_eq!(lock.with(|sum| *sum), 4 * rounds);
    }

    #[test]
    fn a_panic_leaves_it_free() {
        let lock = Lock::new(1);
        let panic = std::panic::AssertUnwindSafe(|| lock.with(|_| panic!("on purpose")));
        assert!(std::panic::catch_unwind(panic).is_err());
        assert_eq!(lock.with(|value| *value), 1);
    }

    #[test]
    fn what_another_process_held_is_taken_over() {
        let lock = Lock::new(vec![1]);
        lock.holder.store(generation() + 2, Ordering::Relaxed);
        assert!(lock.with(|value| value.is_empty()));
        lock.with(|value| value.push(2));
        assert_eq!(lock.with(|value| value.clone()), [2]);
    }
}
