"""Training from the command line: one loop, the same for every framework.

A run lives in a folder, which is a model: ``model.safetensors`` and ``config.json`` are the state
of the lowest validation loss, as :func:`kconv.load` opens it. Beside them are ``last.npz``
(everything needed to go on, written after each epoch), ``results.csv``, ``curves.png``,
``report.txt`` and ``confusion.png``. Every file is replaced as a whole or not at all. While it goes
on it holds a lock on the folder's ``.lock``, which the system releases even where it is killed.

Example:
    >>> [round(learning_rate("cyclic25", epoch), 5) for epoch in (0, 6, 7, 24, 25)]
    [0.001, 0.004, 0.004, 0.00025, 0.001]
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kconv import augment, datasets, models, release_memory
from kconv._creating import fill_network
from kconv._files import remove_leftovers, replacing
from kconv._memory import peak_memory
from kconv._model_folder import WEIGHTS, ImageInput, ModelConfig, write_config
from kconv._npz import read_npz
from kconv._published import find_network
from kconv._require import require
from kconv.datasets import Dataset, Images, Labels
from kconv.evaluation import confusion_matrix, report_of
from kconv.weights import load_weights, save_weights

FRAMEWORKS = ("keras", "torch")
SCHEDULES = ("cyclic25", "constant")
RUNS = Path("runs")
"""Where the folders of runs are made that are given none."""
VALIDATION_SHARE = 0.1
SHORT_RUN_STEPS = 2000
"""In fewer steps, moving statistics of momentum 0.99 lag too far behind the weights."""
RECALIBRATION_IMAGES = 2048
SMALL_IMAGE = 64
"""Images of no more pixels a side keep the first strides' pixels, as the papers' 32x32 do."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, and how. The defaults make a good short run.

    Attributes:
        model: A name of ``kconv.models.list_models()``.
        ktype: Its kind of pointwise convolution; None is the model's own default.
        skip_strides: How many strides to skip for small images; None is 3, if the model has them
            and the images have at most ``SMALL_IMAGE`` pixels a side.
        model_options: Further fields of the model's spec.
        dataset: A name of ``kconv.datasets.names()``, or a folder or archive of images.
        data_dir: Where the data set's original files are; None downloads them, of some.
        train_images: How many training images to use, as many of each class.
        test_images: How many test images to use, likewise.
        image_size: Height and width that images are resized to; None is 224 for
            ``kconv.datasets.PHOTOGRAPHS`` and 32 for others.
        interpolation: One of ``kconv.datasets.INTERPOLATIONS``.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        lr_schedule: One of ``SCHEDULES``.
        lr: The learning rate that the schedule starts from.
        augment: Whether to augment as the papers do (see :mod:`kconv.augment`).
        recalibrate_bn: Whether to estimate the moving statistics of batch norms anew before each
            evaluation; None does so for runs of fewer than ``SHORT_RUN_STEPS`` steps.
        seed: Fixes the initial weights, the order of the images, and all chance.
        framework: One of ``FRAMEWORKS``.
        weights: A name of :func:`kconv.list_weights`, a file, or the folder of a run, whose
            weights to start from; None starts from random ones. The classifier starts anew if the
            number of classes differs.
    """

    model: str = "keffnet_b0"
    ktype: str | None = None
    skip_strides: int | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = "fashion_mnist_mini"
    data_dir: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    interpolation: str = "bilinear"
    epochs: int = 2
    batch_size: int = 64
    lr_schedule: str = "cyclic25"
    lr: float = 0.001
    augment: bool = False
    recalibrate_bn: bool | None = None
    seed: int = 0
    framework: str = "keras"
    weights: str | None = None

    def __post_init__(self) -> None:
        """Check the values that nothing else checks.

        Raises:
            ValueError: One of them makes no sense.
        """
        for option in ("epochs", "batch_size", "image_size", "train_images", "test_images"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to below 2^63")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be above 0, and finite")
        for option, known in (("framework", FRAMEWORKS), ("lr_schedule", SCHEDULES)):
            if getattr(self, option) not in known:
                raise ValueError(
                    f"unknown {option} {getattr(self, option)!r}: known are {', '.join(known)}"
                )

        decided = {
            "input_shape": "the data set decides it",
            "classes": "the data set decides it",
            "include_top": "training needs the classifier",
            **({} if self.ktype is None else {"ktype": "ktype decides it"}),
            **({} if self.skip_strides is None else {"skip_stride_cnt": "skip_strides decides it"}),
        }
        for option in sorted(self.model_options.keys() & decided.keys()):
            raise ValueError(f"the model's {option} cannot be given, as {decided[option]}")

    def spec(self, data: Dataset) -> models.Spec:
        """The model for this data set's images and classes."""
        options = dict(
            self.model_options, input_shape=data.image_shape, classes=len(data.class_names)
        )
        if self.ktype is not None:
            options["ktype"] = self.ktype
        if self.skip_strides is not None:
            options["skip_stride_cnt"] = self.skip_strides
        spec = models.create(self.model, **options)
        if self.skip_strides is not None:
            most = _strides(spec)
            if not -1 <= self.skip_strides <= most:
                raise ValueError(
                    f"skip_strides={self.skip_strides} must be from -1 to {most} for {self.model}"
                )
        has_strides = "skip_stride_cnt" in {field.name for field in dataclasses.fields(spec)}
        small = max(data.image_shape[:2]) <= SMALL_IMAGE
        if has_strides and small and "skip_stride_cnt" not in options:
            spec = models.create(self.model, **options, skip_stride_cnt=3)
        return spec


