"""TensorBoard's events, read by its own reader where there is one; and the trackers of the docs."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kconv.training import Callback, Config, Epoch, Result, TensorBoard, callbacks, train

HISTORY = [Epoch(n, 0.1, 2.0 / n, 0.5, 1.5, 0.25, 100.0) for n in (1, 2)]


def test_tensorboard_gets_each_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    board = TensorBoard()
    board.on_train_begin(Config(), tmp_path)
    board.on_step_end(1, 0.5, 0.5, 0.1)
    for epoch in HISTORY:
        board.on_epoch_end(epoch)
    board.on_train_end(Result(HISTORY, 0.75, "", tmp_path))
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert ("loss", 1, 2.0) in found
    assert ("loss", 2, 1.0) in found
    assert ("test_accuracy", 2, 0.75) in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [print]}, "the callback <built-in .*> lacks on_train_begin; expected a"),
        ({"callbacks": [Callback(), None]}, "the callback None lacks on_train_begin"),
        ({"callbacks": [Callback]}, "the callback <class .*> is a class, not an object of it"),
        ({"transform": "flip"}, "transform is a str, which cannot be called"),
        ({"batch_transform": [print]}, "batch_transform is a list, which cannot be called"),
    ],
)
def test_what_is_no_callback_is_refused_before_a_run(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        train(Config(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_callbacks_need_the_methods_alone() -> None:
    class Duck:
        on_train_begin = on_step_end = on_epoch_end = on_train_end = print

    assert callbacks.checked([duck := Duck()]) == [duck]


def tracker(name: str, **libraries: Any) -> Callback:
    """One of the docs' ten lines, as they stand there."""
    blocks = re.findall(r"::\n\n((?: {4}.*\n|\n)+)", callbacks.__doc__ or "")
    (text,) = [block for block in blocks if f"class {name}(" in block]
    names: dict[str, Any] = {"Callback": Callback, "dataclasses": dataclasses, **libraries}
    exec(textwrap.dedent(text), names)
    found: Callback = names[name]()
    return found


def follow(callback: Callback, output: Path) -> None:
    callback.on_train_begin(Config(class_weights=(1, 2)), output)
    for epoch in HISTORY:
        callback.on_epoch_end(epoch)
    callback.on_train_end(Result(HISTORY, 0.75, "", output))


@pytest.mark.slow
def test_mlflow_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Databases are not in mlflow-skinny, and files are not without this.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    follow(tracker("MLflow", mlflow=mlflow), tmp_path)
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.data.metrics["loss"] == 1.0
    assert run.data.metrics["test_accuracy"] == 0.75
    assert run.data.params["class_weights"] == "(1.0, 2.0)"


@pytest.mark.slow
def test_wandb_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    follow(tracker("WandB", wandb=wandb), tmp_path)
    shown = capfd.readouterr().err
    assert re.search(r"test_accuracy +0\.75$", shown, re.MULTILINE), shown
    assert re.search(r"loss +1$", shown, re.MULTILINE), shown
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
