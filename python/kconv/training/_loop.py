"""The training loop: the same for every framework, and for any number of processes."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kconv import augment, models, release_memory
from kconv._creating import fill_network
from kconv._files import replacing
from kconv._memory import peak_memory
from kconv._published import find_network
from kconv._show import show
from kconv.datasets import Labels, StreamedImages
from kconv.evaluation import confusion_matrix, report_of
from kconv.training import _start
from kconv.training.batches import Batch, Batches, check_loader, progress, read_ahead
from kconv.training.callbacks import Callback, TensorBoard, checked
from kconv.training.config import SHORT_RUN_STEPS, Config
from kconv.training.ranks import Ranks, joined
from kconv.training.run import (
    CHECKPOINT,
    BestModel,
    Epoch,
    Progress,
    Result,
    check_data,
    checkpoint_of,
    held,
    progress_of,
    reserve,
    save_checkpoint,
    write_history,
    write_options,
)
from kconv.training.schedules import learning_rate
from kconv.training.transforms import Change, changed_batch
from kconv.weights import load_weights

VALIDATION_SHARE = 0.1
RECALIBRATION_IMAGES = 2048


class Trainer(Protocol):
    """A model and its optimizer in some framework; images come as (N, H, W, C) float32."""

    model: Any
    """Of the framework, as :func:`kconv.load_weights` takes it."""

    def train_step(
        self,
        images: NDArray[np.float32],
        targets: NDArray[np.float32],
        learning_rate: float,
        *,
        scale: float,
        update: bool,
        seed: int,
    ) -> tuple[float, float]:
        """Add a batch's gradients, and update the weights; returns its loss and accuracy before.

        Args:
            images: (N, H, W, C).
            targets: (N, classes): the shares of the classes, times what the image counts.
            learning_rate: of the update.
            scale: what the gradients count in the update.
            update: whether to update; otherwise they are kept for a later step.
            seed: of the step's chance.
        """

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities, (N, classes), in inference mode."""

    def recalibrate(self, batches: Iterable[NDArray[np.float32]]) -> None:
        """Estimate the moving statistics of all batch norms from these batches alone."""

    def share_statistics(self) -> None:
        """Take the mean of all processes' moving statistics."""

    def averaged(self) -> AbstractContextManager[None]:
        """Have the moving average of the weights in the model, if there is one."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that training changes: weights, statistics, optimizer, averages."""

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back what :meth:`state` returned."""

    def state_shapes(self, stored: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
        """The shapes that a state must have."""


def _quiet(line: str) -> None:
    pass


def train(
    config: Config,
    output: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    data: Any = None,
    transform: Any = None,
    batch_transform: Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
    log: Callable[[str], None] = show,
) -> Result:
    """Train a model, keep its best state, and evaluate that on the test images.

    Started by ``torchrun`` as one of several processes, it trains one model with the others.

    Args:
        config: What to do. With ``resume``, its model and data must be the run's own.
        output: The run's folder, made if need be; None is a new one that nobody else has.
        resume: Whether to go on from ``output/last.npz``.
        data: The images, in the place of ``config.dataset``: a :class:`kconv.datasets.Dataset`, or
            a mapping as :func:`kconv.datasets.from_objects` takes, such as what
            ``datasets.load_dataset`` returns or ``{"train": CIFAR10(...), "test": ...}``.
        transform: What changes each training image beside ``config.augment``: of torchvision,
            albumentations or Keras, or a function of bytes (H, W, C); see
            :mod:`kconv.training.transforms`.
        batch_transform: What changes whole training batches, such as MixUp of these libraries.
        callbacks: Who is told what happens.
        log: Takes the lines to show.

    Returns:
        The :class:`Result`.

    Raises:
        ValueError: An option or the data make no sense, the checkpoint is another model's, the
            folder holds a run already or is in use by another process, or the processes have
            different options.
        TypeError: The data, a transform, a callback or ``config`` are of another kind.
        OSError: A file cannot be read or written.
        ImportError: A package that the run will need is not installed.
        RuntimeError: Another process of the run has ended.
        FloatingPointError: The loss of an epoch is not finite.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config is a {type(config).__name__}, expected a kconv.training.Config")
    callbacks = checked(callbacks)
    for name, change in (("transform", transform), ("batch_transform", batch_transform)):
        if change is not None and not callable(change):
            raise TypeError(f"{name} is a {type(change).__name__}, which cannot be called")
    with joined(config.framework) as ranks:
        _check_same(dataclasses.asdict(config), ranks, "options")
        given = None if output is None else Path(output)
        folder: Path = ranks.first_of(given or (None if ranks.rank else reserve(config)))

        def run() -> Result:
            """Train with what holds the connections in reach of this function alone."""
            one = _Run(config, folder, ranks, _quiet if ranks.rank else log)
            one.transform, one.batch_transform = transform, batch_transform
            one.callbacks = [] if ranks.rank else callbacks
            return one.train(resume, data)

        # The first alone writes, into a folder that the others need not even see.
        with nullcontext() if ranks.rank else held(folder):
            try:
                return run()
            finally:
                release_memory()