def _strides(spec: models.Spec) -> int:
    """How many strides a model can skip: to skip more changes nothing."""

    def graph(count: int) -> models.Graph:
        return dataclasses.replace(spec, skip_stride_cnt=count).graph()  # type: ignore[call-arg]

    everything = graph(sys.maxsize)
    return next(count for count in itertools.count() if graph(count) == everything)


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


class Trainer(Protocol):
    """A model and its optimizer in some framework; images come as (N, H, W, C) float32."""

    model: Any
    """Of the framework, as :func:`kconv.load_weights` takes it."""

    def train_step(
        self, images: NDArray[np.float32], labels: Labels, learning_rate: float
    ) -> tuple[float, float]:
        """One step of RMSprop; returns the batch's loss and accuracy before it."""

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities, (N, classes), in inference mode."""

    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        """Estimate the moving statistics of all batch norms from these batches alone."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that training changes: weights, statistics, optimizer, random state."""

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what :meth:`state` returned."""


def show(line: str) -> None:
    """Print a line at once, also into a pipe; what its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def train(
    config: Config,
    output: Path,
    *,
    resume: bool = False,
    log: Callable[[str], None] = show,
) -> Result:
    """Train a model, keep its best state, and evaluate that on the test images.

    Args:
        config: What to do. With ``resume``, its model and data must be the run's own.
        output: The run's folder, made if need be; :func:`reserve` makes one that nobody else has.
        resume: Whether to go on from ``output/last.npz``.
        log: Takes the lines to show.

    Returns:
        The :class:`Result`.

    Raises:
        ValueError: An option or the data make no sense, the checkpoint is another model's, or the
            folder holds a run already or is in use by another process.
        OSError: A file cannot be read or written.
        ImportError: A package that the run will need is not installed.
    """
    with _held(output):
        try:
            return _train(config, output, resume, log)
        finally:
            release_memory()


