//! The thread pool: kconv's own, so that it survives `fork` and never meets another library's work.
//!
//! A forked child inherits the pool's memory but none of its threads; rayon's global pool then waits for
//! ever. Here `pthread_atfork` marks the pool stale and its first use in the child builds a new one.

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant};

use crate::error::{Result, bail};

/// Work under this many nanoseconds (estimated on one core) stays on the calling thread: waking workers that sleep costs it 8 to
/// 10 us.
const SERIAL_NANOSECONDS: f64 = 30_000.0;

/// How long a thread stays awake that has nothing to do: a worker for the next call, a caller for the workers' last tasks. To fall
/// asleep and be woken up takes 20 to 50 us, as long as many a small layer. (kMobileNet V3 Large D6_16ch, one image of 224 x 224
/// through `kconv.torch`, two threads of an Intel Xeon: 5.9 ms asleep, 4.5 with workers awake, 3.5 with callers too; a training
/// step of 4 images 69 and 61. With 50 us or 1 ms the same.)
const AWAKE: Duration = Duration::from_micros(200);

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
/// How often [`parallel_for`] has called for workers: they wait for it to change.
static CALLS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn forked_child() {
    // One atomic add: all that may be done safely between fork and the child's own code.
    GENERATION.fetch_add(1, Ordering::SeqCst);
}

/// The workers of this process for the wanted number of threads, a caller among them; built where there are none.
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
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads - 1)
            .thread_name(|i| format!("kconv-{i}"))
            .build()
            .ok()?;
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

/// Calls `task(0..tasks)`, on `threads` threads, of which the caller is one. Tasks may run in any order; all have run on
/// return.
///
/// Were all threads workers, their caller would go to sleep just as they wake up and Linux may put two of them on one CPU,
/// where they stay: for some 50 ms, 40 to 40 channels of 31 x 31 took 0.8 ms instead of 0.4. Without that, one image of 7
/// layers takes 0.076 ms so, 0.049 this way.
pub fn parallel_for(threads: usize, tasks: usize, task: impl Fn(usize) + Sync) {
    let used = threads.min(tasks);
    let Some(workers) = (used > 1).then(|| pool(threads)).flatten() else { return (0..tasks).for_each(task) };
    // Each thread has neighbouring tasks, which find in the caches what the one before asked for. (All threads taking them in
    // turns: 4.6 ms for 7 layers that take 3.7.) Who has done his own takes from others'.
    let next: Vec<_> = (0..used).map(|thread| AtomicUsize::new(part(tasks, used, thread).start)).collect();
    let run = |thread: usize| {
        for other in (thread..used).chain(0..thread) {
            let end = part(tasks, used, other).end;
            loop {
                let i = next[other].fetch_add(1, Ordering::Relaxed);
                if i >= end {
                    break;
                }
                task(i);
            }
        }
    };
    // Who has done with an earlier call now looks for this one's tasks.
    let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let running = AtomicUsize::new(used - 1);
    workers.in_place_scope(|scope| {
        let (run, running) = (&run, &running);
        for thread in 1..used {
            scope.spawn(move |_| {
                run(thread);
                // A task of its own, which this call does not wait for.
                workers.spawn(move || wait_awake(|| CALLS.load(Ordering::Relaxed) != call));
                running.fetch_sub(1, Ordering::Release);
            });
        }
        run(0);
        wait_awake(|| running.load(Ordering::Acquire) == 0);
    });
}

/// Returns when it is `over`, or after [`AWAKE`]. Other threads have this one's CPU meanwhile, if they need it: other libraries' own
/// would else wait for it, and steps of theirs and kconv's in turn take up to 1.5 times as long.
fn wait_awake(over: impl Fn() -> bool) {
    let start = Instant::now();
    while !over() && start.elapsed() < AWAKE {
        std::thread::yield_now();
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
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn a_panic_of_any_task_reaches_the_caller() {
        for culprit in [0, 99] {
            let run = || parallel_for(2, 100, |i| assert_ne!(i, culprit));
            assert!(std::panic::catch_unwind(run).is_err());
        }
        // The workers live on.
        let sum = AtomicUsize::new(0);
        parallel_for(2, 100, |i| _ = sum.fetch_add(i, Ordering::SeqCst));
        assert_eq!(sum.into_inner(), 4950);
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
