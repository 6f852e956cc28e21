"""The command line: tables, errors in one line with status 2, Ctrl-C, and a whole run."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kconv import cli, models, training

TINY = [
    *("--model", "kdensenet_bc_l100", "--model-option", "blocks=1", "--ktype", "D6_4ch"),
    *("--image-size", "8", "--train-images", "40", "--test-images", "20", "--batch-size", "12"),
]


@pytest.fixture(autouse=True)
def usual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does for its own process would last for all further tests."""
    monkeypatch.setattr(cli._train, "leave_out_tensorflow", lambda: None)


def kconv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kconv", *arguments]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command fails with."""
    try:
        status = cli.main(arguments)
    except SystemExit as error:  # argparse's own errors
        status = error.code
    output = capsys.readouterr()
    assert status == 2
    assert output.err.count("\n") == 1
    return output.err


def test_models_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[3:-3]]
    table = {(name, ktype): (parameters, macs) for name, ktype, parameters, macs in rows}
    assert len(table) == 8 * 4
    assert table["keffnet_b0", "D6_16ch"] == ("639,702", "123,613,524")
    assert "efficientnet_b0" in lines[-2]
    assert lines[-1].startswith("trained: ")
    spec = models.create("keffnet_b7", ktype="D6v3_32ch", classes=10)
    assert table["keffnet_b7", "D6v3_32ch"][0] == f"{models.count(spec).trainable:,}"


def test_table_prints_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line[:7] in ("MENDEL ", "Entropy") for line in lines) == 7
    rows = [tuple(re.split(" {2,}", line)) for line in lines if line.endswith("%")]
    assert len(rows) == len(models.paper_table())
    assert rows[0] == ("EfficientNet-B0", "224x224", "4,020,358", "0%", "384,547,552", "93.52%")
    assert ("kEffNet-B0", "D6_16ch", "224x224", "639,702", "84%", "123,613,524", "92.24%") in rows
    marked = [row[:4] for row in rows if row[3].endswith("*")]
    assert marked[0] == ("kEffNet-B0", "D6v3_2ch", "224x224", "309,432*")
    assert len(marked) == 3
    assert "355,064, 397,888, 487,416" in lines[-1]


