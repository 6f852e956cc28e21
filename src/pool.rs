//! The thread pool: kconv's own, so that it survives `fork` and never meets another library's work.
//!
//! A forked child inherits the pool's memory but none of its threads; rayon's global pool then waits for
//! ever. Here `pthread_atfork` marks the pool stale and its first use in the child builds a new one.

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

use rayon::prelude::*;

use crate::error::{Result, bail};

/// Work under this many nanoseconds (estimated on one core) stays on the calling thread: entering the
/// pool costs 12-16 us.
const SERIAL_NANOSECONDS: f64 = 30_000.0;

/// More threads than any machine has are a mistake in a setting.
const MAX_THREADS: usize = 1024;

struct Pool {
    generation: u64,
    threads: usize,
    workers: rayon::ThreadPool,
}

static GENERATION: AtomicU64 = AtomicU64::new(0);
static CURRENT: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());
/// 0 until set: see [`num_threads`].
static THREADS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn forked_child() {
    // One atomic add: all that may be done safely between fork and the child's own code.
    GENERATION.fetch_add(1, Ordering::SeqCst);
}

/// The pool of this process with the wanted number of threads, built where there is none.
fn pool(threads: usize) -> Option<&'static rayon::ThreadPool> {
    static ATFORK: Once = Once::new();
    ATFORK.call_once(|| {
        // SAFETY: registers a handler that does one atomic add.
        unsafe { libc::pthread_atfork(None, None, Some(forked_child)) };
    });
    loop {
        let generation = GENERATION.load(Ordering::Acquire);
        let current = CURRENT.load(Ordering::Acquire);
        // SAFETY: pools are leaked once published, so a published pointer stays valid.
        if let Some(pool) = unsafe { current.as_ref() }
            && pool.generation == generation
            && pool.threads == threads
        {
            return Some(&pool.workers);
        }
        // The old pool is leaked: after a fork its threads do not exist and dropping it would wait for
        // them; after `set_num_threads` another thread may still be using it.
        let workers =
            rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kconv-{i}")).build().ok()?;
        let new = Box::into_raw(Box::new(Pool { generation, threads, workers }));
        if CURRENT.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: lost the race; this pool was never published.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

/// How many threads kernels use: [`set_num_threads`], else `KCONV_NUM_THREADS`, else one for each CPU that
/// this process may run on.
pub fn num_threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => default_threads(),
        threads => threads,
    }
}

fn default_threads() -> usize {
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        std::env::var("KCONV_NUM_THREADS")
            .ok()
            .and_then(|value| value.trim().parse().ok())
            .filter(|threads| (1..=MAX_THREADS).contains(threads))
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    })
}

/// Sets how many threads kernels use from now on.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if !(1..=MAX_THREADS).contains(&threads) {
        bail!("num_threads={threads}, expected 1 to {MAX_THREADS}");
    }
    THREADS.store(threads, Ordering::Relaxed);
    Ok(())
}

/// How many threads work of this estimated size is worth.
pub fn threads_for(nanoseconds: f64) -> usize {
    if nanoseconds < SERIAL_NANOSECONDS { 1 } else { num_threads() }
}

/// Calls `task(0..tasks)`, on `threads` threads. Tasks may run in any order; all have run on return.
pub fn parallel_for(threads: usize, tasks: usize, task: impl Fn(usize) + Sync) {
    if threads > 1
        && tasks > 1
        && let Some(workers) = pool(threads)
    {
        workers.install(|| (0..tasks).into_par_iter().for_each(&task));
    } else {
        (0..tasks).for_each(task);
    }
}

/// Calls `body` on one of the pool's own threads, where each [`parallel_for`] of as many threads saves its caller's way
/// into the pool and back: for work that calls it many times.
pub fn on_worker<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    if threads > 1
        && let Some(workers) = pool(threads)
    {
        workers.install(body)
    } else {
        body()
    }
}

/// Task `i` of `parts` nearly equal parts of `0..len`.
pub fn part(len: usize, parts: usize, i: usize) -> std::ops::Range<usize> {
    i * len / parts..(i + 1) * len / parts
}

/// A range in chunks of at most `size`.
pub fn chunks(range: std::ops::Range<usize>, size: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    range.clone().step_by(size).map(move |start| start..(start + size).min(range.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let counts: Vec<_> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            parallel_for(threads, 100, |i| {
                counts[i].fetch_add(1, Ordering::SeqCst);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::SeqCst) == 1));
        }
    }

    #[test]
    fn parts_cover_the_range() {
        for (len, parts) in [(0, 3), (2, 3), (10, 3), (9, 3)] {
            let joined: Vec<_> = (0..parts).flat_map(|i| part(len, parts, i)).collect();
            assert_eq!(joined, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn thread_counts_are_checked() {
        assert!(set_num_threads(0).unwrap_err().to_string().contains("num_threads=0"));
    }
}
