"""A folder that is a model: ``model.safetensors`` beside ``config.json``, as Hugging Face has them.

The weights have PyTorch's names and layouts (see :mod:`kconv.weights`). The configuration tells the
network, as the options of one of :mod:`kconv.models` or as a graph of layers, its classes, how an
image becomes its input, and what it came to. Both are read with NumPy alone, and nothing that
they say is believed unchecked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from kconv import models
from kconv._files import replacing
from kconv._kconv import build_info
from kconv.models.serial import graph_from_json, graph_to_json
from kconv.weights._entries import Array, cast
from kconv.weights._layouts import Layout, Shape, layout
from kconv.weights._safetensors import (
    safetensors_entries,
    safetensors_header,
    write_safetensors,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "ImageInput",
    "ModelConfig",
    "expected_weights",
    "layer_class",
    "read_config",
    "read_weights",
    "weight_layouts",
    "write_config",
    "write_weights",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_LONGEST_CONFIG = 1 << 24
_LARGEST_OPTION = {int: 1 << 20, float: 100.0}
"""Of a spec's options that a file names: a network of more would not end to be built."""
_MOST_BLOCKS = 1000
Interpolation = Literal["bilinear", "nearest"]


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """How an image becomes a network's input.

    Attributes:
        height: in pixels, to which images are resized; None if the network takes any.
        width: likewise.
        channels: 3 for RGB, 1 for grey, or whatever else the network reads.
        interpolation: how images are resized.
        scale: what a byte is multiplied by, one number or one for each channel.
        offset: what is added then, likewise.

    Raises:
        ValueError: one of them makes no sense.
    """

    height: int | None
    width: int | None
    channels: int
    interpolation: Interpolation = "bilinear"
    scale: float | tuple[float, ...] = 1 / 64
    offset: float | tuple[float, ...] = -2.0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("height", "width", "channels"):
            size = getattr(self, name)
            if (type(size) is not int or not 0 < size < 1 << 16) and (
                size is not None or name == "channels"
            ):
                raise ValueError(f"the image's {name} is {size!r}, expected pixels or channels")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"interpolation={self.interpolation!r}: known are {known}")
        for name in ("scale", "offset"):
            value = getattr(self, name)
            each = [value] if isinstance(value, int | float) else value
            if not isinstance(each, list | tuple) or not all(map(_is_number, each)):
                raise ValueError(f"the image's {name} is {value!r}, expected numbers")
            if each is value and len(each) != self.channels:
                raise ValueError(f"{name}={value!r} is not one number for each of the channels")
            object.__setattr__(self, name, tuple(map(float, each)) if each is value else value)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What ``config.json`` says.

    Attributes:
        network: a spec, or a graph of layers where it is of no spec.
        class_names: one name for each output.
        image: how an image becomes the input.
        metrics: what training came to, such as ``{"test_accuracy": 0.93}``.
        dataset: what it was trained on.
        kconv_version: of the kconv that wrote it.
    """

    network: models.Spec | models.Graph
    class_names: tuple[str, ...]
    image: ImageInput
    metrics: Mapping[str, float] = field(default_factory=dict)
    dataset: str | None = None
    kconv_version: str = field(default_factory=lambda: build_info()["version"])

    @property
    def name(self) -> str:
        """The network's name."""
        return self.network.name

    def graph(self) -> models.Graph:
        """The network's layers."""
        return self.network if isinstance(self.network, models.Graph) else self.network.graph()

    def to_json(self) -> dict[str, Any]:
        """What stands in the file."""
        network: dict[str, Any]
        if isinstance(self.network, models.Graph):
            network = {"graph": graph_to_json(self.network)}
        else:
            options = dataclasses.asdict(self.network)
            options.pop("name")
            network = {"spec": options}
        return {
            "model_type": "kconv",
            "architecture": self.name,
            "num_classes": len(self.class_names),
            "label_names": list(self.class_names),
            "image": dataclasses.asdict(self.image),
            **network,
            "dataset": self.dataset,
            "metrics": dict(self.metrics),
            "kconv_version": self.kconv_version,
        }


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write ``config.json``, whole or not at all."""
    text = json.dumps(config.to_json(), indent=2, ensure_ascii=False)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_weights(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``model.safetensors``, whole or not at all."""
    with replacing(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, arrays, {"format": "pt"})


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json``.

    Raises:
        ValueError: the folder is no model's, or the file is damaged.
        OSError: it cannot be read.
    """
    path = folder / CONFIG
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a run, but a file")
    if not path.is_file():
        if (folder / "last.npz").is_file():
            raise ValueError(
                f"{folder} is a run that has no {CONFIG} yet, as it has not ended an epoch or is "
                f"of an older kconv: kconv train --resume {folder} writes it"
            )
        raise ValueError(f"{folder} is no run, as it has no {CONFIG}")
    if path.stat().st_size > _LONGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than a configuration")
    try:
        return _config_of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a configuration of kconv's: {reason}") from None


def _config_of(value: Any) -> ModelConfig:
    if not isinstance(value, dict) or value.get("model_type") != "kconv":
        raise ValueError('it does not say "model_type": "kconv"')
    names = value.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its label_names are no list of texts")
    metrics = value.get("metrics", {})
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise ValueError("its metrics are no numbers")
    dataset, version = value.get("dataset"), value.get("kconv_version")
    if not isinstance(dataset, str | None) or not isinstance(version, str):
        raise ValueError("its dataset or kconv_version is no text")
    network = _network_of(value)
    config = ModelConfig(
        network=network,
        class_names=tuple(names),
        image=_image_of(value.get("image")),
        metrics=metrics,
        dataset=dataset,
        kconv_version=version,
    )
    graph = config.graph()
    outputs = graph[graph.output].shape[-1]
    if outputs != len(names):
        raise ValueError(f"it has {len(names)} label_names, the network has {outputs} outputs")
    if (count := value.get("num_classes", outputs)) != outputs:
        raise ValueError(f"its num_classes is {count!r}, the network has {outputs} outputs")
    if graph.input_shape[-1] != config.image.channels:
        raise ValueError(
            f"its images have {config.image.channels} channels, the network reads "
            f"{graph.input_shape[-1]}"
        )
    return config


def _network_of(value: Mapping[str, Any]) -> models.Spec | models.Graph:
    if ("graph" in value) == ("spec" in value):
        raise ValueError("it has both a spec and a graph, or neither")
    if "graph" in value:
        return graph_from_json(value["graph"])
    options, name = value["spec"], value.get("architecture")
    if not isinstance(options, dict) or not isinstance(name, str):
        raise ValueError("its spec is no set of options, or its architecture no text")
    for option, given in options.items():
        for number in given if isinstance(given, list) else [given]:
            most = _LARGEST_OPTION.get(type(number), 0)
            if option == "blocks":
                most = _MOST_BLOCKS
            if _is_number(number) and abs(number) > most:
                raise ValueError(f"its {option}={number} is beyond {most}")
    return models.create(name, **options)


def _image_of(value: Any) -> ImageInput:
    fields = {known.name for known in dataclasses.fields(ImageInput)}
    if not isinstance(value, dict) or not value.keys() == fields:
        raise ValueError(f"its image has not exactly {', '.join(sorted(fields))}")
    return ImageInput(**value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_CLASSES = {
    "Conv": "Conv2D",
    "DepthwiseConv": "DepthwiseConv2D",
    "BatchNorm": "BatchNormalization",
    "Dense": "Dense",
}
"""The classes of Keras's that :func:`kconv.weights._layouts.layout` knows layers by."""


