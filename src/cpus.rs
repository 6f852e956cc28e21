//! How many CPUs this process may use: `python/kconv/_cpus.py` in Rust.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// CPUs that the process may run on, and no more than its container's quota, rounded up: 1.5 are
/// worth two threads. The standard library rounds down.
pub fn available_cpus() -> usize {
    let whole = std::thread::available_parallelism().map_or(1, usize::from);
    match (allowed(Path::new("/")), quota(Path::new("/"))) {
        (Some(allowed), Some(quota)) => allowed.min(quota.ceil() as usize).max(whole),
        _ => whole,
    }
}

/// The CPUs of the affinity mask.
fn allowed(root: &Path) -> Option<usize> {
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    let mask = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:"))?;
    let ones = mask.chars().filter_map(|digit| digit.to_digit(16)).map(u32::count_ones).sum::<u32>();
    Some(ones as usize)
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
        fs::write(root.join("proc/self/status"), "Name:\tx\nCpus_allowed:\tf,0000000f\n").unwrap();
        assert_eq!((quota(&root), allowed(&root)), (None, Some(8)));
        fs::write(group.join("cpu.max"), "max 100000\n").unwrap();
        assert_eq!(quota(&root), None);
        fs::write(root.join("sys/fs/cgroup/a/cpu.max"), "150000 100000\n").unwrap();
        assert_eq!(quota(&root), Some(1.5));
        fs::write(group.join("cpu.max"), "90000 100000\n").unwrap();
        assert_eq!(quota(&root), Some(0.9));
        fs::remove_dir_all(root).unwrap();
        assert!(available_cpus() >= 1);
    }
}
