"""Trained networks for other programs, each by the target's own converter, and checked there.

=============  =============================  ===================================================
format         what is written                needs
=============  =============================  ===================================================
onnx           ``.onnx``, opset 17            onnx; onnxruntime, if it is there, checks it
openvino       ``.xml`` and ``.bin``          onnx, openvino
torch          ``.pt2`` of ``torch.export``   torch
keras          ``.keras``                     keras and a backend
mnn            ``.mnn``                       onnx, MNN
ncnn           ``.ncnn.param``, ``.bin``      torch, pnnx, ncnn
litert         ``.tflite``                    torch, litert-torch
executorch     ``.pte``, with XNNPACK         torch, executorch
=============  =============================  ===================================================

The input is called ``images``, (N, channels, H, W) float32 (Keras's (N, H, W, channels)), scaled as
``config.json`` says; the output ``probabilities``, (N, classes), or ``features`` where the network
does not end in a softmax, (N, numbers) or maps of the input's layout. N may be any number, but for
ncnn and LiteRT, which take one image at a time and have names of their own, and for ExecuTorch,
which takes up to ``MOST_IMAGES``. A network of any image size needs ONNX, OpenVINO, MNN or Keras;
the others refuse it. An interleave of channels is a Gather (index_select) with a constant index,
and for ncnn, which has none, its ShuffleChannel.

Example:
    >>> import kconv
    >>> from kconv import export
    >>> net = kconv.load("runs/keffnet_b0-cifar10-1")  # doctest: +SKIP
    >>> print(export.export(net, "net.onnx", "onnx").checked)  # doctest: +SKIP
    by onnxruntime 1.32.0: largest difference 2.4e-07
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv._names import did_you_mean
from kconv.runtime import FrozenNetwork

__all__ = ["FORMATS", "Exported", "default_name", "export"]

_SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torch": ".pt2",
    "keras": ".keras",
    "mnn": ".mnn",
    "ncnn": ".ncnn.param",
    "litert": ".tflite",
    "executorch": ".pte",
}
FORMATS = tuple(_SUFFIXES)
TOLERANCE = 1e-3
"""How far probabilities may be from kconv's: half a digit of a percentage."""
_CHECKED_IMAGES = 3
MOST_IMAGES = {"ncnn": 1, "litert": 1, "executorch": 16}
"""How many a call may have, where it is not any number."""
_ENDS = {"ncnn": ("in0", "out0"), "litert": ("args_0", "output_0")}
"""Names of input and output that the target's converter gives."""

Run = Callable[[NDArray[np.float32]], Any]
"""What a target computes of (N, H, W, channels) images."""


@dataclass(frozen=True)
class Exported:
    """What :func:`export` has written.

    Attributes:
        path: the file; others may lie beside it.
        inputs: name, shape and type of the input.
        outputs: of the output.
        checked: by what the file was run, and how far its outputs are from kconv's.
    """

    path: Path
    inputs: str
    outputs: str
    checked: str


def default_name(form: str) -> str:
    """The name of a format's file, where nobody says another.

    Example:
        >>> default_name("onnx")
        'model.onnx'
    """
    return f"model{_SUFFIXES[form]}"


def export(net: FrozenNetwork, path: str | os.PathLike[str], form: str) -> Exported:
    """Write a network for another program, and run it there.

    Args:
        net: the network.
        path: the file to write, with the format's suffix.
        form: one of ``FORMATS``.

    Returns:
        What was written.

    Raises:
        ValueError: there is no such format, the suffix is another one, the format lacks one of
            the network's layers, or the target's outputs are not kconv's.
        ImportError: a package that the format needs is not installed.
        OSError: the file cannot be written.
    """
    if form not in FORMATS:
        close = did_you_mean(form, FORMATS)
        raise ValueError(f"unknown format {form!r}{close}: known are {', '.join(FORMATS)}")
    path = Path(path)
    if not path.name.endswith(_SUFFIXES[form]):
        raise ValueError(f"{path} does not end in {_SUFFIXES[form]}, as files of {form} do")
    module = import_module(f"kconv.export._{form}")
    before = {one: one.stat().st_mtime_ns for one in path.parent.glob("*")}
    written: list[Path] = module.write(net, path)
    try:
        run, by = module.runner(net, path)
        checked = _check(net, run, by, "NHWC" if form == "keras" else "NCHW")
    except BaseException:
        for one in written:  # what is wrong stays nowhere
            if before.get(one) != one.stat().st_mtime_ns:
                one.unlink()
        raise
    image, most = net.config.image, MOST_IMAGES.get(form)
    size: tuple[object, ...] = (image.channels, image.height or "H", image.width or "W")
    result: tuple[object, ...] = (len(net.class_names),)
    if len(net.graph[net.graph.output].shape) == 3:  # maps of features
        result += ("output height", "output width")
    if form == "keras":
        size, result = (*size[1:], size[0]), (*result[1:], result[0])
    batch = () if form == "ncnn" else (1,) if most == 1 else ("N",)
    limit = f", N <= {most}" if most and most > 1 else ""
    inputs, outputs = (
        f"{name} ({', '.join(map(str, (*batch, *shape)))}) float32{limit}"
        for name, shape in zip(
            _ENDS.get(form, (INPUT, output_name(net))),
            (size, result),
            strict=True,
        )
    )
    return Exported(path, inputs, outputs, checked)


INPUT = "images"


def output_name(net: FrozenNetwork) -> str:
    """The name of the output."""
    return "probabilities" if net.gives_probabilities else "features"


def _check(net: FrozenNetwork, run: Run, by: str, layout: str) -> str:
    """Compare outputs; those of several images, as some targets forget that there may be some.

    Maps of features are in the target's layout.
    """
    height, width = usual_size(net)
    rng = np.random.default_rng(0)
    shape = (_CHECKED_IMAGES, height, width, net.config.image.channels)
    # Of little contrast each, as noise of much makes trained networks certain of one class.
    levels = rng.uniform(-1.5, 1.5, (_CHECKED_IMAGES, 1, 1, 1))
    images = (levels + rng.normal(0, 0.3, shape)).astype(np.float32)
    largest = 0.0
    for batch in (images[:1], images):
        ours, theirs = net(batch), np.asarray(run(batch))
        if ours.ndim == 4 and layout == "NCHW":
            ours = ours.transpose(0, 3, 1, 2)
        if theirs.shape != ours.shape:
            raise ValueError(f"{by} gives outputs of shape {theirs.shape}, kconv {ours.shape}")
        difference = float(np.abs(theirs - ours).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(ours).max())):
            raise ValueError(f"{by} computes something else: largest difference {difference:.1e}")
        largest = max(largest, difference)
    return f"by {by}: largest difference {largest:.1e}"


def fixed_size(net: FrozenNetwork, target: str) -> tuple[int, int]:
    """Height and width of a network's images.

    Raises:
        ValueError: the network takes several, which the target does not.
    """
    image = net.config.image
    if image.height is None or image.width is None:
        raise ValueError(f"{target} needs a network of one image size: its padding depends on it")
    return image.height, image.width


def usual_size(net: FrozenNetwork) -> tuple[int, int]:
    """Height and width of images to try a network on."""
    image = net.config.image
    return image.height or 224, image.width or 224
