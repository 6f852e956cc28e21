"""PyTorch's exported programs, of its own layers alone: loading one needs no kconv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kconv._files import replacing
from kconv._model_folder import expected_weights
from kconv._require import require
from kconv.export import Run, usual_size
from kconv.export._layers import plain_graph, renamed
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array

__all__ = ["module_of", "runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    torch = require("torch", "torch", "exporting to PyTorch")
    module, channels = module_of(net), net.config.image.channels
    example = torch.zeros(2, channels, *usual_size(net))
    sizes = {0: torch.export.Dim("N")}
    program = torch.export.export(module, (example,), dynamic_shapes=(sizes,))
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


def module_of(net: FrozenNetwork) -> Any:
    """The network as a module of PyTorch's own layers, in evaluation mode."""
    torch = require("torch", "torch", "exporting to PyTorch")
    from kconv.torch.native import make_native
    from kconv.torch.network import Network

    layers = renamed(plain_graph(net.graph), _plain)
    module = Network(layers, fused=False)
    make_native(module)
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


def _plain(name: str) -> str:
    """A layer's name as a module's."""
    return name.replace(".", "_")
