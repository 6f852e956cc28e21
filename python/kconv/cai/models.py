"""The original's ``models``: loading models, and parts of models."""
# ruff: noqa: N802, N803 - the original's names

from __future__ import annotations

import json
import os
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.cai._keras2 import fill, model_from_config
from kconv.cai.layers import GetClasses
from kconv.keras import CopyChannels

__all__ = [
    "CreatePartialModel",
    "CreatePartialModelCopyingChannels",
    "CreatePartialModelFromChannel",
    "CreatePartialModelWithSoftMax",
    "PartialModelPredict",
    "calculate_heat_map_from_dense_and_avgpool",
    "load_kereas_model",
    "make_model_trainable",
    "make_model_untrainable",
]


def load_kereas_model(filename: str | os.PathLike[str]) -> keras.Model:
    """A saved model: Keras 3's ``.keras``, or the original's HDF5 checkpoints of Keras 2.

    Example:
        >>> model = load_kereas_model("best.keras")  # doctest: +SKIP

    Args:
        filename: the file.

    Returns:
        The model; one from HDF5 is not compiled. One of Keras 2 has "_" for each "/" in its
        layers' names, and Keras 2's "hard_sigmoid".

    Raises:
        ValueError: if the file holds no model, a damaged one, or one that Keras 3 has no layers
            for.
        OSError: if it cannot be read.
    """
    import h5py

    with open(filename, "rb"):  # noqa: PTH123 - for the operating system's own error
        pass
    try:
        if not h5py.is_hdf5(filename):
            return keras.models.load_model(filename, custom_objects=GetClasses())
        with h5py.File(filename, "r") as file, keras.saving.custom_object_scope(GetClasses()):
            config = json.loads(file.attrs["model_config"])
            version = file.attrs.get("keras_version", "2")
            version = version.decode() if isinstance(version, bytes) else str(version)
            if version.startswith("2"):
                model = model_from_config(config)
                fill(model, file["model_weights"])
                return model
        return keras.models.load_model(filename, custom_objects=GetClasses(), compile=False)
    except Exception as error:  # of Keras or h5py, whatever a damaged file leads to
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{filename} holds no model that Keras can open: {reason}") from error


def make_model_trainable(model: keras.Model) -> None:
    """Make all layers trainable."""
    _set_trainable(model, True)


def make_model_untrainable(model: keras.Model) -> None:
    """Make no layer trainable."""
    _set_trainable(model, False)


def _set_trainable(model: keras.Model, trainable: bool) -> None:
    for layer in model.layers:
        layer.trainable = trainable


def CreatePartialModel(
    pModel: keras.Model, pOutputLayerName: str, hasGlobalAvg: bool = False
) -> keras.Model:
    """The model up to a layer.

    Example:
        >>> x = keras.Input((8, 8, 3))
        >>> y = keras.layers.Conv2D(4, 3, name="stem")(x)
        >>> CreatePartialModel(keras.Model(x, keras.layers.Flatten()(y)), "stem").output_shape
        (None, 6, 6, 4)

    Args:
        pModel: the model.
        pOutputLayerName: name of the layer whose output is the result.
        hasGlobalAvg: whether global average pooling follows.

    Returns:
        A model that shares the layers.

    Raises:
        ValueError: if there is no such layer.
    """
    output = pModel.get_layer(pOutputLayerName).output
    if hasGlobalAvg:
        output = keras.layers.GlobalAveragePooling2D()(output)
    return keras.Model(pModel.inputs, output)


def CreatePartialModelCopyingChannels(
    pModel: keras.Model, pOutputLayerName: str, pChannelStart: int, pChannelCount: int
) -> keras.Model:
    """The model up to some of a layer's channels; see :func:`CreatePartialModel`."""
    output = pModel.get_layer(pOutputLayerName).output
    return keras.Model(pModel.inputs, CopyChannels(pChannelStart, pChannelCount)(output))


def CreatePartialModelFromChannel(
    pModel: keras.Model, pOutputLayerName: str, pChannelIdx: int
) -> keras.Model:
    """The model up to one of a layer's channels; see :func:`CreatePartialModel`."""
    return CreatePartialModelCopyingChannels(pModel, pOutputLayerName, pChannelIdx, 1)


def CreatePartialModelWithSoftMax(
    pModel: keras.Model, pOutputLayerName: str, numClasses: int, newLayerName: str = "k_probs"
) -> keras.Model:
    """The model up to a layer of vectors, and a new classifier on it.

    Example:
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(4, name="features")(x))
        >>> CreatePartialModelWithSoftMax(model, "features", 10).output_shape
        (None, 10)
    """
    output = pModel.get_layer(pOutputLayerName).output
    classifier = keras.layers.Dense(numClasses, activation="softmax", name=newLayerName)
    return keras.Model(pModel.inputs, classifier(output))


def PartialModelPredict(
    aInput: ArrayLike,
    pModel: keras.Model,
    pOutputLayerName: str,
    hasGlobalAvg: bool = False,
    pBatchSize: int = 32,
) -> NDArray[Any]:
    """The output of a layer for some images; see :func:`CreatePartialModel`."""
    partial = CreatePartialModel(pModel, pOutputLayerName, hasGlobalAvg)
    return partial.predict(np.asarray(aInput), batch_size=pBatchSize, verbose=0)


def calculate_heat_map_from_dense_and_avgpool(
    aInput: ArrayLike,
    target_class: int,
    pModel: keras.Model,
    pOutputLayerName: str,
    pDenseLayerName: str,
) -> NDArray[Any]:
    """The class activation map: where in an image the model sees a class (V1).

    Example:
        >>> x = keras.Input((8, 8, 3))
        >>> y = keras.layers.Conv2D(4, 3, name="features")(x)
        >>> y = keras.layers.Dense(2, name="probs")(keras.layers.GlobalAveragePooling2D()(y))
        >>> calculate_heat_map_from_dense_and_avgpool(
        ...     np.ones((1, 8, 8, 3)), 1, keras.Model(x, y), "features", "probs").shape
        (6, 6)

    Args:
        aInput: one image, (1, H, W, C) or (H, W, C), or several, (N, H, W, C).
        target_class: number of the class.
        pModel: a model that ends in global average pooling and a dense layer.
        pOutputLayerName: the layer before the pooling.
        pDenseLayerName: the dense layer, or 1x1 convolution, after it.

    Returns:
        (h, w), or (N, h, w) for several images: the layer's maps, weighted as the dense layer
        weights their means, clipped at zero and divided by the maximum of each image.

    Raises:
        ValueError: if there are no such layers, or is no such class.
    """
    images = np.asarray(aInput)
    images = images if images.ndim == 4 else images[None]
    kernel = keras.ops.convert_to_numpy(pModel.get_layer(pDenseLayerName).kernel)
    weights = kernel.reshape(-1, kernel.shape[-1])
    if not 0 <= target_class < weights.shape[1]:
        raise ValueError(f"target_class={target_class} is not one of {weights.shape[1]} classes")
    features = PartialModelPredict(images, pModel, pOutputLayerName)
    maps = np.maximum(features @ weights[:, target_class], 0)
    most = maps.max(axis=(1, 2), keepdims=True)
    maps = maps / np.where(most > 0, most, 1)
    return maps[0] if len(maps) == 1 else maps
