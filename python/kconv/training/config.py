"""What to train, on what, and how: the one place of every option.

The fields of :class:`Config` are the options of ``kconv train``, the keys of its TOML files and
what the reference lists; each says in its metadata what it means.

Example:
    >>> config = Config(model="mobilenet", optimizer="sgd", lr=0.1)
    >>> config_from(_toml_reader().loads(to_toml(config))) == config
    True
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from kconv import datasets, models
from kconv._names import did_you_mean
from kconv._require import require
from kconv.datasets import Dataset

FRAMEWORKS = ("keras", "torch")
OPTIMIZERS = ("rmsprop", "adamw", "sgd")
SCHEDULES = ("cyclic25", "constant", "cosine", "one-cycle")
WARMED_UP = ("cosine", "constant")
BAD_IMAGES = ("error", "skip")
PRECISIONS = ("float32", "bfloat16")
SHORT_RUN_STEPS = 2000
"""In fewer steps, moving statistics of momentum 0.99 lag too far behind the weights."""
SMALL_IMAGE = 64
"""Images of no more pixels a side keep the first strides' pixels, as the papers' 32x32 do."""

_PAPERS: dict[str, Any] = {
    "model": "keffnet_b0",
    "optimizer": "rmsprop",
    "lr_schedule": "cyclic25",
    "lr": 0.001,
    "epochs": 50,
    "batch_size": 64,
    "augment": True,
}
"""Both papers': two cycles."""
PRESETS: dict[str, dict[str, Any]] = {
    "paper-v1": {**_PAPERS, "ktype": "D6_16ch"},
    "paper-v2": {**_PAPERS, "ktype": "D6v3_32ch"},
    # Few epochs: one cycle that begins and ends low, so that neither averages of the weights nor
    # new statistics are needed at its end, and little augmentation, whose gain takes long to come.
    "fast": {
        "model": "keffnet_b0",
        "ktype": "D6_16ch",
        "optimizer": "adamw",
        "lr_schedule": "one-cycle",
        "lr": 0.004,
        "weight_decay": 0.02,
        "label_smoothing": 0.1,
        "clip_grad_norm": 5.0,
        "epochs": 20,
        "batch_size": 64,
        "flip_shift": True,
    },
}
"""Sets of options by name; what is given beside a preset overrules it."""


