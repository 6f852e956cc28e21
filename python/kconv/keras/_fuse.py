"""Keras models of any origin whose chains of layers run as one operation each, in place.

:func:`fuse` changes how a model's layers are called, and nothing else: it is the same object, with
the same layers, variables, names and configuration. It is saved, loaded, compiled, trained and
evaluated as before. What :class:`kconv.keras.Network` says of its chains holds for these: they run
layer by layer where one operation cannot stand for them, and what is changed of a layer counts from
the next call on. A copy, made by ``clone_model`` or by loading what was saved, is not fused; nor is
a sequential model any longer when layers are added or taken away, until it is fused anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import keras

from kconv._report import Report
from kconv.keras._clone import functional
from kconv.keras._fusion import Plan, plan_of, run_fused
from kconv.keras._private import WALK, all_layers, inner_functional
from kconv.keras.network import Network
from kconv.models.fusion import Segment, is_fusable

__all__ = ["fuse", "fusion_report", "is_fused", "restore"]


def fuse(model: keras.Model) -> keras.Model:
    """Lets the largest chains of a model's layers run as one operation each, in place.

    A chain is a set of convolutions, batch norms, activations, sums, squeeze-excites and the like
    that reads one image and of which one tensor is read by others. The models inside a model are
    fused, too. What cannot be fused runs as it is: :func:`kconv.keras.report` tells what, and why.

    Example:
        >>> x = keras.Input((8, 8, 3))
        >>> y = keras.layers.Conv2D(16, 3, use_bias=False, name="conv")(x)
        >>> y = keras.layers.ReLU(6, name="relu")(keras.layers.BatchNormalization(name="norm")(y))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="head")(y))
        >>> fuse(model) is model
        True
        >>> from kconv.keras import report
        >>> print(report(model))
        fuse: 3 changed, 1 kept
          changed  conv  chain 1
          changed  norm  chain 1
          changed  relu  chain 1
          kept     head  its input has the shape (None, 6, 6, 16)
        >>> model(keras.ops.ones((2, 8, 8, 3))).shape
        (2, 6, 6, 2)

    Args:
        model: a functional or sequential model, built; or another that has such models inside.

    Returns:
        The model.

    Raises:
        TypeError: if this is no model, or one without functional or sequential models.
        ValueError: if a sequential model has not been built.
    """
    for part in _functionals(model):
        if not isinstance(part, Network):  # which is fused anyway
            # Not by Keras's own setattr, for which a model's attributes are part of its state.
            vars(part)[WALK] = MethodType(_walk, part)
    _forget_compiled(model)
    return model


def restore(model: keras.Model) -> keras.Model:
    """Undoes :func:`fuse`, in place.

    Example:
        >>> x = keras.Input((8, 8, 3))
        >>> model = fuse(keras.Model(x, keras.layers.Conv2D(16, 3)(x)))
        >>> restore(model) is model
        True

    Args:
        model: a model, fused or not.

    Returns:
        The model.

    Raises:
        TypeError: if this is no model, or one without functional or sequential models.
        ValueError: if a sequential model has not been built.
    """
    for part in _functionals(model):
        vars(part).pop(WALK, None)
    _forget_compiled(model)
    return model


def _walk(model: Any, inputs: Any, operation_fn: Any = None, call_fn: Any = None) -> Any:
    one_by_one = MethodType(getattr(type(model), WALK), model)
    return run_fused(model, one_by_one, inputs, operation_fn, call_fn)


def is_fused(model: Any) -> bool:
    """Whether a model, or one inside, is what :func:`fuse` has made of it."""
    return any(WALK in vars(part) for _, part in _named(model))


def _functionals(model: Any) -> list[Any]:
    """All functional models in a model, and those that sequential ones have inside."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a Keras model, got {model!r}")
    for part in all_layers(model):
        if isinstance(part, keras.Sequential):
            functional(part)  # or its error
    found = [part for _, part in _named(model)]
    if not found:
        raise TypeError(f"expected a functional or sequential model or one with such: {model!r}")
    return found


def _named(model: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The functional models in a model, and what to put before the names of their layers."""
    part = inner_functional(model) if isinstance(model, keras.Sequential) else model
    if hasattr(part, WALK):
        yield path, part
    for layer in model.layers if isinstance(model, keras.Model) else model._layers:
        yield from _named(layer, f"{path}{layer.name}/")


def _forget_compiled(model: Any) -> None:
    """What Keras has compiled calls the layers as they were called before."""
    for part in all_layers(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None


def fusion_report(model: keras.Model) -> Report:
    """What of a model runs fused now, and why the rest does not."""
    changed: dict[str, str] = {}
    kept: dict[str, str] = {}
    count = 0
    for path, part in _named(model):
        if not isinstance(part, Network) and WALK not in vars(part):
            continue
        plan = plan_of(part)
        for segment in plan.parts:
            if isinstance(segment, Segment):
                count += 1
                names = _operations(plan, segment)
                changed |= dict.fromkeys((path + name for name in names), f"chain {count}")
        kept |= {path + name: reason for name, reason in _reasons(plan).items()}
    return Report("fuse", changed, {n: why for n, why in kept.items() if n not in changed})


def _operations(plan: Plan, segment: Segment) -> list[str]:
    nodes = [node for layer in segment.layers for node in plan.calls.nodes.get(layer.name, ())]
    return list(dict.fromkeys(node.operation.name for node in nodes))


def _reasons(plan: Plan) -> dict[str, str]:
    """Why layers outside of segments are there, by their names; of models, their layers tell."""
    reasons = {}
    for layer in plan.parts:
        if isinstance(layer, Segment):
            continue
        for node in plan.calls.nodes.get(layer.name, ()):
            if not isinstance(node.operation, keras.Model):
                reason = plan.calls.reasons.get(layer.name)
                if reason is None and not is_fusable(layer):
                    reason = "no fused operation computes it"
                reasons[node.operation.name] = reason or "no convolution can run with it"
    return reasons
