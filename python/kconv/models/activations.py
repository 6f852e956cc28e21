"""The activations, each one line: its name in specs, its code, and what the frameworks call it.

Every front end, the fused programs and the readers of files go by this table.

Example:
    >>> ACTIVATIONS["swish"].torch_module, ACTIVATIONS["swish"].keras
    ('SiLU', 'silu')
    >>> FUSED_ACTIVATIONS
    ('relu', 'relu6', 'swish', 'sigmoid', 'hard_sigmoid', 'hard_swish')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        in_specs: whether specs may name it; else only graphs of users' models do.
        parameters: PyTorch's and Keras's names of its parameters, in their order.
        call_options: what else PyTorch's and Keras's functions are called with.
        keras_formula: the function, of ``keras.ops``, the tensor and the parameters, where
            ``keras.ops`` has none of that name.
    """

    name: str
    code: int | None
    torch_module: str
    torch_function: str
    keras: str
    synonyms: tuple[str, ...] = ()
    torch_options: Mapping[str, Any] = field(default_factory=dict)
    in_specs: bool = True
    parameters: tuple[tuple[str, str], ...] = ()
    call_options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    keras_formula: Callable[..., Any] | None = None

    def call_torch(self, functional: Any, x: Any, parameters: tuple[float, ...] = ()) -> Any:
        """The function of a tensor, by the module ``torch.nn.functional``."""
        names = (name for name, _ in self.parameters)
        options = dict(zip(names, parameters, strict=True))
        return getattr(functional, self.torch_function)(x, **options, **self.call_options[0])

    def call_keras(self, ops: Any, x: Any, parameters: tuple[float, ...] = ()) -> Any:
        """The function of a tensor, by the module ``keras.ops``."""
        if self.keras_formula is not None:
            return self.keras_formula(ops, x, *parameters)
        names = (name for _, name in self.parameters)
        options = dict(zip(names, parameters, strict=True))
        return getattr(ops, self.keras)(x, **options, **self.call_options[1])


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
    # Of users' models.
    ActivationFunction(
        "clip",
        7,
        "Hardtanh",
        "hardtanh",
        "hard_tanh",
        in_specs=False,
        parameters=(("min_val", "x_min"), ("max_val", "x_max")),
        keras_formula=lambda ops, x, low, high: ops.clip(x, low, high),
    ),
    ActivationFunction(
        "leaky_relu",
        8,
        "LeakyReLU",
        "leaky_relu",
        "leaky_relu",
        ("leakyrelu",),
        in_specs=False,
        parameters=(("negative_slope", "negative_slope"),),
    ),
    ActivationFunction(
        "elu", 9, "ELU", "elu", "elu", in_specs=False, parameters=(("alpha", "alpha"),)
    ),
    # Before GELU: the class alone means that.
    ActivationFunction(
        "gelu_tanh",
        11,
        "GELU",
        "gelu",
        "gelu",
        torch_options={"approximate": "tanh"},
        in_specs=False,
        call_options=({"approximate": "tanh"}, {"approximate": True}),
    ),
    ActivationFunction(
        "gelu",
        10,
        "GELU",
        "gelu",
        "gelu",
        in_specs=False,
        call_options=({"approximate": "none"}, {"approximate": False}),
    ),
    ActivationFunction(
        "mish",
        12,
        "Mish",
        "mish",
        "mish",
        in_specs=False,
        keras_formula=lambda ops, x: x * ops.tanh(ops.softplus(x)),
    ),
    # Known by name alone: a file's are compared with a model's.
    ActivationFunction("tanh", None, "Tanh", "tanh", "tanh"),
    ActivationFunction("selu", None, "SELU", "selu", "selu"),
    ActivationFunction("celu", None, "CELU", "celu", "celu"),
    ActivationFunction("softplus", None, "Softplus", "softplus", "softplus"),
    ActivationFunction("softsign", None, "Softsign", "softsign", "softsign"),
)

ACTIVATIONS = {row.name: row for row in _TABLE}
"""All, by their names."""

FUSED_ACTIVATIONS = tuple(row.name for row in _TABLE if row.code is not None and row.in_specs)
"""The names of those that fused programs have, and so specs."""

SYNONYMS = {name: row.name for row in _TABLE for name in (row.name, *row.synonyms)}
"""The names of all, by these and their synonyms."""
