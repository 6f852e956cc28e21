//! The thread pool: kconv's own, so that it survives `fork` and never meets another library's work;
//! where PyTorch calls, its [`team`](crate::team).
//!
//! A forked child inherits the pool's memory but none of its threads; rayon's global pool then
//! waits for ever. Here the pool knows its process (see [`lock`](crate::lock)) and its first use in
//! the child builds a new one.

use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::cpus::available_cpus;
use crate::error::{Result, bail};
use crate::lock::{Lock, generation};
use crate::team::Team;

/// Work under this many nanoseconds (estimated on one core) stays on the calling thread: waking
/// workers that sleep costs it 8 to 10 us.
const SERIAL_NANOSECONDS: f64 = 30_000.0;

/// How long a thread stays awake that has nothing to do: a worker for the next call, a caller for
/// the workers' last tasks. To fall asleep and be woken up takes 20 to 50 us, as long as many a
/// small layer. (kMobileNet V3 Large D6_16ch, one image of 224 x 224 through `kconv.torch`, two
/// threads of an Intel Xeon: 5.9 ms asleep, 4.5 with workers awake, 3.5 with callers too; a
/// training step of 4 images 69 and 61. With 50 us or 1 ms the same.)
const AWAKE: Duration = Duration::from_micros(200);

/// More threads than any machine has are a mistake in a setting.
const MAX_THREADS: usize = 1024;

/// The workers of a process; they end when nobody uses them any more.
struct Pool {
    generation: u64,
    threads: usize,
    workers: rayon::ThreadPool,
}

static CURRENT: Lock<Option<Arc<Pool>>> = Lock::new(None);
/// What [`set_num_threads`] set; 0 until then.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);
/// What [`follow`] was told last; 0 until then.
static FOLLOWED: AtomicUsize = AtomicUsize::new(0);
/// How often [`parallel_for`] has called for workers: they wait for it to change.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Forgets a pool of another process: its threads do not exist, and dropping it would wait for
/// them.
fn drop_if_own(pool: Option<Arc<Pool>>) {
    match pool {
        Some(pool) if pool.generation != generation() => std::mem::forget(pool),
        pool => drop(pool),
    }
}

/// Workers of this process for `threads` threads, a caller among them, or for more; built where
/// there are none.
fn pool(threads: usize) -> Option<Arc<Pool>> {
    let generation = generation();
    let fits = |pool: &&Arc<Pool>| pool.generation == generation && pool.threads >= threads;
    if let Some(pool) = CURRENT.with(|current| current.as_ref().filter(fits).cloned()) {
        return Some(pool);
    }
    let workers =
        rayon::ThreadPoolBuilder::new().num_threads(threads - 1).thread_name(|i| format!("kconv-{i}")).build().ok()?;
    let pool = Arc::new(Pool { generation, threads, workers });
    // Another thread may have built one meanwhile; that one's calls are then the last to use it.
    drop_if_own(CURRENT.with(|current| current.replace(pool.clone())));
    Some(pool)
}

/// Lets workers go that are more than that many threads need, as soon as running calls are done
/// with them.
fn shrink(threads: usize) {
    let larger = |pool: &mut Arc<Pool>| pool.threads > threads;
    drop_if_own(CURRENT.with(|current| current.take_if(larger)));
}

/// How many threads kernels use: [`set_num_threads`], else `KCONV_NUM_THREADS`, else what the
/// framework uses that calls them ([`follow`]), else `OMP_NUM_THREADS`, else one for each CPU that
/// this process may run on.
pub fn num_threads() -> usize {
    let set = |threads: &AtomicUsize| Some(threads.load(Ordering::Relaxed)).filter(|&threads| threads > 0);
    set(&CHOSEN).unwrap_or_else(|| {
        let Environment { kconv, other } = environment();
        kconv.as_ref().ok().copied().flatten().or_else(|| set(&FOLLOWED)).unwrap_or(*other)
    })
}

