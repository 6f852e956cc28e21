//! The OpenMP threads of a framework that calls: PyTorch's.
//!
//! GNU's OpenMP keeps its threads spinning for milliseconds after each operator, on CPUs that
//! kconv's own threads then wait for: eight images of 224 x 224 through timm's MobileNet V2, whose
//! convolutions are kconv's and whose norms are PyTorch's, took 116 ms so, and 68 where PyTorch's
//! threads were told to sleep (`OMP_WAIT_POLICY=PASSIVE`; two threads of an AMD EPYC). As one of
//! the framework's own parallel regions, kconv's work finds these threads awake.
//!
//! But a region ends only when all its threads have come, though others may have done their tasks.
//! Where other programs have a thread's CPU, kconv's own threads, which are not waited for, are the
//! better ones: whenever a thread was [`LATE`] they take over, [`AVOIDED`] times as long. (A
//! training step of mobilenetv2_100, 4 images of 160 x 160, beside programs that had nearly all of
//! one of two CPUs: 2.8 s, and 0.6 so.)

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::library::Library;
use crate::lock::generation;

/// `GOMP_parallel(function, data, threads, flags)`, which GCC has code call since 4.9; LLVM's and
/// Intel's OpenMP have it, too.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
/// `omp_get_thread_num()`.
type ThreadNum = unsafe extern "C" fn() -> c_int;

/// An OpenMP library that the process has loaded.
#[derive(Clone, Copy, Debug)]
pub struct Team {
    parallel: Parallel,
    thread_num: ThreadNum,
    generation: u64,
    /// When it may be used again, as [`now`] has it.
    free_again: &'static AtomicU64,
}

/// How long a thread may be waited for that had nothing to do any more when it came; one that has
/// slept comes in a tenth of it.
const LATE: Duration = Duration::from_micros(500);
/// How many times as long as was waited for it a late thread's team is left alone, so that waiting
/// takes a twentieth of the time.
const AVOIDED: u32 = 20;

/// Nanoseconds since the first call.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

thread_local! {
    /// The team, and the number of its threads, that this thread's calls may use.
    static LENT: Cell<Option<(Team, usize)>> = const { Cell::new(None) };
}

impl Team {
    /// The OpenMP that a library depends on which the process has loaded; none in a process that
    /// was forked, whose OpenMP may wait for threads that only the parent has.
    #[must_use]
    pub fn of(library: &Path) -> Option<Self> {
        static FREE_AGAIN: AtomicU64 = AtomicU64::new(0);
        let generation = generation();
        if is_forked()? {
            return None;
        }
        let library = Library::loaded(library)?;
        let (parallel, thread_num) = (library.symbol(c"GOMP_parallel")?, library.symbol(c"omp_get_thread_num")?);
        // SAFETY: these names have had these signatures wherever they are defined.
        unsafe {
            Some(Self {
                parallel: std::mem::transmute::<NonNull<c_void>, Parallel>(parallel),
                thread_num: std::mem::transmute::<NonNull<c_void>, ThreadNum>(thread_num),
                generation,
                free_again: &FREE_AGAIN,
            })
        }
    }

    /// Has the team's `threads` threads do what `work` divides by [`parallel_for`].
    ///
    /// [`parallel_for`]: crate::pool::parallel_for
    pub fn lend<R>(self, threads: usize, work: impl FnOnce() -> R) -> R {
        struct Back(Option<(Team, usize)>);
        impl Drop for Back {
            fn drop(&mut self) {
                LENT.set(self.0);
            }
        }
        let _back = Back(LENT.replace(Some((self, threads))));
        work()
    }

    /// The team that was lent to this thread, if it has as many threads (OpenMP ends threads that a
    /// smaller region does not use), and none was late a moment ago.
    pub(crate) fn lent(threads: usize) -> Option<Self> {
        let (team, size) = LENT.get()?;
        let free_again = team.free_again.load(Ordering::Relaxed);
        let free = free_again == 0 || now() >= free_again;
        (size == threads && team.generation == generation() && free).then_some(team)
    }

