"""Weights of models, from the original's checkpoints and from the frameworks' own files.

:func:`load_weights` fills a PyTorch or Keras model, or a network of ``kconv.jax.nnx``, from any of
these, whichever framework wrote it; what a file is shows from its structure, not from its name:

* the original's checkpoints: Keras 2 HDF5, whole models or weights alone;
* Keras 3's ``.keras``, ``.weights.h5``, ``.weights.json`` with its shards, and ``.h5``;
* what ``torch.save`` writes: a ``state_dict``, or a trainer's checkpoint that holds one;
* safetensors, which :func:`save_weights` writes, and ``.npz``;
* Hugging Face's folders, and their indices of shards (``model.safetensors.index.json``).

Every weight of the file must find its place, and every weight of the model its value (PyTorch's
``num_batches_tracked`` excepted). All are found, converted and checked before the first is set.

Between frameworks, and in safetensors, weights have PyTorch's names and layouts by their layers'
classes ("stem_conv.weight", a kernel as (O, I/groups, k, k)), and "_" in the place of "/", which
Keras 3 refuses; what PyTorch has no counterpart of, as the weights of a Keras LSTM, keeps Keras's
name and layout. A dense layer after a flattening keeps the order of its inputs, which differs
between the frameworks unless an image is one pixel. Layers with Keras's automatic names
("conv2d_17") are matched by their order among those of the same weights and shapes. Keras's own
files go to a model of the same layers through Keras's own loader.

From a checkpoint with several sets of weights, the one that fits the model is taken; an average
(``state_dict_ema``, ``model_ema``, ...) comes before the others, as with timm, and if another set
would fit too, a warning names both. What a trainer or ``torch.compile`` puts before names
("module.", "model.", "_orig_mod.") is dropped where the model does not have it. Nothing that is
pickled is run or imported: a pickled module is refused.

Example:
    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> model, other = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(model, Path(folder) / "model.safetensors")
    ...     report = load_weights(other, Path(folder) / "model.safetensors")
    >>> report.count, report.format
    (2, 'safetensors')
    >>> bool((model[0].weight == other[0].weight).all())
    True
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kconv._files import replacing
from kconv.weights._activations import activations, check_activations, outside
from kconv.weights._keras_file import KerasFile, config_layers
from kconv.weights._matching import MismatchError, Pairs
from kconv.weights._models import Target, adapt
from kconv.weights._reading import Candidate, TorchFile, described, read
from kconv.weights._safetensors import write_safetensors

__all__ = ["LoadReport", "load_weights", "save_weights"]

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` took from a file.

    Example:
        >>> print(LoadReport(2, "a PyTorch checkpoint", ("state_dict",), "module."))
        2 weights of a PyTorch checkpoint, from 'state_dict', without 'module.'

    Attributes:
        count: how many weights.
        format: what the file is, in words.
        keys: the keys that lead to the weights in a checkpoint; none where it is nothing else.
        prefix: what the file has before all names, and the model has not.
    """

    count: int
    format: str
    keys: tuple[str, ...] = ()
    prefix: str = ""

    def __str__(self) -> str:
        parts = [f"{self.count} weights of {self.format}"]
        parts += [f"from {'.'.join(self.keys)!r}"] if self.keys else []
        parts += [f"without {self.prefix!r}"] if self.prefix else []
        return ", ".join(parts)


def load_weights(model: Any, path: StrPath) -> LoadReport:
    """Fill a model with the weights of a file; on any error the model stays as it is.

    Example:
        >>> report = load_weights(model, "kMobileNet.hdf5")  # doctest: +SKIP

    Args:
        model: a ``torch.nn.Module``, a ``keras.Model`` (of any backend), built, or a
            ``kconv.jax.nnx.Network``.
        path: the file, or a folder; see :mod:`kconv.weights` for the formats.

    Returns:
        What was taken from the file.

    Raises:
        ValueError: if the file is damaged or none of these, if names, shapes or kinds of numbers do
            not agree, or if the file says which activations its model has and those are others.
        OSError: if the file cannot be opened.
        TypeError: if the model is of no known framework.
        ImportError: if a library that reads the format is not installed.
    """
    target, path = adapt(model), Path(path)
    with ExitStack() as stack:
        # An archive of Keras's has an optimizer's state beside the weights, and a configuration.
        file = read(path, stack, room=16 * target.nbytes + (1 << 26))
        return fill(target, file, path)


def fill(target: Target, file: TorchFile | KerasFile, path: Path) -> LoadReport:
    """Fill a model with the weights of a file that has been opened; see :func:`load_weights`."""
    try:
        if isinstance(file, KerasFile):
            return _load_keras(target, file)
        return _load_torch(target, file, path)
    except MismatchError as error:
        raise ValueError(f"the weights of {path} are not the model's: {error}") from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever a library or a user's class says
        raise ValueError(f"{path} cannot be loaded into the model: {described(error)}") from error


def _load_keras(target: Target, file: KerasFile) -> LoadReport:
    if file.config:
        layers = list(config_layers(file.config))
        names = {inner.get("name") for _, inner in layers}
        theirs, own = outside(activations(layers), target.activations(), names)
        if own:  # none if a PyTorch module calls functions instead
            check_activations(theirs, own, exact=target.exact_activations)
    return LoadReport(target.fill_keras(file), "a file of Keras")


def _load_torch(target: Target, file: TorchFile, path: Path) -> LoadReport:
    fitting: list[tuple[Candidate, Pairs]] = []
    best: MismatchError | None = None
    for candidate in file.candidates:
        try:
            fitting.append((candidate, target.fit(candidate.sources)))
        except MismatchError as error:
            if best is None or error.count < best.count:
                best = error
    if not fitting:
        raise best or MismatchError("it has none", 1)
    candidate, pairs = fitting[0]
    target.fill(candidate.sources)
    if len(fitting) > 1:
        taken, *others = (repr(".".join(candidate.taken)) for candidate, _ in fitting)
        warnings.warn(
            f"{path} holds several sets of weights that fit the model: took {taken}, not "
            f"{', '.join(others)}",
            stacklevel=3,
        )
    return LoadReport(len(pairs.names), file.format, candidate.taken, pairs.prefix)


def save_weights(model: Any, path: StrPath) -> None:
    """Write a model's weights as safetensors, in PyTorch's names and layouts.

    The file appears whole or not at all. bfloat16 and float8 weights are written as float32. States
    of :meth:`torch.nn.Module.get_extra_state` are written if they are tensors or what JSON holds.

    Example:
        >>> save_weights(model, "model.safetensors")  # doctest: +SKIP

    Args:
        model: a ``torch.nn.Module``, a ``keras.Model`` (of any backend), built, or a
            ``kconv.jax.nnx.Network``.
        path: the file to write, whose name ends in ``.safetensors``.

    Raises:
        ValueError: if the name ends otherwise, two weights would have one name, or a weight is
            complex, sparse or quantized.
        OSError: if the file cannot be written; one that was there before is still there.
        TypeError: if the model is of no known framework.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} does not end in .safetensors, the format that is written")
    arrays, metadata = adapt(model).arrays()
    with replacing(path) as temporary:
        write_safetensors(temporary, arrays, {"format": "pt", **metadata})