def option(
    default: Any,
    meaning: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    unset: str | None = None,
    resumable: bool = False,
) -> Any:
    """A field of :class:`Config`.

    Args:
        default: Its value where none is given.
        meaning: What it is, in one phrase.
        metavar: What stands for its value in the help.
        choices: All the values that it can have.
        unset: What holds without it, where the default does not say it.
        resumable: Whether a run may go on with another value.
    """
    metadata = {
        "meaning": meaning,
        "metavar": metavar,
        "choices": choices,
        "unset": unset,
        "resumable": resumable,
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, and how. The defaults make a good short run.

    The attributes are the options of ``kconv train``, with "_" in the place of "-"; see
    :func:`options_table`.
    """

    model: str = option("keffnet_b0", "a model of `kconv models`", metavar="NAME")
    ktype: str | None = option(
        None,
        "kind of pointwise convolution, such as D6_16ch or D6v3_32ch",
        metavar="NAME",
        unset="the model's own",
    )
    skip_strides: int | None = option(
        None, "strides skipped, for small images", metavar="N", unset="3 up to 64x64, else none"
    )
    model_options: Mapping[str, Any] = option(
        {}, "further options of the model, a table in TOML", metavar="NAME=VALUE"
    )
    dataset: str = option(
        "fashion_mnist_mini",
        f"{', '.join(datasets.names())}, or a folder or archive of images",
        metavar="NAME|PATH",
    )
    data_dir: str | None = option(
        None,
        "folder with the data set's original files or archives",
        metavar="DIR",
        unset="Keras's cache, or its download, of fashion_mnist, mnist, cifar10 and cifar100",
    )
    train_images: int | None = option(
        None, "use N training images, balanced over classes", metavar="N", unset="all"
    )
    test_images: int | None = option(None, "test on N images, likewise", metavar="N", unset="all")
    image_size: int | None = option(
        None,
        "resize images to this height and width",
        metavar="N",
        unset=f"224 for {', '.join(datasets.PHOTOGRAPHS)}, else 32",
    )
    interpolation: str = option("bilinear", "how to resize them", choices=datasets.INTERPOLATIONS)
    stream: bool | None = option(
        None,
        "decode images while training, in the place of holding all of them in memory",
        unset="if they would take more than a quarter of it",
        resumable=True,
    )
    workers: int | None = option(
        None,
        "processes (Keras: threads) that decode streamed images; 0 decodes between steps",
        metavar="N",
        unset="one for each CPU, at most 8",
        resumable=True,
    )
    on_bad_image: str = option(
        "error", "what to do with an image that cannot be read", choices=BAD_IMAGES
    )
    epochs: int = option(2, "passes over the training images", metavar="N", resumable=True)
    batch_size: int = option(64, "images in a step, of all processes together", metavar="N")
    optimizer: str = option(
        "rmsprop",
        "the optimizer, as the framework has it; rmsprop is the papers' (Keras's) in both",
        choices=OPTIMIZERS,
    )
    momentum: float = option(0.9, "momentum of sgd", metavar="M")
    weight_decay: float = option(
        0.0,
        "weight decay of all but norms and biases, decoupled but in PyTorch's sgd",
        metavar="W",
    )
    lr_schedule: str = option("cyclic25", "learning rate over the run", choices=SCHEDULES)
    lr: float = option(
        0.001,
        "learning rate that cyclic25 starts from, or the highest one of the other schedules",
        metavar="RATE",
    )
    warmup_epochs: float = option(
        0.0, "epochs in which cosine and constant rise to their rate", metavar="N"
    )
    label_smoothing: float = option(
        0.0, "share of the truth that all classes have in common", metavar="SHARE"
    )
    class_weights: str | tuple[float, ...] | None = option(
        None,
        "weights of the classes' losses: balanced, or numbers in the classes' order (1,2.5,1)",
        metavar="balanced|W,W,...",
        unset="all count the same",
    )
    ema_decay: float | None = option(
        None,
        "evaluate and keep a moving average of the weights with this decay",
        metavar="DECAY",
        unset="the weights themselves",
    )
    clip_grad_norm: float | None = option(
        None, "scale gradients down to this norm of all together", metavar="NORM", unset="never"
    )
    gradient_accumulation: int = option(
        1, "batches whose mean gradients make one update", metavar="N"
    )
    early_stopping: int | None = option(
        None,
        "end after N epochs without a lower validation loss",
        metavar="N",
        unset="never",
        resumable=True,
    )
    teacher: str | None = option(
        None,
        "folder of a run, or name of `kconv models`, whose probabilities are learnt, too "
        "(distillation)",
        metavar="NAME|DIR",
    )
    teacher_weight: float = option(
        0.5, "the teacher's share of what is learnt, beside the labels'", metavar="SHARE"
    )
    augment: bool = option(False, "augment the training images as the papers do")
    flip_shift: bool = option(
        False, "mirror training images at random, and shift them by up to an eighth of their size"
    )
    recalibrate_bn: bool | None = option(
        None,
        "estimate moving statistics of batch norms anew before each evaluation",
        unset=f"in runs below {SHORT_RUN_STEPS:,} steps, and with ema_decay",
    )
    seed: int = option(0, "fixes all chance", metavar="N")
    framework: str = option("keras", "what to train with", choices=FRAMEWORKS)
    precision: str = option(
        "float32",
        "what is stored between layers; weights, sums, statistics and losses stay float32",
        choices=PRECISIONS,
        resumable=True,
    )
    recompute: bool = option(
        False,
        "compute values anew in the backward pass in the place of keeping them: less memory for "
        "about a third more time",
        resumable=True,
    )
    weights: str | None = option(
        None,
        "file, folder of a run, or name of `kconv models`, whose weights to start from; the "
        "classifier starts anew where the classes differ",
        metavar="NAME|PATH",
        unset="random ones",
    )
    compress_from: str | None = option(
        None,
        "folder of a run of the network without kType (or a name), whose weights to start from but "
        "for those of its pointwise convolutions, which the kType's blocks replace",
        metavar="NAME|DIR",
    )
    sync_bn: bool = option(
        False, "batch norms over the images of all processes, in the place of each one's"
    )
    checkpoint_steps: int = option(
        1000, "steps after which a running epoch is saved, too", metavar="N", resumable=True
    )
    tensorboard: bool = option(
        False, "write events for TensorBoard into the run's folder", resumable=True
    )

    def __post_init__(self) -> None:
        """Check the values that nothing else checks.

        Raises:
            TypeError: One of them is of another type.
            ValueError: One of them makes no sense.
        """
        for name, kind in _types().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        self._check_numbers()
        for known in dataclasses.fields(self):
            choices, value = known.metadata["choices"], getattr(self, known.name)
            if choices and value not in choices:
                raise ValueError(
                    f"unknown {known.name} {value!r}{did_you_mean(value, choices)}: known are "
                    f"{', '.join(choices)}"
                )
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ValueError(
                f"class_weights={self.class_weights!r} is neither 'balanced' nor a list of numbers"
            )
        if isinstance(self.class_weights, tuple) and not all(
            0 <= weight < math.inf for weight in self.class_weights
        ):
            raise ValueError(f"class_weights={self.class_weights} must be 0 or above, and finite")
        if self.augment and self.flip_shift:
            raise ValueError("augment=True mirrors and shifts, as flip_shift=True does: give one")
        if self.compress_from is not None and self.weights is not None:
            raise ValueError("weights and compress_from both say what to start from: give one")
        if self.sync_bn and self.framework != "torch":
            raise ValueError("sync_bn=True: only framework='torch' trains in several processes")
        if self.sync_bn and self.recompute:
            raise ValueError("recompute=True needs fused layers, which sync_bn=True takes apart")
        self._check_use()
        self._check_model_options()

    def _check_use(self) -> None:
        """See that no option is given that others leave without effect."""
        for name, used, where in (
            ("momentum", self.optimizer == "sgd", "optimizer='sgd'"),
            (
                "warmup_epochs",
                self.lr_schedule in WARMED_UP,
                f"lr_schedule {' or '.join(map(repr, WARMED_UP))}",
            ),
            ("teacher_weight", self.teacher is not None, "teacher"),
        ):
            value = getattr(self, name)
            if not used and value != getattr(type(self), name):
                raise ValueError(f"{name}={value} has no effect without {where}")

    def _check_numbers(self) -> None:
        least_one = (
            *("epochs", "batch_size", "image_size", "train_images", "test_images"),
            *("gradient_accumulation", "early_stopping", "checkpoint_steps"),
        )
        for name in least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 or above")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to below 2^63")
        for name in ("lr", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0, and finite")
        for name in ("weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or above, and finite")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be from 0 to below 1")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight={self.teacher_weight} must be from 0 to 1")

    def _check_model_options(self) -> None:
        decided = {
            "input_shape": "the data set decides it",
            "classes": "the data set decides it",
            "include_top": "training needs the classifier",
            **({} if self.ktype is None else {"ktype": "ktype decides it"}),
            **({} if self.skip_strides is None else {"skip_stride_cnt": "skip_strides decides it"}),
        }
        for name in sorted(self.model_options.keys() & decided.keys()):
            raise ValueError(f"the model's {name} cannot be given, as {decided[name]}")

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
        has_strides = "skip_stride_cnt" in {known.name for known in dataclasses.fields(spec)}
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


# Types


def _types() -> dict[str, Any]:
    hints = get_type_hints(Config)
    return {known.name: hints[known.name] for known in dataclasses.fields(Config)}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a field's annotation names; ``X | None`` is two."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value, in the type that the field has; JSON and TOML know lists and not tuples."""
    for one in alternatives(kind):
        origin = get_origin(one) or one
        if origin is float and type(value) in (int, float):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            if all(type(number) in (int, float) for number in value):
                return tuple(map(float, value))
        elif isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
            return dict(value) if origin is Mapping else value
    words = [_WORDS.get(get_origin(one) or one, "") for one in alternatives(kind)]
    expected = " or ".join(filter(None, words))
    raise TypeError(f"{name}={value!r} is a {type(value).__name__}, expected {expected}")


_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of numbers",
    Mapping: "a table",
}


