"""Tables of networks: what they cost, and what the papers published about them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import product
from typing import NamedTuple

from kconv.ktypes import resolve
from kconv.models.counting import Counts, count
from kconv.models.graph import Shape
from kconv.models.spec import Spec, create

KEFFNETS = tuple(f"keffnet_b{n}" for n in range(8))
TABLE_KTYPES = ("D6_16ch", "D6_32ch", "D6v3_16ch", "D6v3_32ch")

# The papers' names: the network here, its unmodified baseline, and options.
_PAPER_MODELS: dict[str, tuple[str, str, dict[str, int]]] = {
    "EfficientNet-B0": ("efficientnet_b0", "efficientnet_b0", {}),
    "kEffNet-B0": ("keffnet_b0", "efficientnet_b0", {}),
    "kEffNet-B0 (skip_stride_cnt=3)": ("keffnet_b0", "efficientnet_b0", {"skip_stride_cnt": 3}),
    "DenseNet-BC L100": ("densenet_bc_l100", "densenet_bc_l100", {}),
    "kDenseNet-BC L100": ("kdensenet_bc_l100", "densenet_bc_l100", {}),
    "Inception V3": ("inception_v3", "inception_v3", {}),
    "kInception V3": ("kinception_v3", "inception_v3", {}),
    "MobileNet": ("mobilenet", "mobilenet", {}),
    "kMobileNet": ("kmobilenet", "mobilenet", {}),
    "MobileNet V3 Large": ("mobilenet_v3_large", "mobilenet_v3_large", {}),
    "kMobileNet V3 Large": ("kmobilenet_v3_large", "mobilenet_v3_large", {}),
}


class ModelRow(NamedTuple):
    """A row of :func:`table`.

    Attributes:
        model: the network's name.
        ktype: its kType.
        trainable: trainable parameters.
        macs: multiply-accumulates of one image, None for an unknown size.
    """

    model: str
    ktype: str
    trainable: int
    macs: int | None


def table(
    models: Iterable[str] = KEFFNETS,
    ktypes: Iterable[str | int] = TABLE_KTYPES,
    *,
    classes: int = 10,
    input_shape: Shape = (224, 224, 3),
) -> list[ModelRow]:
    """What networks cost with several kTypes.

    Example:
        >>> table(["keffnet_b0"], ["D6_16ch"])
        [ModelRow(model='keffnet_b0', ktype='D6_16ch', trainable=639702, macs=123613524)]

    Args:
        models: names of networks that have a kType.
        ktypes: the kTypes to try each with.
        classes: outputs.
        input_shape: (H, W, channels) of the images.

    Returns:
        One row for each network and kType, in this order.

    Raises:
        ValueError: if a network or a kType is unknown.
        TypeError: if a network has no kType.
    """
    rows = []
    for model, ktype in product(models, ktypes):
        name = resolve(ktype).name
        spec = create(model, ktype=name, classes=classes, input_shape=input_shape)
        counts = count(spec)
        rows.append(ModelRow(model, name, counts.trainable, counts.macs))
    return rows


class PaperRow(NamedTuple):
    """A row of the papers' tables beside what its spec gives.

    Attributes:
        paper: "V1" (MENDEL 28(1), 2022) or "V2" (Entropy 24(9):1264, 2022).
        dataset: the data set it was trained on.
        epochs: for how many epochs.
        model: the network's name in the paper.
        ktype: its kType, "" for an unmodified network.
        input: the images' size, "224x224" or "32x32".
        classes: outputs.
        counts: parameters and multiply-accumulates, from the spec.
        saving: share of the baseline's trainable parameters that is saved, from the specs.
        published_parameters: the paper's figure.
        published_is_total: whether that figure includes the moving statistics: some rows do.
        published_flops: the paper's figure, from TensorFlow's profiler: all operations on floats
            halved, so a few per cent above the multiply-accumulates.
        published_accuracy: the paper's test accuracy.
    """

    paper: str
    dataset: str
    epochs: int
    model: str
    ktype: str
    input: str
    classes: int
    counts: Counts
    saving: float
    published_parameters: int
    published_is_total: bool
    published_flops: int
    published_accuracy: float


def paper_spec(model: str, ktype: str, input_size: str, classes: int) -> Spec:
    """The spec of a network of the papers.

    Example:
        >>> paper_spec("kMobileNet", "D6_32ch", "224x224", 10).name
        'kmobilenet'

    Args:
        model: the network's name in the paper.
        ktype: its kType, "" for an unmodified network.
        input_size: the images' size, such as "224x224".
        classes: outputs.

    Returns:
        The spec.

    Raises:
        ValueError: if the papers have no such network.
    """
    if model not in _PAPER_MODELS:
        raise ValueError(f"unknown model {model!r}; the papers have {', '.join(_PAPER_MODELS)}")
    name, _, options = _PAPER_MODELS[model]
    height, width = map(int, input_size.split("x"))
    ktypes = {"ktype": ktype} if ktype else {}
    return create(name, classes=classes, input_shape=(height, width, 3), **options, **ktypes)


@cache
def paper_table() -> tuple[PaperRow, ...]:
    """Both papers' tables: published figures, and those that follow from the specs.

    Example:
        >>> row = paper_table()[1]
        >>> row.model, row.ktype, row.counts.trainable, f"{row.saving:.0%}"
        ('kEffNet-B0', 'D6_16ch', 639702, '84%')

    Returns:
        The rows, in the order of the papers.
    """
    text = resources.files(__package__).joinpath("paper_tables.csv").read_text("utf-8")
    return tuple(map(_paper_row, csv.DictReader(text.splitlines())))


def _paper_row(row: dict[str, str]) -> PaperRow:
    classes = int(row["classes"])
    counts = count(paper_spec(row["model"], row["ktype"], row["input"], classes))
    baseline = count(create(_PAPER_MODELS[row["model"]][1], classes=classes))
    return PaperRow(
        paper=row["paper"],
        dataset=row["dataset"],
        epochs=int(row["epochs"]),
        model=row["model"],
        ktype=row["ktype"],
        input=row["input"],
        classes=classes,
        counts=counts,
        saving=1 - counts.trainable / baseline.trainable,
        published_parameters=int(row["parameters"]),
        published_is_total=row["counted"] == "total",
        published_flops=int(row["flops"]),
        published_accuracy=float(row["test_accuracy"]),
    )
