"""CPUs of a container with a quota: files of a made-up root. (Its arithmetic is tested in Rust.)"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kconv._kconv import available_cpus


def test_quota_of_the_group_and_of_those_above(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "a/b").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    assert available_cpus(tmp_path) == allowed
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/old\n0::/a/b\n")
    (groups / "a/b/cpu.max").write_text("max 100000\n")
    assert available_cpus(tmp_path) == allowed
    for quota, expected in ((150_000, 2), (9_900_000, allowed), (50_000, 1)):
        (groups / "a/cpu.max").write_text(f"{quota} 100000\n")
        assert available_cpus(str(tmp_path)) == min(expected, allowed)


def test_affinity_is_kept() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system has no affinity")

    def alone() -> int:  # in a thread of its own, whose mask goes with it
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        return available_cpus()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(alone).result() == 1