def _check_same(told: Mapping[str, Any], ranks: Ranks, what: str) -> None:
    """See that all processes have been told to do the same."""
    first, *others = ranks.all_of(told)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                if ranks.rank:
                    raise SystemExit(2)  # the first one says it
                raise ValueError(
                    f"process {rank} has {name}={other[name]!r}, the first one {name}={value!r}: "
                    f"all need the same {what}"
                )


@dataclass
class _Run:
    """A run, in one of its processes."""

    config: Config
    output: Path
    ranks: Ranks
    log: Callable[[str], None]
    transform: Any = None
    batch_transform: Callable[..., Any] | None = None
    callbacks: list[Callback] = field(default_factory=list)
    unread: dict[tuple[str, int], str] = field(default_factory=dict)
    unread_told: int = 0

    def train(self, resume: bool, data: Any) -> Result:
        config, output, ranks = self.config, self.output, self.ranks
        checkpoint = None
        if not ranks.rank:
            if not resume and (output / CHECKPOINT).exists():
                raise ValueError(f"{output} holds a run: continue it with --resume {output}")
            checkpoint = checkpoint_of(output / CHECKPOINT, config) if resume else None
        checkpoint = ranks.first_of(checkpoint)
        _start.check_installed(config)
        starts = [] if ranks.rank or checkpoint else [config.weights, config.compress_from]
        for name in (config.teacher, *starts):
            if name is not None:
                find_network(name, config.model)  # or there is an error before images are read
        self.data = _start.load_data(config, data, ranks, self.log)
        _check_same(_start.described(self.data), ranks, "data")
        if checkpoint:
            check_data(checkpoint[0], _start.described(self.data))
        check_loader(self.data.x_train, workers=config.workers, framework=_start.loads(config))
        self.spec = config.spec(self.data)
        self._split()
        _start.check_step(config, self.spec)
        classes = len(self.data.class_names)
        self.weights = _start.class_weights(config, self.data.y_train[self.training], classes)
        self.teacher = _start.Teacher(config.teacher, self.data) if config.teacher else None
        if config.tensorboard and not ranks.rank:
            self.callbacks.append(TensorBoard())

        self.trainer = _make_trainer(config, self.spec, ranks)
        self.best = BestModel(output, config, self.spec, self.data)
        self.progress = self._begin(checkpoint)
        self._tell()
        for callback in self.callbacks:
            callback.on_train_begin(config, output)
        self.began = time.perf_counter()
        self.done_before = len(self.progress.history) + self.progress.steps / self.steps
        while len(self.progress.history) < config.epochs and not self._stops_early():
            self._epoch()
        result = self._finish()
        for callback in self.callbacks:
            callback.on_train_end(result)
        return result

    def _split(self) -> None:
        """Which images are for training and which for validation, and the batches they make."""
        config, data = self.config, self.data
        shuffled = np.random.default_rng(config.seed).permutation(len(data.x_train))
        share = VALIDATION_SHARE if data.x_val is None else 0
        held_out, self.training = np.split(shuffled, [round(share * len(shuffled))])
        if data.x_val is None or data.y_val is None:
            self.validation: tuple[Any, Labels, NDArray[np.intp]] = (
                data.x_train,
                data.y_train,
                held_out,
            )
        else:
            self.validation = data.x_val, data.y_val, np.arange(len(data.y_val))
        if len(self.training) < config.batch_size or not len(self.validation[2]):
            raise ValueError(
                f"batch_size={config.batch_size}: {data.name} has {len(data.x_train)} training "
                f"images, of which {len(held_out)} are held out for validation; expected one batch "
                "or more of the others, and one to validate with"
            )
        if config.batch_size < self.ranks.size:
            raise ValueError(
                f"batch_size={config.batch_size} is below {self.ranks.size}, one image for each "
                "process"
            )
        # A batch norm has no statistics of one image, so that few left over are left out.
        over = len(self.training) % config.batch_size
        self.left_out = over if over < min(2 * self.ranks.size, config.batch_size) else 0
        self.steps = -(-(len(self.training) - self.left_out) // config.batch_size)
        self.recalibrates = config.recalibrate_bn
        if self.recalibrates is None:
            short = config.epochs * self.steps < SHORT_RUN_STEPS
            self.recalibrates = short or config.ema_decay is not None

    def _begin(self, checkpoint: Any) -> Progress:
        """Fill the model; what lies behind the run."""
        config, trainer = self.config, self.trainer
        if checkpoint:
            if not self.ranks.rank:
                self.best.take_over(trainer.model)
            behind = _restore(trainer, *checkpoint)
            if not self.ranks.rank:
                write_options(self.output, config)
            return behind
        if config.weights is not None and not self.ranks.rank:
            whole = fill_network(trainer.model, self.spec, config.weights)
            self.log(
                f"weights      {config.weights}" + ("" if whole else ", with a new classifier")
            )
        if config.compress_from is not None and not self.ranks.rank:
            folder = config.compress_from
            filled, count = _start.compress_from(trainer.model, folder, self.spec.graph())
            self.log(f"weights      {filled} of {count} from {folder}; the others are new")
        if self.ranks.size > 1 and (config.weights or config.compress_from):
            # The others need not see the file.
            state = None if self.ranks.rank else trainer.state()
            trainer.load_state(self.ranks.first_of(state))
        start = Progress([])
        self._save(start)
        if not self.ranks.rank:
            write_options(self.output, config)
        return start

    def _tell(self) -> None:
        """Log what is to be done."""
        data, log = self.data, self.log
        counts = models.count(self.spec)
        log(f"model        {self.spec.name}: {counts.trainable:,} trainable parameters")
        log(
            f"data         {data.name}: {len(self.training):,} training, "
            f"{len(self.validation[2]):,} validation and {len(data.x_test):,} test images "
            f"{data.image_shape}, {len(data.class_names)} classes"
        )
        if isinstance(data.x_train, StreamedImages):
            log("images       are decoded while training, as they would not fit or are to stay out")
        if data.x_test is data.x_val:
            log("test images  are the validation images, as there is no test/")
        if self.left_out:
            log(f"last batch   {self.left_out} images of each epoch are too few for one")
        if self.progress.history or self.progress.steps:
            epochs, steps = len(self.progress.history), self.progress.steps
            log(f"goes on      after {epochs:,} epochs and {steps:,} steps")
        if self.ranks.size > 1:
            log(f"processes    {self.ranks.size}, of which each takes its share of every batch")
        if self.recalibrates:
            log(
                "batch norm   moving statistics are estimated anew before each evaluation "
                "(--no-recalibrate-bn turns this off)"
            )

    # An epoch

    def _epoch(self) -> None:
        config, trainer = self.config, self.trainer
        epoch = len(self.progress.history)
        order = np.random.default_rng([config.seed, epoch]).permutation(self.training)
        loss, accuracy, speed, rate = self._train_epoch(order, epoch)
        _expect_finite("loss", loss, epoch, config)
        trainer.share_statistics()
        images, labels, index = self.validation
        with trainer.averaged():
            if self.recalibrates:
                self._recalibrate(order[: max(RECALIBRATION_IMAGES, config.batch_size)])
            val_loss, val_accuracy, _ = self._evaluate(images, labels, index, "validation")
            _expect_finite("val_loss", val_loss, epoch, config)
            history = self.progress.history
            best = min((done.val_loss for done in history), default=np.inf)
            done = Epoch(epoch + 1, rate, loss, accuracy, val_loss, val_accuracy, speed)
            if not self.ranks.rank and (val_loss < best or not self.best.exists()):
                self.best.save(trainer.model, done)
        self.progress = Progress([*history, done])
        self._save(self.progress)
        if not self.ranks.rank:  # after the checkpoint, which is to know what is printed
            write_history(self.output / "results.csv", self.progress.history)
        self._tell_unread()
        self.log(
            f"epoch {epoch + 1:3d}/{config.epochs}  loss {loss:.4f}  accuracy {accuracy:.4f}  "
            f"val_loss {val_loss:.4f}  val_accuracy {val_accuracy:.4f}  {speed:.1f} images/s"
            f"{self._left(epoch + 1)}"
        )
        for callback in self.callbacks:
            callback.on_epoch_end(done)

    def _left(self, epochs_done: float) -> str:
        """The time that the rest of the run takes, by what has been done of it."""
        done, rest = epochs_done - self.done_before, self.config.epochs - epochs_done
        if done <= 0 or rest <= 0:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * rest)
        return f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def _train_epoch(
        self, order: NDArray[np.intp], epoch: int
    ) -> tuple[float, float, float, float]:
        """Mean loss, mean accuracy, images/s, and the last learning rate."""
        config = self.config
        recipe = augment.PAPERS if config.augment else None
        if config.flip_shift:
            recipe = augment.FLIP_SHIFT
        batches = self._batches(
            self.data.x_train,
            order[: len(order) - self.left_out],
            change=Change(config.seed, epoch, self.ranks.rank, recipe, self.transform),
        )
        first = self.progress.steps
        # What all processes had is the first one's now.
        sums, rate = np.array(self.progress.sums) * (self.ranks.rank == 0), 0.0
        begin = first_done = time.perf_counter()
        saved = first
        with self._progress(len(batches.order), f"epoch {epoch + 1}/{config.epochs}") as bar:
            bar.update(first * config.batch_size)
            reader = read_ahead(
                batches, first, workers=config.workers, framework=_start.loads(config)
            )
            for step, batch in enumerate(reader, start=first):
                self._note_unread(self.data.x_train, batch)
                _expect_images(batch)
                whole = epoch * self.steps + step
                rate = learning_rate(
                    config.lr_schedule,
                    whole,
                    steps_per_epoch=self.steps,
                    epochs=config.epochs,
                    lr=config.lr,
                    warmup_epochs=config.warmup_epochs,
                )
                loss, accuracy, update = self._step(batches, step, batch, rate, epoch)
                sums += np.array([loss, accuracy, 1.0]) * len(batch.indices)
                if step == first:
                    first_done = time.perf_counter()
                due = update and step + 1 - saved >= config.checkpoint_steps
                if due and step + 1 < self.steps:
                    saved = step + 1
                    self._save_within(step + 1, sums, begin)
                for callback in self.callbacks:
                    callback.on_step_end(whole + 1, loss, accuracy, rate)
                so_far = sums / max(sums[2], 1)  # others than the first gave theirs at checkpoints
                bar.set_postfix_str(
                    f"loss {so_far[0]:.4f}, accuracy {so_far[1]:.4f}"
                    f"{self._left(epoch + (step + 1) / self.steps)}",
                    False,
                )
                bar.update(batches.count(step))
        seconds = time.perf_counter() - (first_done if len(batches) - first > 1 else begin)
        timed = range(first + (len(batches) - first > 1), len(batches))
        images = sum(map(batches.count, timed))
        loss, accuracy, count = self.ranks.sum(sums)
        return float(loss / count), float(accuracy / count), images / seconds, rate

    def _step(
        self, batches: Batches, step: int, batch: Batch, rate: float, epoch: int
    ) -> tuple[float, float, bool]:
        """One step; its loss, its accuracy, and whether the weights were updated."""
        config, ranks = self.config, self.ranks
        seeds = np.random.SeedSequence([config.seed, epoch, 2, step, ranks.rank])
        seed, mixing = map(int, seeds.generate_state(2))
        images = augment.scale(batch.images)
        labels = self.data.y_train[batch.indices]
        targets = np.zeros((len(labels), len(self.data.class_names)), np.float32)
        targets[np.arange(len(labels)), labels] = 1
        if self.batch_transform is not None:
            images, targets = changed_batch(self.batch_transform, images, targets, labels, mixing)
        targets = _start.targets_of(
            targets,
            self.weights,
            config.label_smoothing,
            None if self.teacher is None else self.teacher(images),
            config.teacher_weight,
        )
        together = config.gradient_accumulation
        start = step - step % together
        update = (step + 1) % together == 0 or step + 1 == len(batches)
        # The mean of the processes' gradients is to be that of all images of the batch.
        mine = len(range(ranks.rank, batches.count(step), ranks.size))
        scale = mine * ranks.size / batches.count(step) / min(together, len(batches) - start)
        loss, accuracy = self.trainer.train_step(
            images, targets, rate, scale=scale, update=update, seed=seed
        )
        return loss, accuracy, update

    def _batches(self, images: Any, order: NDArray[np.intp], change: Any = None) -> Batches:
        config, ranks = self.config, self.ranks
        return Batches(
            images,
            order,
            config.batch_size,
            ranks.rank,
            ranks.size,
            change=change,
            skip_bad=config.on_bad_image == "skip",
        )

    def _note_unread(self, images: Any, batch: Batch) -> None:
        parts = ("x_train", "x_test", "x_val")
        part = next(name for name in parts if getattr(self.data, name) is images)
        self.unread |= {(part, index): wrong for index, wrong in batch.unread.items()}

    def _tell_unread(self) -> None:
        """Log how many images no process could read, each counted once, if there are new ones."""
        together: dict[tuple[str, int], str] = {}
        for found in self.ranks.all_of(self.unread):
            together |= found
        if len(together) > self.unread_told:
            first = next(iter(together.values()))
            self.log(f"bad images   {len(together):,} left out so far, the first as {first}")
        self.unread_told = len(together)

    # Evaluation

    def _recalibrate(self, sample: NDArray[np.intp]) -> None:
        """Estimate the norms' statistics from whole batches of some training images."""
        size = self.config.batch_size
        batches = self._batches(self.data.x_train, sample[: len(sample) // size * size])
        with self._progress(len(batches.order), "recalibration") as bar:

            def images() -> Iterable[NDArray[np.float32]]:
                for batch in self._read(batches):
                    _expect_images(batch)
                    bar.update(size)
                    yield augment.scale(batch.images)

            self.trainer.recalibrate(images())

    def _evaluate(
        self, images: Any, labels: Labels, index: NDArray[np.intp], what: str
    ) -> tuple[float, float, Labels]:
        """As :func:`evaluate`, each process its share; images that cannot be read are found -1."""
        found = np.zeros((3, len(labels)))
        batches = self._batches(images, index)
        # Always the same batch size: another one would be compiled anew.
        size = -(-self.config.batch_size // self.ranks.size)
        with self._progress(len(index), what) as bar:
            for number, batch in enumerate(self._read(batches)):
                if len(batch.indices):
                    probabilities = _predict(self.trainer, augment.scale(batch.images), size)
                    truth = probabilities[np.arange(len(batch.indices)), labels[batch.indices]]
                    found[0, batch.indices] = probabilities.argmax(axis=1)
                    found[1, batch.indices] = -np.log(np.maximum(truth, 1e-7))
                    found[2, batch.indices] = 1
                self._note_unread(images, batch)
                bar.update(batches.count(number))
        found = self.ranks.sum(found)[:, index]
        classes, losses, read = found
        right = (classes == labels[index])[read > 0]
        named = np.where(read > 0, classes, -1).astype(np.int64)
        return float(losses.sum() / read.sum()), float(right.mean()), named

    def _read(self, batches: Batches) -> Iterable[Batch]:
        return read_ahead(batches, workers=self.config.workers, framework=_start.loads(self.config))

    def _progress(self, total: int, what: str) -> Any:
        return progress(total, what, hidden=self.ranks.rank > 0)

    # Files

    def _save(self, done: Progress) -> None:
        if not self.ranks.rank:
            path, told = self.output / CHECKPOINT, _start.described(self.data)
            save_checkpoint(path, self.config, self.trainer.state(), done, told)

    def _save_within(self, steps: int, sums: NDArray[np.float64], begin: float) -> None:
        """Write a checkpoint within an epoch, from which any number of processes goes on."""
        self.trainer.share_statistics()
        total = tuple(map(float, self.ranks.sum(sums)))
        sums[:] = total if not self.ranks.rank else 0.0
        self._save(Progress(self.progress.history, steps, total, time.perf_counter() - begin))

    def _stops_early(self) -> bool:
        patience, history = self.config.early_stopping, self.progress.history
        if patience is None or not history:
            return False
        losses = [epoch.val_loss for epoch in history]
        stops = len(losses) - 1 - int(np.argmin(losses)) >= patience
        if stops:
            self.log(f"early stop   after {patience} epochs without a lower validation loss")
        return stops

    def _finish(self) -> Result:
        """Test the best state, and write the reports."""
        config, output, data, history = self.config, self.output, self.data, self.progress.history
        # Only the first process need see the folder, so that the others get the state from it.
        state = None
        if not self.ranks.rank:
            load_weights(self.trainer.model, self.best.path)
            state = self.trainer.state() if self.ranks.size > 1 else None
        state = self.ranks.first_of(state)
        if state is not None:
            self.trainer.load_state(state)
        every = np.arange(len(data.y_test))
        _, accuracy, found = self._evaluate(data.x_test, data.y_test, every, "test")
        self._tell_unread()
        read = found >= 0
        confusion = confusion_matrix(data.y_test[read], found[read], len(data.class_names))
        table = report_of(confusion, data.class_names)
        result = Result(history, accuracy, table, self.best.path)
        if not self.ranks.rank:
            _write_reports(config, output, self.best, result, confusion)
        log = self.log
        log(f"\n{table}\n")
        log(f"test accuracy      {accuracy:.4f} ({int(read.sum()):,} images)")
        log(f"peak memory        {peak_memory() / 1e9:.2f} GB")
        log(f"best model         {self.best.path}")
        log(f"per-class report   {output / 'report.txt'}, {output / 'confusion.png'}")
        log(f"training curves    {output / 'curves.png'}")
        log(f"results by epoch   {output / 'results.csv'}")
        log(f"try it             kconv predict {output} IMAGE")
        return result


def _write_reports(
    config: Config, output: Path, best: BestModel, result: Result, confusion: NDArray[np.int64]
) -> None:
    from kconv import plots

    history, data = result.history, best.data
    which = min(history, key=lambda epoch: epoch.val_loss)
    best.describe(
        {
            "epoch": which.epoch,
            "val_loss": which.val_loss,
            "val_accuracy": which.val_accuracy,
            "test_accuracy": result.test_accuracy,
        }
    )
    title = f"{best.spec.name}{f' {config.ktype}' if config.ktype else ''}, {data.name}"
    with replacing(output / "report.txt") as temporary:
        text = f"test accuracy {result.test_accuracy:.4f}\n\n{result.report}\n"
        temporary.write_text(text, encoding="utf-8")
    with replacing(output / "confusion.png") as temporary:
        plots.confusion_picture(confusion, data.class_names, title, temporary)
    with replacing(output / "curves.png") as temporary:
        epochs = [dataclasses.asdict(epoch) for epoch in history]
        plots.training_curves(epochs, temporary, title=title, test_accuracy=result.test_accuracy)


def _make_trainer(config: Config, spec: models.Spec, ranks: Ranks | None = None) -> Trainer:
    if config.framework == "torch":
        from kconv.training._torch import TorchTrainer

        return TorchTrainer(spec, config, ranks or Ranks())
    from kconv.training._keras import KerasTrainer

    return KerasTrainer(spec, config)


def _expect_finite(name: str, loss: float, epoch: int, config: Config) -> None:
    """See that there is something to go on with; every process sees the same."""
    if not np.isfinite(loss):
        advice = "lower lr" if config.clip_grad_norm else "lower lr, or give clip_grad_norm"
        raise FloatingPointError(
            f"the {name} of epoch {epoch + 1} is {loss}: the training has diverged ({advice})"
        )


def _expect_images(batch: Batch) -> None:
    """See that there is something to learn of, as all processes have to take each step."""
    if batch.unread and not len(batch.indices):
        first = next(iter(batch.unread.values()))
        raise ValueError(f"a whole batch cannot be read, the first as {first}")


def _predict(trainer: Trainer, images: NDArray[np.float32], batch_size: int) -> NDArray[np.float32]:
    """Probabilities of a batch that may be smaller."""
    filled = np.resize(images, (batch_size, *images.shape[1:]))
    return trainer.predict(filled)[: len(images)]


def _restore(
    trainer: Trainer, meta: Mapping[str, Any], state: Mapping[str, NDArray[Any]]
) -> Progress:
    """Put a checkpoint's state into the trainer; return what is behind it."""
    expected = trainer.state_shapes(state)
    found = {name: array.shape for name, array in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"the checkpoint is of another model: its {name} has shape {found.get(name)}, "
                f"expected {expected.get(name)}"
            )
    trainer.load_state(state)
    return progress_of(meta)
