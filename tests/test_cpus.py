"""CPUs of a container with a quota: files of a made-up root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kconv._cpus import available_cpus


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a/b": "150000 100000"}, 2),
        ({"a": "50000 100000", "a/b": "max 100000"}, 1),
        ({"a/b": "max 100000"}, 16),
        ({"": "300000 100000", "a": "250000 100000"}, 3),
        ({"a/b": "9900000 100000"}, 16),
        ({"a/b": "not a quota"}, 16),
        ({}, 16),
    ],
)
def test_quota_is_rounded_up(
    quotas: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cpus(tmp_path) == 16
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/old\n0::/a/b\n")
    for group, quota in quotas.items():
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / group / "cpu.max").write_text(f"{quota}\n")
    assert available_cpus(tmp_path) == expected
