"""What tries a wheel: which Pythons it finds, and wheels that are for one system alone."""

from __future__ import annotations

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools/check_wheel.py"


def test_pythons_are_found_once_and_new_enough(monkeypatch, tmp_path):
    for name, version in (("python3.10", "3.10.4"), ("python3.12", "3.12.0")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho Python {version}\n")
        (tmp_path / name).chmod(0o755)
    old = tmp_path / ".pyenv/versions/3.9.1/bin"
    other = tmp_path / ".pyenv/versions/3.12.7/bin"
    for folder, version in ((old, "3.9.1"), (other, "3.12.7")):
        folder.mkdir(parents=True)
        (folder / "python").write_text(f"#!/bin/sh\necho Python {version}\n")
        (folder / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = runpy.run_path(str(TOOL))["found"]()
    assert [Path(path).name for path in found] == ["python3.10", "python3.12"]


def test_a_wheel_of_one_system_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "kconv-0.1.0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    # In the place of auditwheel, which says what it thinks of the file.
    (tmp_path / "auditwheel.py").write_text("print('shown')")
    done = subprocess.run(
        [sys.executable, str(TOOL), str(wheel)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "it is for this system alone" in done.stderr
    assert "shown" in done.stdout
