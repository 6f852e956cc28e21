"""PyTorch's exported programs, of its own layers alone: loading one needs no kconv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._model_folder import expected_weights
from kconv._require import require
from kconv.export import Run, fixed_size
from kconv.export._layers import plain_graph, renamed
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["exported_program", "module_of", "runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    torch = require("torch", "torch", "exporting to PyTorch")
    program = exported_program(net)
    with replacing(path) as temporary:
        torch.export.save(program, temporary)
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """The program that was written."""
    torch = require("torch", "torch", "running PyTorch")
    program = torch.export.load(path).module()

    def run(images: Array) -> Any:
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.no_grad():
            return program(x).numpy()

    return run, f"torch {torch.__version__.partition('+')[0]}"


def exported_program(net: FrozenNetwork, *, most: int | None = None) -> Any:
    """The network as a ``torch.export.ExportedProgram``.

    Args:
        net: the network.
        most: how many images a call may have; None for any number.

    Raises:
        ValueError: the network takes images of several sizes, of which a program knows one.
    """
    torch = require("torch", "torch", "exporting to PyTorch")
    example = torch.zeros(2, net.config.image.channels, *fixed_size(net, "torch.export"))
    sizes = {0: torch.export.Dim("N", max=most)}
    return torch.export.export(module_of(net), (example,), dynamic_shapes=(sizes,))


def module_of(net: FrozenNetwork, *, shuffle: bool = False) -> Any:
    """The network as a module of PyTorch's own layers, in evaluation mode.

    Args:
        net: the network.
        shuffle: whether an interleave is a reshape, a transposition and a reshape, as targets know
            it that have no index_select.

    Raises:
        ValueError: ``shuffle``, and there is an interleave whose step does not divide the channels.
    """
    torch = require("torch", "torch", "exporting to PyTorch")
    from kconv.torch.native import make_native
    from kconv.torch.network import Network

    layers = renamed(plain_graph(net.graph), _plain)
    module = Network(layers, fused=False)
    make_native(module)
    if shuffle:
        _shuffle(module, layers)
    names = {key: name.rpartition(".")[2] for key, (name, _) in expected_weights(net.graph).items()}
    values = {
        f"{_plain(layer)}.{names[layer, weight]}": torch.from_numpy(array)
        for (layer, weight), array in net.weights.items()
    }
    state = module.state_dict()
    for name in state:
        if name in values:
            state[name] = values[name]
        elif name.replace("_raw.", ".") in values:
            state[name] = values[name.replace("_raw.", ".")]
        elif not name.endswith("num_batches_tracked"):
            raise ValueError(f"the weight {name!r} of PyTorch's layers has no value")
    module.load_state_dict(state)
    return module.eval()


def _shuffle(module: Any, layers: graph.Graph) -> None:
    """Give interleaves the other form."""
    from kconv.torch._functions import Call

    for layer in layers.layers:
        if isinstance(layer, graph.Interleave):
            if layer.channels % layer.step:
                raise ValueError(
                    f"layer {layer.name!r}: the target shuffles channels that the step divides, "
                    f"not {layer.channels} by {layer.step}"
                )
            setattr(module, layer.name, Call(_shuffled, step=layer.step))


def _shuffled(x: Any, step: int) -> Any:
    """Channels s, s + step, ...: the columns of a matrix of rows of ``step`` channels."""
    count, channels, height, width = x.shape
    matrix = x.reshape(count, channels // step, step, height, width)
    return matrix.transpose(1, 2).reshape(count, channels, height, width)


def _plain(name: str) -> str:
    """A layer's name as a module's."""
    return name.replace(".", "_")
