"""The table of activations beside the frameworks' functions: each row names one function."""

import importlib
import math

import numpy as np
import pytest

from kconv.models import ACTIVATIONS, FUSED_ACTIVATIONS
from kconv.models.activations import SYNONYMS

VALUES = np.linspace(-7, 7, 57, dtype=np.float32)[None]


def numpy_result(kind: str) -> np.ndarray:
    x = VALUES.astype(float)
    return {
        "relu": np.maximum(x, 0),
        "relu6": np.clip(x, 0, 6),
        "swish": x / (1 + np.exp(-x)),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "hard_sigmoid": np.clip(x + 3, 0, 6) / 6,
        "hard_swish": x * np.clip(x + 3, 0, 6) / 6,
        "clip": np.clip(x, *PARAMETERS["clip"]),
        "leaky_relu": np.maximum(x, 0.2 * x),
        "elu": np.where(x > 0, x, 0.6 * np.expm1(x)),
        "gelu": x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
        "gelu_tanh": x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "mish": x * np.tanh(np.log1p(np.exp(x))),
    }[kind]


PARAMETERS = {"clip": (-1.5, 2.0), "leaky_relu": (0.2,), "elu": (0.6,)}


@pytest.mark.parametrize("kind", [row.name for row in ACTIVATIONS.values() if row.code])
def test_calls(kind):
    """With parameters, as graphs have them."""
    torch = pytest.importorskip("torch")
    keras = pytest.importorskip("keras")
    row, parameters = ACTIVATIONS[kind], PARAMETERS.get(kind, ())
    results = (
        row.call_torch(torch.nn.functional, torch.from_numpy(VALUES), parameters),
        keras.ops.convert_to_numpy(row.call_keras(keras.ops, VALUES, parameters)),
    )
    for result in results:
        np.testing.assert_allclose(result, numpy_result(kind), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "kind", ["relu", "relu6", "swish", "sigmoid", "hard_sigmoid", "hard_swish"]
)
def test_rows_name_one_function(kind):
    torch = pytest.importorskip("torch")
    keras = pytest.importorskip("keras")
    row = ACTIVATIONS[kind]
    x = torch.from_numpy(VALUES)
    results = {
        "module": getattr(torch.nn, row.torch_module)(**row.torch_options)(x),
        "function": getattr(torch.nn.functional, row.torch_function)(x),
        "keras": keras.ops.convert_to_numpy(getattr(keras.activations, row.keras)(VALUES)),
        "ops": keras.ops.convert_to_numpy(getattr(keras.ops, row.keras)(VALUES)),
    }
    for name, result in results.items():
        np.testing.assert_allclose(result, numpy_result(kind), 1e-5, 1e-6, err_msg=name)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_names_exist(framework):
    places = {
        "torch": {"torch_module": "torch.nn", "torch_function": "torch.nn.functional"},
        "keras": {"keras": "keras.activations"},
    }[framework]
    pytest.importorskip(framework)
    for name, module in places.items():
        for row in ACTIVATIONS.values():
            assert callable(getattr(importlib.import_module(module), getattr(row, name)))


def test_codes_and_names_are_unique():
    codes = [row.code for row in ACTIVATIONS.values() if row.code is not None]
    assert sorted(codes) == list(range(1, len(codes) + 1))
    specs = [row.name for row in ACTIVATIONS.values() if row.code and row.in_specs]
    assert list(FUSED_ACTIVATIONS) == specs
    assert len(SYNONYMS) == sum(1 + len(row.synonyms) for row in ACTIVATIONS.values())
