"""The folder of a run: its lock, its files, and its checkpoint."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv import models
from kconv._files import remove_leftovers, replacing
from kconv._model_folder import WEIGHTS, ImageInput, ModelConfig, write_config
from kconv._npz import read_npz
from kconv.datasets import Dataset
from kconv.training.config import Config, to_toml
from kconv.weights import load_weights, save_weights

RUNS = Path("runs")
"""Where the folders of runs are made that are given none."""
CHECKPOINT = "last.npz"


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to; losses are mean cross-entropies."""

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    history: list[Epoch]
    test_accuracy: float
    report: str
    best_model: Path


def reserve(config: Config, parent: Path = RUNS) -> Path:
    """Make the folder of a new run, the first that is free of ``keffnet_b0-cifar10-1``, ``-2`` ...

    Args:
        config: What the run is of.
        parent: Where to make the folder.

    Returns:
        The folder, which no other call gives.

    Raises:
        OSError: It cannot be made.
    """
    stem = f"{config.model}-{Path(config.dataset).name.split('.')[0]}"
    for number in itertools.count(1):
        # Whoever makes the folder has it: to look whether it exists first would be too late.
        if _make_folder(folder := parent / f"{stem}-{number}"):
            break
    (folder / ".lock").touch()
    return folder


def _make_folder(path: Path) -> bool:
    """Make a folder and those above; tell whether it is new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise OSError(f"cannot make the folder {path}: there is a file of this name") from None
        return False
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}") from error
    return True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a run's folder, made if need be, for this process alone."""
    lock = folder / ".lock"
    own = _make_folder(folder) or lock.exists()
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another run") from None
        if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise ValueError(f"{folder} was in use by another run until this moment")
        remove_leftovers(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
                # Where nothing came of it, nothing is left behind.
                if own and not any(folder.iterdir()):
                    folder.rmdir()
                    if folder.parent == RUNS:
                        RUNS.rmdir()


@dataclass
class BestModel:
    """The best state of a run: ``model.safetensors`` and ``config.json`` in its folder."""

    output: Path
    config: Config
    spec: models.Spec
    data: Dataset

    @property
    def path(self) -> Path:
        """Of the weights."""
        return self.output / WEIGHTS

    def exists(self) -> bool:
        """Whether there is a best state yet."""
        return self.path.exists()

    def save(self, model: Any, epoch: Epoch) -> None:
        """Write the weights, and what is known of them."""
        save_weights(model, self.path)
        names = ("epoch", "val_loss", "val_accuracy")
        self.describe({name: getattr(epoch, name) for name in names})

    def describe(self, metrics: Mapping[str, float]) -> None:
        """Write the configuration, with what is known of the model."""
        height, width, channels = self.data.image_shape
        # Streamed images that the caller has are resized as they say themselves.
        how: Any = getattr(self.data.x_train, "interpolation", self.config.interpolation)
        image = ImageInput(
            height=height,
            width=width,
            channels=channels,
            interpolation=how,
        )
        model = ModelConfig(
            network=self.spec,
            class_names=self.data.class_names,
            image=image,
            metrics=metrics,
            dataset=self.data.name,
        )
        write_config(self.output, model)

    def take_over(self, model: Any) -> None:
        """Read the best state of a run of kconv 0.1.0, which had a file of its framework's."""
        for name in ("best.keras", "best.pt"):
            old = self.output / name
            if old.exists() and not self.exists():
                load_weights(model, old)
                save_weights(model, self.path)


def write_options(output: Path, config: Config) -> None:
    """Write ``config.toml``, with which the run can be had again."""
    with replacing(output / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


def write_history(path: Path, history: list[Epoch]) -> None:
    """Write the figures of the epochs."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Epoch)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(epoch) for epoch in history)
    path.with_name("history.csv").unlink(missing_ok=True)  # its name in kconv 0.1.0


def load_config(run: Path) -> Config:
    """The configuration of the run in a folder.

    Args:
        run: The folder.

    Returns:
        Its :class:`Config`.

    Raises:
        ValueError: There is no run, or its checkpoint is damaged.
    """
    meta, _ = read_checkpoint(run / CHECKPOINT)
    try:
        return Config(**meta["config"])
    except TypeError as error:
        raise ValueError(f"{run / 'last.npz'} is of another version of kconv: {error}") from None


# The checkpoint: an .npz file without pickles: the trainer's arrays, and "meta", a JSON text.


@dataclass(frozen=True)
class Progress:
    """What lies behind a checkpoint.

    Attributes:
        history: the whole epochs.
        steps: of the running one.
        sums: its losses and right answers, each times images, and its images.
        seconds: that it has taken.
    """

    history: list[Epoch]
    steps: int = 0
    sums: tuple[float, ...] = (0.0, 0.0, 0.0)
    seconds: float = 0.0


def save_checkpoint(
    path: Path,
    config: Config,
    state: Mapping[str, NDArray[Any]],
    progress: Progress,
    data: Mapping[str, Any],
) -> None:
    """Write a checkpoint, whole or not at all; ``data`` tells the data set from others."""
    meta = {"config": dataclasses.asdict(config), "data": data, **dataclasses.asdict(progress)}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=np.array(json.dumps(meta)), **state)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a checkpoint: what it says, and the trainer's arrays.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no run to resume: it has no {path.name}")
    try:
        state = read_npz(path)
        meta = json.loads(str(state.pop("meta")))
        if not all(
            isinstance(meta[key], kind) for key, kind in (("config", dict), ("history", list))
        ):
            raise ValueError("its meta has no config and history")
        return meta, state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {error}") from None


def checkpoint_of(path: Path, config: Config) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a run's checkpoint, and see that the run is this one.

    Raises:
        ValueError: it is of another, there is none, or it is damaged.
    """
    meta, state = read_checkpoint(path)
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    fields = dataclasses.fields(config)
    resumable = {field.name for field in fields if field.metadata["resumable"]}
    for option, value in meta["config"].items():
        if option not in resumable and value != wanted.get(option):
            raise ValueError(
                f"{path} is of a run with {option}={value!r}, which cannot go on with "
                f"{option}={wanted.get(option)!r}"
            )
    return meta, state


def check_data(meta: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """See that a run goes on with the data that it had.

    Raises:
        ValueError: they are others.
    """
    found = json.loads(json.dumps(data))
    told = meta.get("data")  # older ones do not tell
    for name, value in told.items() if isinstance(told, dict) else ():
        if found.get(name) != value:
            raise ValueError(
                f"the run had data whose {name} was {value}, and these have {found.get(name)}: "
                "it goes on with the same data alone, which may be those given as data="
            )


def progress_of(meta: Mapping[str, Any]) -> Progress:
    """What a checkpoint says lies behind it.

    Raises:
        ValueError: it is damaged.
    """
    try:
        history = [Epoch(**epoch) for epoch in meta["history"]]
        steps, seconds = int(meta.get("steps", 0)), float(meta.get("seconds", 0))
        sums = tuple(map(float, meta.get("sums", Progress.sums)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's history is damaged: {error}") from None
    return Progress(history, steps, sums, seconds)