def test_info_names_versions_and_threads() -> None:
    done = subprocess.run(kconv("info"), capture_output=True, text=True, check=True)
    values = dict(re.split(" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert values["version"] == importlib.metadata.version("kconv")
    assert int(values["threads"]) >= 1
    assert values["numpy"] != "not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["train", "--model", "resnet"], "unknown model 'resnet'; known are"),
        (["train", "--ktype", "D7"], "'D7'"),
        (["train", "--dataset", "nope"], "unknown data set 'nope': known are fashion_mnist_mini"),
        (["train", "--framework", "theano"], "invalid choice: 'theano'"),
        (["train", "--lr-schedule", "cosin"], "invalid choice: 'cosin' (did you mean 'cosine'?)"),
        (["train", "nowhere.toml"], "No such file or directory: 'nowhere.toml'"),
        (["train", "--preset", "fats"], "invalid choice: 'fats' (did you mean 'fast'?)"),
        (["train", "--class-weights", "1,x"], "'1,x' is neither 'balanced' nor numbers"),
        (["train", "--stream"], "fashion_mnist_mini comes as arrays, not as image files"),
        (["train", "--teacher", "nowhere"], "nowhere"),
        (["train", "--compress-from", "nowhere"], "nowhere"),
        (["train", "--sync-bn", "--framework", "keras"], "sync_bn=True: only framework='torch'"),
        (["train", "--epochs", "0"], "epochs=0 must be at least 1"),
        (["train", "--epochs", "many"], "invalid int value: 'many'"),
        (["train", "--batch-size", "6001"], "batch_size=6001: fashion_mnist_mini has 6000"),
        (["train", "--train-images", "0"], "train_images=0 must be at least 1"),
        (["train", "--model-option", "width"], "'width' is not of the form NAME=VALUE"),
        (["train", "--model-option", "depht=2"], "keffnet_b0 has no option 'depht'"),
        (["train", "--model", "efficientnet_b0", "--ktype", "D6_16ch"], "no option 'ktype'"),
        (["train", "--resume", "missing"], "missing holds no run to resume"),
        (["train", "--resume", "a", "--output", "b"], "not allowed with argument"),
        (["train", "--output", "/dev/null/run"], "cannot make the folder /dev/null/run"),
        (["train", "--lr", "inf"], "lr=inf must be above 0, and finite"),
        (["train", "--lr", "nan"], "lr=nan must be above 0, and finite"),
        (["train", "--lr", "-1"], "lr=-1.0 must be above 0"),
        (["train", "--seed", "9" * 30], "must be from 0 to below 2^63"),
        (["train", "--skip-strides", "99"], "skip_strides=99 must be from -1 to 6 for keffnet_b0"),
        (["train", "--skip-strides", "-2"], "skip_strides=-2 must be from -1 to 6"),
        (["train", "--image-size", "100000"], "7,000 images of 100000x100000 take 70,000.0 GB"),
        (["train", "--image-size", "-1"], "image_size=-1 must be at least 1"),
        (["train", "--batch-size", "9" * 30], ": fashion_mnist_mini has 6000 training images"),
        (["train", "--train-images", "1"], "of which 0 are held out for validation"),
        (["train", "--dataset", ""], "unknown data set ''"),
        (["train", "--dataset", "/dev/null"], "what is at that path is neither"),
        (["train", "--data-dir", "."], "has no use, as 'fashion_mnist_mini' comes with the packa"),
        (["train", "--dataset", ".", "--data-dir", "."], "is not a known data set's name"),
        (["train", "--dataset", "mnist", "--data-dir", "x"], "x has neither train-images-idx3-ub"),
        (["train", "--model-option", "width=1e999"], "width=inf is not above 0, and finite"),
        (["train", "--model-option", "classes=3"], "classes cannot be given, as the data set"),
        (["train", "--ktype", "D8", "--model-option", "ktype=D10"], "as ktype decides it"),
        (["train", "--resume", "/dev/null"], "/dev/null holds no run to resume"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_existing_run_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "last.npz").write_text("precious")
    assert "--resume" in error_of(capsys, "train", "--output", str(tmp_path))
    assert (tmp_path / "last.npz").read_text() == "precious"


def test_missing_framework_says_what_to_install(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.delitem(sys.modules, "kconv._keras_trainer", raising=False)
    monkeypatch.delitem(sys.modules, "kconv.keras", raising=False)
    message = error_of(capsys, "train", *TINY, "--output", str(tmp_path / "run"))
    assert message == (
        "kconv: error: training by Keras needs keras, which is not installed: "
        "pip install keras jax\n"
    )


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "torch"])
def test_all_that_a_run_needs_is_tried_first(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    run = tmp_path / "run"
    message = error_of(capsys, "train", *TINY, "--framework", "torch", "--output", str(run))
    assert f"needs {module}, which is not installed: pip install {module}" in message
    assert not run.exists()


def test_failures_that_are_no_bad_input_have_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise MemoryError

    monkeypatch.setattr(training, "train", fail)
    assert cli.main(["train", "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "kconv: error: not enough memory: MemoryError\n"


@pytest.mark.parametrize(
    "meta",
    [
        "nothing",
        "[1]",
        '{"config": {}}',
        '{"config": {"epochs": "2"}, "history": []}',
        '{"config": {"model": "keffnet_b0", "colour": 1}, "history": []}',
    ],
)
def test_checkpoints_of_something_else_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, meta: str
) -> None:
    np.savez(tmp_path / "last.npz", meta=np.array(meta))
    message = error_of(capsys, "train", "--resume", str(tmp_path))
    assert re.search(r"last\.npz is (not a checkpoint, or is damaged|of another version)", message)


def test_backend_is_a_default_only() -> None:
    script = "import os, sys; from kconv import cli; cli.main(['info'])"
    for given, expected in ({}, "jax"), ({"KERAS_BACKEND": "torch"}, "torch"):
        clean = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=clean | given, capture_output=True, text=True
        )
        assert re.search(rf"keras backend +{expected}\n", done.stdout), done.stderr


def test_sigterm_ends_a_run_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, output: Path, *, resume: bool) -> None:
        (output / "last.npz").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("kconv.training.train", train)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["train", "--output", str(tmp_path)]) == 143
    expected = f"\nterminated; go on with: kconv train --resume {tmp_path}\n"
    assert capsys.readouterr().err == expected
    assert signal.getsignal(signal.SIGTERM) is before


def test_train_and_go_on_after_ctrl_c(tmp_path: Path) -> None:
    """Interrupted in the second of very many epochs, resumed from another folder to the third."""
    start = kconv("train", *TINY, "--framework", "torch", "--epochs", "100000")
    with subprocess.Popen(
        start,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process in the background of a shell ignores Ctrl-C, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == (
        "interrupted; go on with: kconv train --resume runs/kdensenet_bc_l100-fashion_mnist_mini-1"
    )
    run = tmp_path / "runs/kdensenet_bc_l100-fashion_mnist_mini-1"
    epochs = len((run / "results.csv").read_text().splitlines()) - 1
    assert epochs >= 2

    go_on = kconv("train", "--resume", str(run), "--epochs", str(epochs + 1))
    done = subprocess.run(go_on, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test accuracy +0\.\d{4} \(20 images\)", done.stdout)
    assert len((run / "results.csv").read_text().splitlines()) == epochs + 2
    assert {"model.safetensors", "curves.png", "report.txt"} <= {
        path.name for path in run.iterdir()
    }

    other = kconv("train", "--resume", str(run), "--batch-size", "6")
    done = subprocess.run(other, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is of a run with batch_size=12, which cannot go on with batch_size=6" in done.stderr
