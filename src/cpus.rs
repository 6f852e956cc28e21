//! How many CPUs this process may use.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// CPUs that the calling thread may run on, and no more than its container's quota, rounded up: 1.5
/// are worth two threads. The standard library rounds down.
///
/// `root` stands for `/` where the quota is looked for.
pub fn available_cpus(root: &Path) -> usize {
    let whole = std::thread::available_parallelism().map_or(1, usize::from);
    match (affinity(), quota(root)) {
        (Some(cpus), Some(quota)) => limited(cpus, quota),
        _ => whole,
    }
}

fn limited(cpus: usize, quota: f64) -> usize {
    cpus.min(quota.ceil() as usize).max(1)
}

/// The CPUs of the affinity mask.
#[cfg(target_os = "linux")]
fn affinity() -> Option<usize> {
    // SAFETY: a set of bits, for which zeros are a value, of the size that the call is told.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let failed = libc::sched_getaffinity(0, size_of_val(&set), &mut set) != 0;
        (!failed).then(|| libc::CPU_COUNT(&set) as usize)
    }
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Option<usize> {
    None
}

/// CPUs of the tightest `cpu.max` of cgroup v2, of the process's group and those above.
fn quota(root: &Path) -> Option<f64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let group = PathBuf::from(groups.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let of = |folder: &Path| {
        let text = fs::read_to_string(root.join("sys/fs/cgroup").join(folder).join("cpu.max")).ok()?;
        let (most, period) = text.trim().split_once(' ')?;
        Some(most.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    };
    group.ancestors().filter_map(of).reduce(f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quota_is_the_tightest() {
        let root = std::env::temp_dir().join(format!("kconv-cpus-{}", std::process::id()));
        let group = root.join("sys/fs/cgroup/a/b");
        fs::create_dir_all(&group).unwrap();
        fs::create_dir_all(root.join("proc/self")).unwrap();
        assert_eq!(quota(&root), None);
        fs::write(root.join("proc/self/cgroup"), "1:cpu:/old\n0::/a/b\n").unwrap();
        assert_eq!(quota(&root), None);
        for text in ["max 100000\n", "no quota\n", ""] {
            fs::write(group.join("cpu.max"), text).unwrap();
            assert_eq!(quota(&root), None);
        }
        fs::write(root.join("sys/fs/cgroup/a/cpu.max"), "150000 100000\n").unwrap();
        assert_eq!(quota(&root), Some(1.5));
        fs::write(root.join("sys/fs/cgroup/cpu.max"), "140000 100000\n").unwrap();
        assert_eq!(quota(&root), Some(1.4));
        fs::write(group.join("cpu.max"), "90000 100000\n").unwrap();
        assert_eq!(quota(&root), Some(0.9));
        assert_eq!(available_cpus(&root), 1);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn quota_is_rounded_up() {
        for (quota, expected) in [(1.5, 2), (0.5, 1), (0.0, 1), (2.5, 3), (3.0, 3), (99.0, 16)] {
            assert_eq!(limited(16, quota), expected, "{quota}");
        }
    }

    #[test]
    fn nowhere_is_a_limit() {
        let all = std::thread::available_parallelism().unwrap().get();
        assert_eq!(available_cpus(Path::new("/nowhere")), all);
    }
}
