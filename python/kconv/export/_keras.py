"""Keras's own format, of its own layers alone where it has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kconv._files import replacing
from kconv._require import require
from kconv.export import Run
from kconv.export._layers import plain_graph, renamed
from kconv.models import graph
from kconv.runtime import FrozenNetwork
from kconv.weights._entries import Array
from kconv.weights._layouts import keras_class, layout, snake_case

__all__ = ["runner", "write"]


def write(net: FrozenNetwork, path: Path) -> list[Path]:
    """Write the file; return it."""
    require("keras", "keras jax", "exporting to Keras")
    with replacing(path) as temporary:
        _model(net).save(temporary)
    return [path]


def runner(net: FrozenNetwork, path: Path) -> tuple[Run, str]:
    """The model that was written."""
    keras = require("keras", "keras jax", "running Keras")
    model = keras.models.load_model(path)

    def run(images: Array) -> Any:
        return keras.ops.convert_to_numpy(model(images, training=False))

    return run, f"keras {keras.__version__} on {keras.backend.backend()}"


def _model(net: FrozenNetwork) -> Any:
    keras = require("keras", "keras jax", "exporting to Keras")
    from kconv.keras._model import model_of
    from kconv.keras.convert import to_native

    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_last")
    try:
        layers = _renamed(plain_graph(net.graph, pads=False), keras)
        for layer in layers.layers:
            if isinstance(layer, graph.WindowPool):
                raise ValueError(f"layer {layer.name!r}: Keras has no pool with such a window")
        model = to_native(model_of(layers, fused=False))
    finally:
        keras.config.set_image_data_format(before)
    for layer in layers.layers:
        if not layer.weights():
            continue
        own = model.get_layer(layer.name.replace("/", "_"))
        for name, shape in layer.weights().items():
            keys = (layer.name.removesuffix(end) for end in ("", "_raw", _OWN, f"_raw{_OWN}"))
            key = next(key for key in keys if (key, name) in net.weights)
            variable = getattr(own, name if hasattr(own, name) else "kernel")
            how = layout(keras_class(own), name, shape)
            values = how.to_keras(net.weights[key, name], shape)
            variable.assign(values.reshape(variable.shape))
    return model


_OWN = "_layer"


def _renamed(layers: graph.Graph, keras: Any) -> graph.Graph:
    """The layers without names that Keras may give to further ones ("reshape_4")."""
    automatic = set(map(snake_case, dir(keras.layers)))
    names = {
        layer.name: layer.name + _OWN
        for layer in layers.layers
        if re.sub(r"_\d+$", "", layer.name) in automatic
    }

    return renamed(layers, lambda name: names.get(name, name))