def _train(config: Config, output: Path, resume: bool, log: Callable[[str], None]) -> Result:
    if not resume and (output / "last.npz").exists():
        raise ValueError(f"{output} holds a run: continue it with --resume {output}")
    checkpoint = _checkpoint_of(output / "last.npz", config) if resume else None
    _check_installed(config)
    if config.weights is not None:
        find_network(config.weights, config.model)  # or there is an error before images are read
    data = datasets.load(
        config.dataset,
        image_size=config.image_size or (None if config.dataset in datasets.PHOTOGRAPHS else 32),
        interpolation=config.interpolation,
        train_images=config.train_images,
        test_images=config.test_images,
        data_dir=config.data_dir,
    )
    spec = config.spec(data)
    shuffled = np.random.default_rng(config.seed).permutation(len(data.x_train))
    share = VALIDATION_SHARE if data.x_val is None else 0
    held_out, training = np.split(shuffled, [round(share * len(shuffled))])
    x_val, y_val = data.x_val, data.y_val
    if x_val is None or y_val is None:
        x_val, y_val = data.x_train[held_out], data.y_train[held_out]
    steps = len(training) // config.batch_size
    if not steps or not len(x_val):
        raise ValueError(
            f"batch_size={config.batch_size}: {data.name} has {len(data.x_train)} training images, "
            f"of which {len(held_out)} are held out for validation; expected one batch or more of "
            "the others, and one to validate with"
        )
    _check_step(config, spec)
    recalibrate = config.recalibrate_bn
    if recalibrate is None:
        recalibrate = config.epochs * steps < SHORT_RUN_STEPS

    trainer = _make_trainer(config, spec)
    history: list[Epoch] = []
    best = _Best(output, config, spec, data)
    if checkpoint:
        best.take_over(trainer)
        history = _restore(trainer, *checkpoint)
    else:
        if config.weights is not None:
            whole = fill_network(trainer.model, spec, config.weights)
            log(f"weights      {config.weights}" + ("" if whole else ", with a new classifier"))
        _save_checkpoint(output / "last.npz", config, trainer, history)
    counts = models.count(spec)
    log(f"model        {spec.name}: {counts.trainable:,} trainable parameters")
    log(
        f"data         {data.name}: {len(training):,} training, {len(x_val):,} validation and "
        f"{len(data.x_test):,} test images {data.image_shape}, {len(data.class_names)} classes"
    )
    if data.x_test is data.x_val:
        log("test images  are the validation images, as there is no test/")
    if recalibrate:
        log(
            "batch norm   moving statistics are estimated anew before each evaluation "
            "(--no-recalibrate-bn turns this off)"
        )
    best_loss = min((epoch.val_loss for epoch in history), default=np.inf)
    for epoch in range(len(history), config.epochs):
        rate = learning_rate(config.lr_schedule, epoch, config.lr)
        order = np.random.default_rng([config.seed, epoch]).permutation(training)
        loss, accuracy, speed = _train_epoch(config, trainer, data, order, rate, epoch)
        if recalibrate:
            sample = order[:RECALIBRATION_IMAGES]
            trainer.recalibrate(
                augment.scale(data.x_train[part]) for part in _full_batches(sample, config)
            )
        val_loss, val_accuracy, _ = evaluate(trainer, x_val, y_val, config.batch_size)
        history.append(Epoch(epoch + 1, rate, loss, accuracy, val_loss, val_accuracy, speed))
        if val_loss < best_loss or not best.exists():
            best_loss = val_loss
            best.save(trainer, history[-1])
        _write_history(output / "results.csv", history)
        _save_checkpoint(output / "last.npz", config, trainer, history)
        log(
            f"epoch {epoch + 1:3d}/{config.epochs}  loss {loss:.4f}  accuracy {accuracy:.4f}  "
            f"val_loss {val_loss:.4f}  val_accuracy {val_accuracy:.4f}  {speed:.1f} images/s"
        )
    return _finish(config, output, trainer, best, history, log)


def learning_rate(schedule: str, epoch: int, start: float = 0.001) -> float:
    """The learning rate of an epoch, counted from 0.

    ``cyclic25`` is the papers': every 25 epochs, 7 of warm-up to 4 times the start, then decay.

    Args:
        schedule: One of ``SCHEDULES``.
        epoch: From 0 on.
        start: The rate of epoch 0.

    Returns:
        The rate.
    """
    if schedule == "constant":
        return start
    epoch %= 25
    return start * (1 + 0.5 * epoch) if epoch < 7 else start * 4 * 0.85 ** (epoch - 7)


def evaluate(
    trainer: Trainer, images: Images, labels: Labels, batch_size: int
) -> tuple[float, float, Labels]:
    """Mean cross-entropy, accuracy and predicted labels of a trainer's model."""
    predictions = []
    for start in range(0, len(images), batch_size):
        batch = augment.scale(images[start : start + batch_size])
        # Always the same batch size: another one would be compiled anew.
        filled = np.resize(batch, (batch_size, *batch.shape[1:]))
        predictions.append(trainer.predict(filled)[: len(batch)])
    probabilities = np.concatenate(predictions)
    of_truth = probabilities[np.arange(len(labels)), labels]
    found = probabilities.argmax(axis=1)
    loss = float(-np.log(np.maximum(of_truth, 1e-7)).mean())
    return loss, float((found == labels).mean()), found


