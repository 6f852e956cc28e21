"""The original's ``datasets``: loading, saving, training, and testing with flipped images."""
# ruff: noqa: N803, PT028 - the original's names, which are not those of tests

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
from numpy.typing import ArrayLike

from kconv.cai import _pixels
from kconv.cai._generator import ImageGenerator
from kconv.cai._image_files import (
    add_padding_to_make_img_array_squared,
    load_images_from_files,
    load_images_from_folders,
    save_dataset_as_jpg,
    save_dataset_as_png,
    save_dataset_in_format,
    save_tfds_as_jpg,
    save_tfds_as_png,
    save_tfds_in_format,
)
from kconv.cai._pixels import Array, Images
from kconv.cai.models import load_kereas_model
from kconv.cai.util import create_image_generator
from kconv.evaluation import classification_report

__all__ = [
    "add_padding_to_make_img_array_squared",
    "load_cifar10_dataset",
    "load_dataset",
    "load_dataset_with_validation",
    "load_hyperspectral_matlab_image",
    "load_images_from_files",
    "load_images_from_folders",
    "print_classification_report",
    "save_dataset_as_jpg",
    "save_dataset_as_png",
    "save_dataset_in_format",
    "save_tfds_as_jpg",
    "save_tfds_as_png",
    "save_tfds_in_format",
    "test_flips_on_model",
    "test_flips_on_saved_model",
    "train_model_on_cifar10",
    "train_model_on_dataset",
]

_LOGGED = ("accuracy", "loss", "val_accuracy", "val_loss")


def load_dataset(
    dataset: Any,
    lab: bool = False,
    verbose: bool = False,
    bipolar: bool = True,
    base_model_name: str = "",
) -> tuple[Images, Array, Images, Array]:
    """Images in the networks' range and one-hot labels.

    Example:
        >>> class Dataset:
        ...     @staticmethod
        ...     def load_data():
        ...         images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 1])
        ...         return (images, labels), (images, labels)
        >>> x_train, y_train, x_test, y_test = load_dataset(Dataset)
        >>> x_train.shape, float(x_train[0, 0, 0, 0]), y_train.shape
        ((4, 8, 8, 3), -2.0, (4, 3))

    Args:
        dataset: what has a ``load_data()`` such as ``keras.datasets.cifar10``.
        lab: whether to convert to CIE LAB.
        verbose: whether to print shapes and ranges.
        bipolar: x / 64 - 2, in LAB (L / 25 - 2, a / 50, b / 50); else x / 255, in LAB
            (L / 100, a / 200 + 0.5, b / 200 + 0.5).
        base_model_name: of no effect.

    Returns:
        Training images (N, H, W, C) float32 and labels (N, classes), and those to test with.

    Raises:
        ValueError: if ``lab`` is asked of images that have not three channels.
    """
    (x_train, y_train), (x_test, y_test) = dataset.load_data()
    classes = int(max(np.max(y_train), np.max(y_test))) + 1
    arrays = (
        _scaled(x_train, lab, bipolar),
        _one_hot(y_train, classes),
        _scaled(x_test, lab, bipolar),
        _one_hot(y_test, classes),
    )
    if verbose:
        for name, array in zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True):
            print(f"{name}: {array.shape}, {array.min():.4f} to {array.max():.4f}")
    return arrays


def load_dataset_with_validation(
    dataset: Any,
    lab: bool = False,
    verbose: bool = False,
    bipolar: bool = True,
    base_model_name: str = "",
    validation_size: float = 0.1,
    validation_flip_horizontal: bool = False,
    validation_flip_vertical: bool = False,
) -> tuple[Images, Array, Images, Array, Images, Array]:
    """:func:`load_dataset`, with the first share of the training images held out.

    Args:
        dataset: as in :func:`load_dataset`, and so are the other arguments.
        lab: whether to convert to CIE LAB.
        verbose: whether to print shapes and ranges.
        bipolar: which range the values have.
        base_model_name: of no effect.
        validation_size: the share of the training images to validate with.
        validation_flip_horizontal: whether to append copies of these, mirrored.
        validation_flip_vertical: whether to append copies of these, upside down; with both flips,
            also of the mirrored ones.

    Returns:
        Images and labels to train, to validate and to test with.

    Raises:
        ValueError: if the share is not from 0 to 1.
    """
    if not 0 <= validation_size <= 1:
        raise ValueError(f"validation_size={validation_size} is not from 0 to 1")
    x, y, x_test, y_test = load_dataset(dataset, lab, verbose, bipolar, base_model_name)
    held_out = int(validation_size * len(x))
    x_val, y_val = x[:held_out], y[:held_out]
    copies = _pixels.flipped(x_val, validation_flip_horizontal, validation_flip_vertical)
    y_val = np.concatenate([y_val] * len(copies))
    x_val = np.concatenate(list(copies.values()))
    return x[held_out:], y[held_out:], x_val, y_val, x_test, y_test


