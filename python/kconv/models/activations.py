"""The activations, each one line: its name in specs, its code, and what the frameworks call it.

Every front end, the fused programs and the readers of files go by this table.

Example:
    >>> ACTIVATIONS["swish"].torch_module, ACTIVATIONS["swish"].keras
    ('SiLU', 'silu')
    >>> FUSED_ACTIVATIONS
    ('relu', 'relu6', 'swish', 'sigmoid', 'hard_sigmoid', 'hard_swish')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ACTIVATIONS", "FUSED_ACTIVATIONS", "SYNONYMS", "ActivationFunction", "ActivationName"]

ActivationName = str
"""One of :data:`ACTIVATIONS`."""


@dataclass(frozen=True)
class ActivationFunction:
    """An activation.

    Attributes:
        name: in specs and graphs.
        code: in fused programs; None where they do not have it.
        torch_module: the class in ``torch.nn``.
        torch_function: the function in ``torch.nn.functional``.
        keras: the function in ``keras.activations`` and ``keras.ops``.
        synonyms: its other names in files, configurations and scripts, in lower case.
        torch_options: what the PyTorch class is made with.
    """

    name: str
    code: int | None
    torch_module: str
    torch_function: str
    keras: str
    synonyms: tuple[str, ...] = ()
    torch_options: Mapping[str, Any] = field(default_factory=dict)


_TABLE = (
    ActivationFunction("relu", 1, "ReLU", "relu", "relu"),
    ActivationFunction("relu6", 2, "ReLU6", "relu6", "relu6"),
    ActivationFunction("swish", 3, "SiLU", "silu", "silu", ("silu",)),
    ActivationFunction("sigmoid", 4, "Sigmoid", "sigmoid", "sigmoid"),
    ActivationFunction(
        "hard_sigmoid", 5, "Hardsigmoid", "hardsigmoid", "hard_sigmoid", ("hardsigmoid",)
    ),
    ActivationFunction(
        "hard_swish", 6, "Hardswish", "hardswish", "hard_silu", ("hardswish", "hard_silu")
    ),
    # Over the channels, so the only one that is not elementwise.
    ActivationFunction("softmax", None, "Softmax", "softmax", "softmax", (), {"dim": 1}),
    # Known by name alone: a file's are compared with a model's.
    ActivationFunction("gelu", None, "GELU", "gelu", "gelu"),
    ActivationFunction("mish", None, "Mish", "mish", "mish"),
    ActivationFunction("tanh", None, "Tanh", "tanh", "tanh"),
    ActivationFunction("elu", None, "ELU", "elu", "elu"),
    ActivationFunction("selu", None, "SELU", "selu", "selu"),
    ActivationFunction("celu", None, "CELU", "celu", "celu"),
    ActivationFunction("leaky_relu", None, "LeakyReLU", "leaky_relu", "leaky_relu", ("leakyrelu",)),
    ActivationFunction("softplus", None, "Softplus", "softplus", "softplus"),
    ActivationFunction("softsign", None, "Softsign", "softsign", "softsign"),
)

ACTIVATIONS = {row.name: row for row in _TABLE}
"""All, by their names."""

FUSED_ACTIVATIONS = tuple(row.name for row in _TABLE if row.code is not None)
"""The names of those that fused programs have, and so specs."""

SYNONYMS = {name: row.name for row in _TABLE for name in (row.name, *row.synonyms)}
"""The names of all, by these and their synonyms."""