def config_from(given: Mapping[str, Any], source: str = "the configuration") -> Config:
    """The configuration of some options by name; a ``preset`` among them is overruled by others.

    Args:
        given: The options.
        source: Where they come from, for errors.

    Returns:
        The :class:`Config`.

    Raises:
        ValueError: There is no such option, or a value makes no sense.
        TypeError: A value is of another type.
    """
    options = dict(given)
    preset = options.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(
                f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)}: known are "
                f"{', '.join(PRESETS)}"
            )
        options = {**PRESETS[preset], **options}
    for name in options.keys() - _types().keys():
        raise ValueError(f"{source} has no option {name!r}{did_you_mean(name, _types())}")
    return Config(**options)


# TOML


def _toml_reader() -> Any:
    """Python's own from 3.11 on; only those who have a TOML file need the other one."""
    own = sys.version_info >= (3, 11)
    return require("tomllib" if own else "tomli", "tomli", "reading TOML files")


def read_toml(path: Path) -> dict[str, Any]:
    """The options that a TOML file gives, by their names with "-" or "_".

    Args:
        path: The file.

    Returns:
        Them; nothing is checked but that the file is one.

    Raises:
        ValueError: It is no TOML.
        OSError: It cannot be read.
    """
    try:
        options = _toml_reader().loads(path.read_text("utf-8"))
    except ValueError as error:  # of which both UnicodeDecodeError and TOMLDecodeError are
        raise ValueError(f"{path} is not TOML: {error}") from None
    return {name.replace("-", "_"): value for name, value in options.items()}


def to_toml(config: Config) -> str:
    """All options as a TOML file, each after what it means; those that are unset as comments.

    Example:
        >>> [line for line in to_toml(Config(seed=3)).splitlines() if "seed" in line]
        ['seed = 3']

    Args:
        config: The options.

    Returns:
        The text, which :func:`read_toml` reads. (Python's library only reads TOML, and what is
        written here is text, numbers, and tables of them.)
    """
    lines = []
    for known in dataclasses.fields(config):
        value = getattr(config, known.name)
        lines.append(f"# {known.metadata['meaning']}")
        if value is None:
            lines.append(f"# {known.name} = ...  # {known.metadata['unset'] or 'none'}")
        else:
            lines.append(f"{known.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # A JSON text is a TOML one, but for this one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def options_table() -> str:
    """All options as a table in Markdown, for the documentation."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for known in dataclasses.fields(Config):
        default = None if known.default is dataclasses.MISSING else known.default
        shown = f"`{_toml(default)}`" if default is not None else known.metadata["unset"] or "none"
        meaning = known.metadata["meaning"].replace("|", "\\|")
        choices = known.metadata["choices"]
        listed = f": {', '.join(choices)}" if choices else ""
        rows.append(f"| `{known.name}` | {shown} | {meaning}{listed} |")
    return "\n".join(rows)