def layer_class(layer: models.Layer) -> str | None:
    """Keras's class of a layer with weights."""
    return _CLASSES.get(type(layer).__name__)


def weight_layouts(graph: models.Graph) -> dict[tuple[str, str], tuple[str, Layout, Shape]]:
    """For each (layer, weight) of a graph its name in the file, its layout, and Keras's shape.

    Raises:
        ValueError: a layer's weights have no names in files.
    """
    found = {}
    for layer in graph.layers:
        kind = layer_class(layer)
        for weight, shape in layer.weights().items():
            if kind is None:
                raise ValueError(f"layer {layer.name!r}, a {type(layer).__name__}, cannot be kept")
            how = layout(kind, weight, shape)
            found[layer.name, weight] = f"{layer.name}.{how.name}".replace("/", "_"), how, shape
    return found


def expected_weights(graph: models.Graph) -> dict[tuple[str, str], tuple[str, Shape]]:
    """For each (layer, weight) of a graph its name in the file, and its shape there.

    Raises:
        ValueError: a layer's weights have no names in files.
    """
    return {
        key: (name, how.shape(shape)) for key, (name, how, shape) in weight_layouts(graph).items()
    }


def read_weights(folder: Path, graph: models.Graph) -> dict[tuple[str, str], Array]:
    """The weights of a graph, by layer and weight, float32 in PyTorch's layouts.

    Raises:
        ValueError: the file is damaged, or is of another model.
        OSError: it cannot be read.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} is no run, as it has no {WEIGHTS}")
    try:
        header = safetensors_header(path)
        if header is None:
            raise ValueError("it is no safetensors file")
        stored, _ = safetensors_entries(path, header)
        entries = {name.replace("/", "_"): entry for name, entry in stored.items()}
        if len(entries) < len(stored):
            raise ValueError("it has two weights of one name")
        # A counter of PyTorch's, which nothing is computed with.
        rest = {name for name in entries if name.rpartition(".")[2] != "num_batches_tracked"}
        arrays = {}
        for key, (name, shape) in expected_weights(graph).items():
            if name not in entries:
                raise ValueError(f"it lacks {name!r}, which the network has")
            if entries[name].shape != shape:
                raise ValueError(f"its {name!r} is {entries[name].shape}, the network's {shape}")
            arrays[key] = np.ascontiguousarray(cast(entries[name].read(), "float32"))
            rest.discard(name)
        if rest:
            raise ValueError(f"its {min(rest)!r} is none of the network's")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or another model's: {error}") from None
    return arrays