/// What the environment says about threads.
struct Environment {
    /// `KCONV_NUM_THREADS`, where it is set.
    kconv: Result<Option<usize>>,
    /// What holds where nothing else was said.
    other: usize,
}

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let variable = |name| std::env::var_os(name).map(|value| value.to_string_lossy().trim().to_owned());
        let cpus = || available_cpus(Path::new("/")).min(MAX_THREADS);
        // OpenMP's is a list for nested regions; what is wrong with it is for OpenMP to say.
        let openmp = variable("OMP_NUM_THREADS").and_then(|list| list.split(',').next()?.trim().parse().ok());
        let openmp = openmp.filter(|&threads| threads > 0).map(|threads: usize| threads.min(MAX_THREADS));
        Environment { kconv: parse(variable("KCONV_NUM_THREADS")), other: openmp.unwrap_or_else(cpus) }
    })
}

/// Reads `KCONV_NUM_THREADS`; an empty text is as good as none.
fn parse(value: Option<String>) -> Result<Option<usize>> {
    match value.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => match text.parse() {
            Ok(threads) if (1..=MAX_THREADS).contains(&threads) => Ok(Some(threads)),
            _ => bail!("KCONV_NUM_THREADS={text:?}, expected a number from 1 to {MAX_THREADS}"),
        },
    }
}

/// Checks `KCONV_NUM_THREADS`.
pub fn check_environment() -> Result<()> {
    environment().kconv.as_ref().map(|_| ()).map_err(Clone::clone)
}

/// Uses as many threads as the framework that calls, unless kconv's own settings say how many.
pub fn follow(threads: usize) {
    let threads = threads.clamp(1, MAX_THREADS);
    // A store at every call would take the line from other threads' caches.
    if FOLLOWED.load(Ordering::Relaxed) != threads {
        FOLLOWED.store(threads, Ordering::Relaxed);
        shrink(num_threads());
    }
}

/// Sets how many threads kernels use from now on.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if !(1..=MAX_THREADS).contains(&threads) {
        bail!("num_threads={threads}, expected 1 to {MAX_THREADS}");
    }
    CHOSEN.store(threads, Ordering::Relaxed);
    shrink(threads);
    Ok(())
}

/// Whether work of this estimated size is worth more than one thread.
pub fn is_worth_threads(nanoseconds: f64) -> bool {
    nanoseconds >= SERIAL_NANOSECONDS
}

/// How many threads work of this estimated size is worth.
pub fn threads_for(nanoseconds: f64) -> usize {
    if is_worth_threads(nanoseconds) { num_threads() } else { 1 }
}