def load_config(run: Path) -> Config:
    """The configuration of the run in a folder.

    Args:
        run: The folder.

    Returns:
        Its :class:`Config`.

    Raises:
        ValueError: There is no run, or its checkpoint is damaged.
    """
    meta, _ = _read_checkpoint(run / "last.npz")
    try:
        return Config(**meta["config"])
    except TypeError as error:
        raise ValueError(f"{run / 'last.npz'} is of another version of kconv: {error}") from None


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
def _held(folder: Path) -> Iterator[None]:
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


def _check_step(config: Config, spec: models.Spec) -> None:
    """See that what a training step has to keep can fit into memory at all.

    These are the convolutions' results, of which the backward pass needs all, and the weights with
    their gradients and RMSprop's means.
    """
    layers = [
        layer
        for layer in spec.graph().layers
        if isinstance(layer, models.graph.Conv | models.graph.DepthwiseConv)
    ]
    results = sum(math.prod(size or 0 for size in layer.shape) for layer in layers)
    least = 4 * (config.batch_size * results + 3 * models.count(spec).trainable)
    if least > (there := datasets.memory()):
        height, width, _ = spec.input_shape
        raise ValueError(
            f"batch_size={config.batch_size}: a step of {spec.name} at {height}x{width} takes "
            f"{least / 1e9:,.1f} GB or more; there are {there / 1e9:,.1f} GB of memory"
        )


def _check_installed(config: Config) -> None:
    """Import all that a run needs before its end, so that nothing is missing then."""
    require("tqdm", "tqdm", "the progress bar of training")
    require("matplotlib.figure", "matplotlib", "the picture of the training curves")
    if config.framework == "torch":
        require("torch", "torch", "training by PyTorch")
    else:
        require("keras", "keras jax", "training by Keras")


def _make_trainer(config: Config, spec: models.Spec) -> Trainer:
    if config.framework == "torch":
        from kconv._torch_trainer import TorchTrainer

        return TorchTrainer(spec, config.seed)
    from kconv._keras_trainer import KerasTrainer

    return KerasTrainer(spec, config.seed)


def _full_batches(indices: NDArray[np.intp], config: Config) -> Iterator[NDArray[np.intp]]:
    for start in range(0, len(indices) - config.batch_size + 1, config.batch_size):
        yield indices[start : start + config.batch_size]


def _train_epoch(
    config: Config,
    trainer: Trainer,
    data: Dataset,
    order: NDArray[np.intp],
    rate: float,
    epoch: int,
) -> tuple[float, float, float]:
    """Mean loss, mean accuracy, and images/s without the first step, which may compile."""
    from tqdm import tqdm

    rng = np.random.default_rng([config.seed, epoch, 1])
    batches = list(_full_batches(order, config))
    sums = np.zeros(2)
    begin = first_done = time.perf_counter()
    with tqdm(
        total=len(batches) * config.batch_size,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        unit=" images",
        leave=False,
        disable=None,  # only on a terminal
    ) as bar:
        for step, batch in enumerate(batches, start=1):
            images = data.x_train[batch]
            if config.augment:
                images = augment.augment(images, rng)
            sums += trainer.train_step(augment.scale(images), data.y_train[batch], rate)
            if step == 1:
                first_done = time.perf_counter()
            bar.set_postfix_str(f"loss {sums[0] / step:.4f}, accuracy {sums[1] / step:.4f}", False)
            bar.update(config.batch_size)
    if len(batches) == 1:
        first_done, timed = begin, 1
    else:
        timed = len(batches) - 1
    loss, accuracy = (sums / len(batches)).tolist()
    return loss, accuracy, timed * config.batch_size / (time.perf_counter() - first_done)


