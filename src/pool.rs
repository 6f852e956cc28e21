//! The thread pool: kconv's own, so that it survives `fork` and never meets another library's work.
//!
//! A forked child inherits the pool's memory but none of its threads; rayon's global pool then waits for
//! ever. Here `pthread_atfork` marks the pool stale and its first use in the child builds a new one.

use std::any::Any;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread::Thread;
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
    let number = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let call = Call::open(&run);
    for thread in 1..used {
        let call = Arc::clone(&call.0);
        workers.spawn(move || {
            call.enter(thread);
            // A task of its own, which does not keep the next call's from another worker.
            if CALLS.load(Ordering::Relaxed) == number {
                workers.spawn(move || wait_awake(|| CALLS.load(Ordering::Relaxed) != number));
            }
        });
    }
    run(0);
    call.close();
}

/// A call of [`parallel_for`], which workers may enter until it is closed. Those that come too late, because they sleep or other
/// programs have their CPUs, are not waited for: the others have done their tasks.
///
/// (Weight gradients of the 31 pointwise layers of kEffNet-B0 for one image of 224 x 224, NCHW, two threads of an Intel Xeon whose
/// second CPU is taken away at times: 1.3 to 6.9 ms waiting for all, 1.1 to 1.2 so.)
struct Call {
    /// Does a thread's tasks, then others'. Borrowed until the call is closed.
    run: *const (dyn Fn(usize) + Sync),
    /// How many workers are in the call; plus [`CLOSED`].
    inside: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// More than there are workers.
const CLOSED: usize = 1 << 31;

// SAFETY: what `run` points to is `Sync`, and lives as long as it is used: see `Call::enter`.
unsafe impl Send for Call {}
// SAFETY: as above.
unsafe impl Sync for Call {}

/// A [`Call`] that is closed when this is dropped, which it must be.
struct OpenCall<'a>(Arc<Call>, PhantomData<&'a ()>);

impl Call {
    fn open<'a>(run: &'a (dyn Fn(usize) + Sync + 'a)) -> OpenCall<'a> {
        let run: *const (dyn Fn(usize) + Sync + 'a) = run;
        // SAFETY: the same pointer; `OpenCall` keeps `run` borrowed while anybody uses it.
        let run =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), *const (dyn Fn(usize) + Sync)>(run) };
        let (inside, caller, panic) = (AtomicUsize::new(0), std::thread::current(), Mutex::new(None));
        OpenCall(Arc::new(Self { run, inside, caller, panic }), PhantomData)
    }

    /// Does tasks, unless the call is closed.
    fn enter(&self, thread: usize) {
        let enter = |inside| (inside < CLOSED).then_some(inside + 1);
        if self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: the call was open; it is not left before this worker is outside again.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.run)(thread) }));
        if let Err(panic) = result {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        if self.inside.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.caller.unpark();
        }
    }
}

impl OpenCall<'_> {
    /// Waits for the workers that have entered; a panic of theirs is the caller's.
    fn close(self) {
        let call = Arc::clone(&self.0);
        drop(self);
        let panic = call.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        let call = &self.0;
        call.inside.fetch_or(CLOSED, Ordering::Relaxed);
        let empty = || call.inside.load(Ordering::Acquire) == CLOSED;
        wait_awake(empty);
        while !empty() {
            std::thread::park();
        }
    }
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
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn a_worker_that_does_not_come_is_not_waited_for() {
        let (done, wait) = std::sync::mpsc::channel();
        pool(2).unwrap().spawn(move || _ = wait.recv());
        let sum = AtomicUsize::new(0);
        parallel_for(2, 100, |i| _ = sum.fetch_add(i, Ordering::SeqCst));
        assert_eq!(sum.into_inner(), 4950);
        // The only worker is free from here on.
        done.send(()).unwrap();
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