def load_cifar10_dataset(
    lab: bool = False, verbose: bool = False, bipolar: bool = True
) -> tuple[Images, Array, Images, Array]:
    """:func:`load_dataset` of ``keras.datasets.cifar10``, which is downloaded."""
    return load_dataset(keras.datasets.cifar10, lab, verbose, bipolar)


def load_hyperspectral_matlab_image(
    ImgUrl: str,
    ClassUrl: str,
    ImgProperty: str,
    ClassProperty: str,
    LocalBaseName: str,
    Verbose: bool = True,
) -> NoReturn:
    """Not in kconv.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("load_hyperspectral_matlab_image of the original is not in kconv")


def train_model_on_dataset(
    model: keras.Model,
    dataset: Any,
    base_model_name: str,
    plrscheduler: Callable[..., float],
    batch_size: int = 64,
    epochs: int = 300,
    momentum: float = 0.9,
    nesterov: bool = True,
    verbose: bool = False,
    lab: bool = False,
    bipolar: bool = True,
    datagen: ImageGenerator = create_image_generator(),  # noqa: B008 - keeps no state
    monitor: str = "val_accuracy",
    use_multiprocessing: bool = False,
) -> tuple[keras.callbacks.History, str, str]:
    """Train a classifier with SGD on augmented images, and keep the best one in a file.

    Example:
        >>> fit_result, best_model, _ = train_model_on_dataset(
        ...     model, keras.datasets.cifar10, "best", lambda epoch: 0.1)  # doctest: +SKIP

    Args:
        model: of images to probabilities; it is compiled here, and trained in place.
        dataset: as in :func:`load_dataset`; its test images validate.
        base_model_name: what the files' names begin with.
        plrscheduler: the learning rate of an epoch, counted from 0.
        batch_size: images in a batch.
        epochs: how many.
        momentum: of SGD.
        nesterov: whether it is Nesterov's.
        verbose: whether to print shapes, ranges and the progress.
        lab: whether to convert to CIE LAB.
        bipolar: which range the values have.
        datagen: what augments the images.
        monitor: "val_accuracy", "accuracy", "val_loss" or "loss", of which the largest is best.
        use_multiprocessing: False, as Keras 3's ``fit`` has no such argument.

    Returns:
        What ``fit`` returns; the best model's file, ``<base_model_name>.keras``; and
        ``<base_model_name>.csv``, which is not written.

    Raises:
        NotImplementedError: for multiprocessing.
        ValueError: if the model has other outputs than the data set classes, or an argument has
            no meaning.
    """
    if use_multiprocessing:
        raise NotImplementedError("use_multiprocessing=True: Keras 3's fit has no such argument")
    if monitor not in _LOGGED:
        raise ValueError(f"monitor={monitor!r} is not one of {', '.join(_LOGGED)}")
    x_train, y_train, x_test, y_test = load_dataset(dataset, lab, verbose, bipolar, base_model_name)
    classes = y_train.shape[1]
    outputs = getattr(model, "output_shape", None)  # a model that is not built has none yet
    if outputs not in (None, (None, classes)):
        raise ValueError(
            f"the model's output of shape {outputs} is not one for each of the data set's "
            f"{classes} classes"
        )
    model.compile(
        loss="categorical_crossentropy",
        optimizer=keras.optimizers.SGD(0.1, momentum=momentum, nesterov=nesterov),
        metrics=["accuracy"],
    )
    model_file_name = f"{base_model_name}.keras"
    fit_result = model.fit(
        datagen.flow(x_train, y_train, batch_size=batch_size, shuffle=True),
        epochs=epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=batch_size,
        callbacks=[
            keras.callbacks.LearningRateScheduler(plrscheduler),
            keras.callbacks.ModelCheckpoint(
                model_file_name, monitor=monitor, save_best_only=True, mode="max"
            ),
        ],
        verbose=int(verbose),
    )
    return fit_result, model_file_name, f"{base_model_name}.csv"


def train_model_on_cifar10(
    model: keras.Model,
    base_model_name: str,
    plrscheduler: Callable[..., float],
    batch_size: int = 64,
    epochs: int = 300,
    momentum: float = 0.9,
    nesterov: bool = True,
    verbose: bool = False,
    lab: bool = False,
    bipolar: bool = True,
) -> tuple[keras.callbacks.History, str, str]:
    """:func:`train_model_on_dataset` with ``keras.datasets.cifar10``, which is downloaded."""
    return train_model_on_dataset(
        model,
        keras.datasets.cifar10,
        base_model_name,
        plrscheduler,
        batch_size,
        epochs,
        momentum,
        nesterov,
        verbose,
        lab,
        bipolar,
    )


def print_classification_report(
    pred_y: ArrayLike, test_y: ArrayLike, *, class_names: Iterable[str] | None = None
) -> None:
    """Print precision, recall and F1 of each class.

    Example:
        >>> print_classification_report(np.eye(2)[[0, 0]], np.eye(2)[[0, 1]])
        class    precision  recall      F1  images
        0           0.5000  1.0000  0.6667       1
        1           0.0000  0.0000  0.0000       1
        mean        0.2500  0.5000  0.3333       2
        accuracy 0.5000
        >>> names = ["cat", "dog"]
        >>> print_classification_report(np.eye(2)[[0, 0]], np.eye(2)[[0, 1]], class_names=names)
        class    precision  recall      F1  images
        cat         0.5000  1.0000  0.6667       1
        dog         0.0000  0.0000  0.0000       1
        mean        0.2500  0.5000  0.3333       2
        accuracy 0.5000

    Args:
        pred_y: (N, classes) probabilities, or sums of such.
        test_y: (N, classes) one-hot labels.
        class_names: one for each class; without them, as in the original, their numbers.
    """
    names = map(str, range(np.shape(test_y)[1])) if class_names is None else class_names
    found, labels = np.argmax(pred_y, axis=1), np.argmax(test_y, axis=1)
    print(classification_report(labels, found, names))
    print(f"accuracy {np.mean(found == labels):.4f}")


def test_flips_on_model(
    test_x: ArrayLike,
    test_y: ArrayLike,
    model: keras.Model,
    has_flip_x: bool = True,
    has_flip_y: bool = True,
    has_bw: bool = True,
    center_crop: float = 0.0,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Print how well a model does on images, on changed ones, and on both together.

    A sum is that of the predictions for the plain and the changed images.

    Args:
        test_x: (N, H, W, C) images.
        test_y: (N, classes) one-hot labels.
        model: what predicts.
        has_flip_x: whether to try them mirrored.
        has_flip_y: whether to try them upside down.
        has_bw: whether to try them in grey, the mean of the channels.
        center_crop: the share of height and width to cut off, half at each side, before the rest
            is brought back to the size by its nearest pixels; 0 does not.
        class_names: as for :func:`print_classification_report`.

    Raises:
        ValueError: if the share is not from 0 to below 1.
    """
    images = np.asarray(test_x, np.float32)
    if not 0 <= center_crop < 1:
        raise ValueError(f"center_crop={center_crop} is not from 0 to below 1")

    def predict(changed: Images) -> Array:
        return model.predict(changed, verbose=0)

    def report(title: str, predictions: Array) -> None:
        print(f"{title}:")
        print_classification_report(predictions, test_y, class_names=class_names)

    plain = predict(images)
    report("Test Original", plain)
    total, names = plain, "Original"
    flipped = None
    if has_flip_x:
        flipped = predict(np.flip(images, 2))
        report("Test Flipped X", flipped)
        total, names = total + flipped, f"{names} + Flipped X"
        report(f"Test {names}", total)
    if has_flip_y:
        upside_down = predict(np.flip(images, 1))
        report("Test Flipped Y", upside_down)
        report("Test Original + Flipped Y", plain + upside_down)
        if has_flip_x:
            report(f"Test {names} + Flipped Y", total + upside_down)
    if center_crop > 0:
        cropped = predict(_pixels.cropped(images, center_crop))
        report("Test Center Crop", cropped)
        report("Test Original + Center Crop", plain + cropped)
        if flipped is not None:
            report("Test Original + Flipped X + Center Crop", plain + flipped + cropped)
    if has_bw:
        grey = predict(_pixels.grey(images))
        report("Test Black and White", grey)
        report("Test Original + Black and White", plain + grey)
        if flipped is not None:
            report("Test Original + Flipped X + Black and White", plain + flipped + grey)


def test_flips_on_saved_model(
    test_x: ArrayLike,
    test_y: ArrayLike,
    model_file_name: str | os.PathLike[str],
    has_flip_x: bool = True,
    has_flip_y: bool = True,
    has_bw: bool = True,
    center_crop: float = 0.0,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """:func:`test_flips_on_model` for the model in a file."""
    model = load_kereas_model(model_file_name)
    flips = (has_flip_x, has_flip_y, has_bw)
    test_flips_on_model(test_x, test_y, model, *flips, center_crop, class_names=class_names)


# Not tests of kconv, whatever their names say to pytest.
for _function in (test_flips_on_model, test_flips_on_saved_model):
    vars(_function)["__test__"] = False


def _scaled(images: ArrayLike, lab: bool, bipolar: bool) -> Images:
    x = np.asarray(images)
    return _pixels.scaled(x if x.ndim == 4 else x[..., None], lab, bipolar)


def _one_hot(labels: ArrayLike, classes: int) -> Array:
    return np.eye(classes, dtype=np.float32)[np.asarray(labels, np.int64).reshape(-1)]
