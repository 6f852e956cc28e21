"""Fast CPU kernels for the layers of parameter-efficient CNNs, on NumPy arrays.

Importing kconv imports NumPy alone; submodules are imported when first used. The layers for each
framework are in :mod:`kconv.torch`, :mod:`kconv.keras`, :mod:`kconv.jax` and
:mod:`kconv.tensorflow`, the rules of the technique in :mod:`kconv.ktypes`, the architectures in
:mod:`kconv.models`.

Example:
    >>> import numpy as np
    >>> import kconv
    >>> x = np.ones((32, 144, 28, 28), np.float32)
    >>> weight = np.ones((24, 18), np.float32)
    >>> kconv.pointwise_conv(x, weight, groups=8, interleave=3).shape
    (32, 24, 28, 28)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kconv._kconv import (
    build_info,
    deinterleave,
    depthwise_conv,
    depthwise_conv_grad_input,
    depthwise_conv_grad_weight,
    get_num_threads,
    interleave,
    memory_stats,
    pointwise_conv,
    pointwise_conv_grad_bias,
    pointwise_conv_grad_input,
    pointwise_conv_grad_weight,
    release_memory,
    set_num_threads,
)

if TYPE_CHECKING:  # read by tools that pack an application, too
    from kconv import ktypes as ktypes
    from kconv import models as models
    from kconv._explain import explain
    from kconv._published import list_weights
    from kconv.models import list_models
    from kconv.runtime import load
    from kconv.weights import load_weights, save_weights

__version__: str = build_info()["version"]

__all__ = [
    "__version__",
    "build_info",
    "deinterleave",
    "depthwise_conv",
    "depthwise_conv_grad_input",
    "depthwise_conv_grad_weight",
    "explain",
    "get_num_threads",
    "interleave",
    "list_models",
    "list_weights",
    "load",
    "load_weights",
    "memory_stats",
    "pointwise_conv",
    "pointwise_conv_grad_bias",
    "pointwise_conv_grad_input",
    "pointwise_conv_grad_weight",
    "release_memory",
    "save_weights",
    "set_num_threads",
]

_SUBMODULES = {
    "cai",
    "datasets",
    "export",
    "jax",
    "keras",
    "ktypes",
    "models",
    "runtime",
    "tensorflow",
    "torch",
    "training",
}


_HOMES = {
    "explain": "kconv._explain",
    "list_models": "kconv.models",
    "list_weights": "kconv._published",
    "load": "kconv.runtime",
    "load_weights": "kconv.weights",
    "save_weights": "kconv.weights",
}
"""Where the functions are that are imported when first used."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _SUBMODULES:
        return import_module(f"kconv.{name}")
    raise AttributeError(f"module 'kconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