@dataclass
class _Best:
    """The best state of a run: ``model.safetensors`` and ``config.json`` in its folder."""

    output: Path
    config: Config
    spec: models.Spec
    data: Dataset

    @property
    def path(self) -> Path:
        return self.output / WEIGHTS

    def exists(self) -> bool:
        return self.path.exists()

    def save(self, trainer: Trainer, epoch: Epoch) -> None:
        save_weights(trainer.model, self.path)
        names = ("epoch", "val_loss", "val_accuracy")
        self.describe({name: getattr(epoch, name) for name in names})

    def describe(self, metrics: Mapping[str, float]) -> None:
        """Write the configuration, with what is known of the model."""
        height, width, channels = self.data.image_shape
        image = ImageInput(
            height=height,
            width=width,
            channels=channels,
            interpolation=self.config.interpolation,  # type: ignore[arg-type]  # it is checked
        )
        model = ModelConfig(
            network=self.spec,
            class_names=self.data.class_names,
            image=image,
            metrics=metrics,
            dataset=self.data.name,
        )
        write_config(self.output, model)

    def take_over(self, trainer: Trainer) -> None:
        """Read the best state of a run of kconv 0.1.0, which had a file of its framework's."""
        for name in ("best.keras", "best.pt"):
            old = self.output / name
            if old.exists() and not self.exists():
                load_weights(trainer.model, old)
                save_weights(trainer.model, self.path)


def _finish(
    config: Config,
    output: Path,
    trainer: Trainer,
    best: _Best,
    history: list[Epoch],
    log: Callable[[str], None],
) -> Result:
    from kconv import plots

    data = best.data
    load_weights(trainer.model, best.path)
    _, accuracy, found = evaluate(trainer, data.x_test, data.y_test, config.batch_size)
    which = min(history, key=lambda epoch: epoch.val_loss)
    best.describe(
        {
            "epoch": which.epoch,
            "val_loss": which.val_loss,
            "val_accuracy": which.val_accuracy,
            "test_accuracy": accuracy,
        }
    )
    confusion = confusion_matrix(data.y_test, found, len(data.class_names))
    table = report_of(confusion, data.class_names)
    title = f"{best.spec.name}{f' {config.ktype}' if config.ktype else ''}, {data.name}"
    with replacing(output / "report.txt") as temporary:
        temporary.write_text(f"test accuracy {accuracy:.4f}\n\n{table}\n", encoding="utf-8")
    with replacing(output / "confusion.png") as temporary:
        plots.confusion_picture(confusion, data.class_names, title, temporary)
    with replacing(output / "curves.png") as temporary:
        epochs = [dataclasses.asdict(epoch) for epoch in history]
        plots.training_curves(epochs, temporary, title=title, test_accuracy=accuracy)
    log(f"\n{table}\n")
    log(f"test accuracy      {accuracy:.4f} ({len(found):,} images)")
    log(f"peak memory        {peak_memory() / 1e9:.2f} GB")
    log(f"best model         {best.path}")
    log(f"per-class report   {output / 'report.txt'}, {output / 'confusion.png'}")
    log(f"training curves    {output / 'curves.png'}")
    log(f"results by epoch   {output / 'results.csv'}")
    log(f"try it             kconv predict {output} IMAGE")
    return Result(history, accuracy, table, best.path)


def _write_history(path: Path, history: list[Epoch]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Epoch)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(epoch) for epoch in history)
    path.with_name("history.csv").unlink(missing_ok=True)  # its name in kconv 0.1.0


# The checkpoint: an .npz file without pickles: the trainer's arrays, and "meta", a JSON text.


def _save_checkpoint(path: Path, config: Config, trainer: Trainer, history: list[Epoch]) -> None:
    meta = {
        "config": dataclasses.asdict(config),
        "history": [dataclasses.asdict(epoch) for epoch in history],
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, meta=np.array(json.dumps(meta)), **trainer.state())
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
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


def _checkpoint_of(path: Path, config: Config) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a run's checkpoint, and see that the run is this one."""
    meta, state = _read_checkpoint(path)
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    for option, value in meta["config"].items():
        if option not in ("epochs", "weights") and value != wanted.get(option):
            raise ValueError(
                f"{path} is of a run with {option}={value!r}, which cannot go on with "
                f"{option}={wanted.get(option)!r}"
            )
    return meta, state


def _restore(
    trainer: Trainer, meta: Mapping[str, Any], state: Mapping[str, NDArray[Any]]
) -> list[Epoch]:
    """Put a checkpoint's state into the trainer; return the epochs behind it."""
    expected = {name: array.shape for name, array in trainer.state().items()}
    found = {name: array.shape for name, array in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"the checkpoint is of another model: its {name} has shape {found.get(name)}, "
                f"expected {expected.get(name)}"
            )
    trainer.load_state(state)
    try:
        return [Epoch(**epoch) for epoch in meta["history"]]
    except TypeError as error:
        raise ValueError(f"the checkpoint's history is damaged: {error}") from None