    /// Calls `run(0..threads)`, each on a thread of its own, or on fewer threads where OpenMP has
    /// no more. `run` must not panic: it has frames of C between it and the caller.
    pub(crate) fn run(self, threads: usize, run: &(dyn Fn(usize) + Sync)) {
        let (came, alone) = (AtomicUsize::new(0), OnceLock::new());
        let job = Job { run, threads, thread_num: self.thread_num, came, alone };
        let data = std::ptr::from_ref(&job).cast_mut().cast();
        // SAFETY: the job outlives the region, which ends before the call returns.
        unsafe { (self.parallel)(enter, data, threads as c_uint, 0) };
        let waited = job.alone.get().map_or(Duration::ZERO, Instant::elapsed);
        if job.came.load(Ordering::Relaxed) == threads && waited > LATE {
            self.free_again.store(now() + (AVOIDED * waited).as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

struct Job<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    threads: usize,
    thread_num: ThreadNum,
    came: AtomicUsize,
    /// Since when a thread that had found nothing more to do waited for others to come.
    alone: OnceLock<Instant>,
}

extern "C" fn enter(data: *mut c_void) {
    // SAFETY: `Team::run` passes its job, which all threads share.
    let job = unsafe { &*data.cast::<Job<'_>>() };
    // SAFETY: OpenMP's function without arguments.
    let thread = unsafe { (job.thread_num)() } as usize;
    job.came.fetch_add(1, Ordering::Relaxed);
    (job.run)(thread);
    if job.came.load(Ordering::Relaxed) < job.threads {
        _ = job.alone.set(Instant::now());
    }
}

/// Whether the process was forked and has executed no program since: `PF_FORKNOEXEC` of
/// `/proc/self/stat`. None where there is no such file.
fn is_forked() -> Option<bool> {
    const PF_FORKNOEXEC: u64 = 0x40;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses; the ninth holds the flags.
    let flags: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()?;
    Some(flags & PF_FORKNOEXEC != 0)
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;
    use std::sync::Mutex;

    use super::*;
    use crate::pool::parallel_for;

    thread_local!(static NUMBER: Cell<c_int> = const { Cell::new(0) });

    /// OpenMP by threads of the standard library's.
    extern "C" fn parallel(call: extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, _: c_uint) {
        let data = data as usize;
        std::thread::scope(|scope| {
            for number in 0..threads as c_int {
                scope.spawn(move || {
                    NUMBER.set(number);
                    call(data as *mut c_void);
                });
            }
        });
    }

    extern "C" fn thread_num() -> c_int {
        NUMBER.get()
    }

    fn team() -> Team {
        Team { parallel, thread_num, generation: generation(), free_again: Box::leak(Box::default()) }
    }

    /// The threads that did the tasks, and how often each task was done.
    fn tasks_done(threads: usize, tasks: usize) -> (Vec<c_int>, Vec<usize>) {
        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        let numbers = Mutex::new(Vec::new());
        parallel_for(threads, tasks, |i| {
            counts[i].fetch_add(1, Ordering::SeqCst);
            numbers.lock().unwrap().push(NUMBER.get());
        });
        (numbers.into_inner().unwrap(), counts.into_iter().map(AtomicUsize::into_inner).collect())
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn a_lent_team_does_each_task_once() {
        for (threads, tasks) in [(2, 100), (5, 100), (5, 3)] {
            NUMBER.set(-1);
            let (numbers, counts) = team().lend(threads, || tasks_done(threads, tasks));
            assert_eq!(counts, vec![1; tasks]);
            assert!(numbers.iter().all(|number| (0..threads as c_int).contains(number)), "{numbers:?}");
            // Own threads again, and where the team has another size.
            for numbers in [tasks_done(threads, tasks).0, team().lend(1, || tasks_done(threads, tasks).0)] {
                assert!(numbers.iter().all(|number| [-1, 0].contains(number)), "{numbers:?}");
            }
        }
    }

    /// [`parallel`] on two threads, of which the second comes when the first has long been done.
    extern "C" fn busy(call: extern "C" fn(*mut c_void), data: *mut c_void, _: c_uint, _: c_uint) {
        NUMBER.set(0);
        call(data);
        std::thread::sleep(200 * LATE);
        parallel(call, data, 1, 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn a_team_with_a_late_thread_is_avoided() {
        let late = Team { parallel: busy, ..team() };
        let is_lent = |team: Team| team.lend(2, || Team::lent(2)).is_some();
        assert!(is_lent(late));
        assert_eq!(late.lend(2, || tasks_done(2, 4)).1, vec![1; 4]);
        assert!(late.free_again.load(Ordering::Relaxed) > now());
        assert!(!is_lent(late));
        late.free_again.store(now(), Ordering::Relaxed);
        assert!(is_lent(late));
        // All threads have come where OpenMP has fewer.
        extern "C" fn one(call: extern "C" fn(*mut c_void), data: *mut c_void, _: c_uint, _: c_uint) {
            call(data);
            std::thread::sleep(2 * LATE);
        }
        let alone = Team { parallel: one, ..team() };
        alone.lend(2, || tasks_done(2, 4));
        assert!(is_lent(alone));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no pthread_atfork")]
    fn a_panic_in_a_team_reaches_the_caller() {
        for culprit in [0, 99] {
            let run = || team().lend(2, || parallel_for(2, 100, |i| assert_ne!(i, culprit)));
            assert!(catch_unwind(run).is_err());
            assert!(Team::lent(2).is_none());
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no processes")]
    fn this_process_executed_a_program() {
        assert_eq!(is_forked(), cfg!(target_os = "linux").then_some(false));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri loads no libraries")]
    fn a_library_that_is_not_loaded_has_no_team() {
        assert!(Team::of(Path::new("/nowhere/libtorch_cpu.so")).is_none());
    }
}
