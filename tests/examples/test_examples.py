"""The examples, each run from the command line's arguments with few images."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--train-images", "40", "--epochs", "1"]
RUNS = {
    "finetune_timm": (["timm"], [*SMALL, "--image-size", "32"], "as one operation"),
    "compress_distil": ([], SMALL, r"compressed, taught +[\d,]+ parameters"),
    "papers_keras": ([], [*SMALL, "--image-size", "8"], r"221,?182 parameters|221\d+ parameters"),
    "flax_nnx": (["flax", "optax"], [*SMALL, "--image-size", "8"], r"test accuracy 0\.\d+"),
    "lightning_module": (["lightning|pytorch_lightning"], SMALL, r"'accuracy': 0\.\d+"),
    "accelerate_loop": (["accelerate"], [*SMALL, "--image-size", "8"], r"accuracy 0\.\d+"),
    "export_model": (["onnx"], ["OUT", "--image-size", "8"], r"model\.onnx: images \(N, 1, 8, 8\)"),
    "custom_ktype": ([], [], r"D6_20ch"),
}


def test_all_are_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*RUNS, "distributed", "ray_train"}
    readme = (EXAMPLES / "README.md").read_text()
    page = (EXAMPLES.parent / "docs/examples.md").read_text()
    for name in names:
        assert f"({name}.py)" in readme
        assert f'--8<-- "examples/{name}.py"' in page  # the line that brings the program in
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 70


def needs(*packages: str) -> None:
    for either in packages:
        if not any(importlib.util.find_spec(name) for name in either.split("|")):
            pytest.skip(f"{either} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages, arguments, printed = RUNS[name]
    needs(*packages)
    arguments = [str(tmp_path / "out") if text == "OUT" else text for text in arguments]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)


def run(*command: str, **env: str) -> str:
    """What a program prints that finds kconv as this process does."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, str(EXAMPLES / "distributed.py"), *SMALL, "--image-size", "8")
    assert "epoch 1: 2 processes, loss" in printed


@pytest.mark.slow
def test_two_processes_of_a_local_cluster(tmp_path: Path) -> None:
    needs("ray")
    example = (str(EXAMPLES / "ray_train.py"), str(tmp_path / "run"))
    printed = run(*example, *SMALL, "--image-size", "8", RAY_USAGE_STATS_ENABLED="0")
    assert re.search(r"^2 processes, test accuracy 0\.\d+", printed, re.MULTILINE), printed
    assert (tmp_path / "run/report.txt").exists()