/// Calls `task(0..tasks)`, on `threads` threads, of which the caller is one. Tasks may run in any
/// order; all have run on return.
///
/// Were all threads workers, their caller would go to sleep just as they wake up and Linux may put
/// two of them on one CPU, where they stay: for some 50 ms, 40 to 40 channels of 31 x 31 took 0.8
/// ms instead of 0.4. Without that, one image of 7 layers takes 0.076 ms so, 0.049 as it is.
pub fn parallel_for(threads: usize, tasks: usize, task: impl Fn(usize) + Sync) {
    let used = threads.min(tasks);
    if used <= 1 {
        return (0..tasks).for_each(task);
    }
    // Each thread has neighbouring tasks, which find in the caches what the one before has read.
    // (All threads taking them in
    // turns: 4.6 ms for 7 layers that take 3.7.) Who has done his own takes from others'.
    let next: Vec<_> = (0..used).map(|thread| AtomicUsize::new(part(tasks, used, thread).start)).collect();
    let take = |thread: usize| {
        for other in (thread..used).chain(0..thread.min(used)) {
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
    // A panic of any thread's is the caller's, once nobody is in the call any more.
    let panic = Mutex::new(None);
    let run = |thread: usize| {
        if let Err(found) = catch_unwind(AssertUnwindSafe(|| take(thread))) {
            *panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        }
    };
    if let Some(team) = Team::lent(threads) {
        team.run(threads, &run);
    } else if let Some(pool) = pool(threads) {
        run_by(&pool.workers, used, &run);
    } else {
        run(0);
    }
    if let Some(panic) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

/// Calls `run(0..used)`, which must not panic: 0 on this thread, the others on workers that come in
/// time.
fn run_by(workers: &rayon::ThreadPool, used: usize, run: &(dyn Fn(usize) + Sync)) {
    // Who has done with an earlier call now looks for this one's tasks.
    let number = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let call = Call::open(run);
    for thread in 1..used {
        let call = Arc::clone(&call.0);
        workers.spawn(move || {
            call.enter(thread);
            // A task of its own, which does not keep the next call's from another worker.
            if CALLS.load(Ordering::Relaxed) == number {
                rayon::spawn(move || wait_awake(|| CALLS.load(Ordering::Relaxed) != number));
            }
        });
    }
    run(0);
}

/// A call of [`parallel_for`], which workers may enter until it is closed. Those that come too
/// late, because they sleep or other programs have their CPUs, are not waited for: the others have
/// done their tasks.
///
/// (Weight gradients of the 31 pointwise layers of kEffNet-B0 for one image of 224 x 224, NCHW, two
/// threads of an Intel Xeon whose second CPU is taken away at times: 1.3 to 6.9 ms waiting for all,
/// 1.1 to 1.2 so.)
struct Call {
    /// Does a thread's tasks, then others'. Borrowed until the call is closed.
    run: *const (dyn Fn(usize) + Sync),
    /// How many workers are in the call; plus [`CLOSED`].
    inside: AtomicUsize,
    caller: Thread,
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
        let (inside, caller) = (AtomicUsize::new(0), std::thread::current());
        OpenCall(Arc::new(Self { run, inside, caller }), PhantomData)
    }

    /// Does tasks, unless the call is closed.
    fn enter(&self, thread: usize) {
        let enter = |inside| (inside < CLOSED).then_some(inside + 1);
        if self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: the call was open; it is not left before this worker is outside again.
        unsafe { (*self.run)(thread) };
        if self.inside.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.caller.unpark();
        }
    }
}

impl Drop for OpenCall<'_> {
    /// Waits for the workers that have entered.
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

/// Returns when it is `over`, or after [`AWAKE`]. Other threads have this one's CPU meanwhile, if
/// they need it: other libraries' own would else wait for it, and steps of theirs and kconv's in
/// turn take up to 1.5 times as long.
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
        // As many as other tests may have set.
        let pool = pool(2).unwrap();
        let waits = Arc::new(Mutex::new(wait));
        for _ in 1..pool.threads {
            let wait = waits.clone();
            pool.workers.spawn(move || _ = wait.lock().map(|wait| wait.recv()));
        }
        let sum = AtomicUsize::new(0);
        parallel_for(2, 100, |i| _ = sum.fetch_add(i, Ordering::SeqCst));
        assert_eq!(sum.into_inner(), 4950);
        // The workers are free from here on.
        (1..pool.threads).for_each(|_| done.send(()).unwrap());
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
        let read = |text: &str| parse(Some(text.to_owned()));
        assert_eq!((parse(None), read(""), read("7")), (Ok(None), Ok(None), Ok(Some(7))));
        for text in ["0", "-1", "1025", "two", "1.5", "99999999999999999999"] {
            assert!(read(text).unwrap_err().to_string().contains(&format!("{text:?}, expected a number from 1")));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn workers_end_with_their_pool() {
        let pool = Pool {
            generation: 0,
            threads: 3,
            workers: rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap(),
        };
        let (gone, wait) = std::sync::mpsc::channel::<()>();
        // The channel closes when both workers have dropped their thread's value.
        thread_local!(static ALIVE: std::cell::RefCell<Option<std::sync::mpsc::Sender<()>>> = const { std::cell::RefCell::new(None) });
        pool.workers.broadcast(|_| ALIVE.set(Some(gone.clone())));
        drop(gone);
        drop(pool);
        assert_eq!(wait.recv_timeout(Duration::from_secs(10)), Err(std::sync::mpsc::RecvTimeoutError::Disconnected));
    }
}
