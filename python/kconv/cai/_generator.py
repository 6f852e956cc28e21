"""Image augmentation with the arguments and the meaning of Keras's ``ImageDataGenerator``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kconv.datasets import IMAGE_SUFFIXES
from kconv.datasets.decode import formats

Images = NDArray[np.float32]
Range = float | tuple[float, float]
Shift = float | Sequence[float]
FillMode = Literal["nearest", "constant", "reflect", "wrap"]
Subset = Literal["training", "validation"] | None

_EPSILON = 1e-6


class Batches(keras.utils.PyDataset):
    """Augmented batches for ``fit``; iterating by hand goes on forever, as in Keras.

    Args:
        generator: what augments them.
        count: number of images.
        read: gives the images of some indices, (n, H, W, C) float32.
        targets: what belongs to them, or None.
        batch_size: images in a batch; the last may have fewer.
        shuffle: whether each epoch has another order.
        seed: of the order and the augmentation.
        sample_weight: (N,), or None.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        count: int,
        read: Callable[[NDArray[np.intp]], Images],
        targets: NDArray[Any] | None,
        batch_size: int,
        shuffle: bool,
        seed: int | None,
        sample_weight: NDArray[Any] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is below 1")
        self.n = self.samples = count
        self.batch_size = batch_size
        self._generator, self._read = generator, read
        self._targets, self._sample_weight = targets, sample_weight
        self._shuffle = shuffle
        self._rng = np.random.default_rng(seed)
        self._order = np.arange(count)
        self._next = 0
        self.on_epoch_end()

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __getitem__(self, index: int) -> Any:
        """A batch of images, (images, targets) or (images, targets, weights)."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        images = self._generator.augmented(self._read(chosen), self._rng)
        if self._targets is None:
            return images
        if self._sample_weight is None:
            return images, self._targets[chosen]
        return images, self._targets[chosen], self._sample_weight[chosen]

    def on_epoch_end(self) -> None:
        """Draw another order."""
        if self._shuffle:
            self._order = self._rng.permutation(self.n)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._next == len(self):
            self.reset()
            self.on_epoch_end()
        self._next += 1
        return self[self._next - 1]

    def reset(self) -> None:
        """Begin with the first batch."""
        self._next = 0


class FolderBatches(Batches):
    """Batches of image files; ``classes`` of the images, their names and numbers are attributes."""

    filenames: list[str]
    class_indices: dict[str, int]
    classes: NDArray[np.int64]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_indices)


@dataclass(kw_only=True)
class ImageGenerator:
    """Random images from images; the arguments are those of Keras's ``ImageDataGenerator``.

    Example:
        >>> generator = ImageGenerator(rotation_range=20, horizontal_flip=True)
        >>> next(generator.flow(np.zeros((5, 8, 8, 3)), batch_size=4, seed=1)).shape
        (4, 8, 8, 3)

    Attributes:
        featurewise_center: subtract the mean of the images given to :meth:`fit`.
        samplewise_center: subtract each image's mean.
        featurewise_std_normalization: divide by the deviation of the images given to :meth:`fit`;
            as in Keras, ``featurewise_center`` comes with it.
        samplewise_std_normalization: divide by each image's deviation; likewise.
        zca_whitening: whiten by the images given to :meth:`fit`; likewise, and instead of
            ``featurewise_std_normalization``.
        zca_epsilon: of the whitening.
        rotation_range: degrees, to either side.
        width_shift_range: to either side: below 1 a share of the width, else pixels; of a
            sequence one of its numbers, of an integer n one of 0 to n - 1.
        height_shift_range: likewise, up or down.
        shear_range: degrees, to either side, by which columns lean.
        zoom_range: factors in [1 - z, 1 + z], or in a range (low, high).
        channel_shift_range: what is added to all channels at most, to either side.
        fill_mode: what is outside of an image.
        cval: its value with "constant".
        horizontal_flip: whether every other image is mirrored.
        vertical_flip: whether every other image is turned upside down.
        rescale: factor on the values, applied first of all but ``preprocessing_function``.
        preprocessing_function: of an image (H, W, C) after the augmentation.
        data_format: "channels_last" or "channels_first"; None means Keras's setting.
        validation_split: the share of the images, the first ones, that ``subset="validation"`` is.
    """

    featurewise_center: bool = False
    samplewise_center: bool = False
    featurewise_std_normalization: bool = False
    samplewise_std_normalization: bool = False
    zca_whitening: bool = False
    zca_epsilon: float = 1e-6
    rotation_range: float = 0.0
    width_shift_range: Shift = 0.0
    height_shift_range: Shift = 0.0
    shear_range: float = 0.0
    zoom_range: Range = 0.0
    channel_shift_range: float = 0.0
    fill_mode: FillMode = "nearest"
    cval: float = 0.0
    horizontal_flip: bool = False
    vertical_flip: bool = False
    rescale: float | None = None
    preprocessing_function: Callable[[Images], Images] | None = None
    data_format: str | None = None
    validation_split: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            ValueError: if one of them has no meaning.
        """
        self.data_format = self.data_format or keras.config.image_data_format()
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"data_format={self.data_format!r}, expected 'channels_last' or 'channels_first'"
            )
        if self.fill_mode not in _INSIDE and self.fill_mode != "constant":
            known = ", ".join([*_INSIDE, "constant"])
            raise ValueError(f"fill_mode={self.fill_mode!r} is not one of {known}")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"validation_split={self.validation_split} is not from 0 to below 1")
        zoom = self.zoom_range
        bounds = (1 - zoom, 1 + zoom) if isinstance(zoom, int | float) else tuple(zoom)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"zoom_range={zoom!r} is not a number below 1, nor a range above 0")
        self._zoom = bounds
        if self.zca_whitening or self.featurewise_std_normalization:
            self._centered("featurewise_center")
        if self.zca_whitening:
            self.featurewise_std_normalization = False
        if self.samplewise_std_normalization:
            self._centered("samplewise_center")
        self._mean: Images | None = None
        self._deviation: Images | None = None
        self._whitening: NDArray[np.float64] | None = None

    def _centered(self, name: str) -> None:
        if not getattr(self, name):
            warnings.warn(f"{name}=True comes with the normalization", stacklevel=4)
            setattr(self, name, True)

    def fit(
        self, x: ArrayLike, augment: bool = False, rounds: int = 1, seed: int | None = None
    ) -> None:
        """Take the statistics that the featurewise options need from images (N, H, W, C)."""
        images = self._to_last(np.asarray(x, np.float32))
        if self.rescale:
            images = images * np.float32(self.rescale)
        if augment:
            rng = np.random.default_rng(seed)
            images = np.concatenate([self._transformed(images, rng) for _ in range(rounds)])
        self._mean = images.mean(axis=(0, 1, 2))
        self._deviation = images.std(axis=(0, 1, 2))
        if self.zca_whitening:
            flat = images.reshape(len(images), -1).astype(np.float64)
            flat -= flat.mean(axis=0)
            left, values, _ = np.linalg.svd(flat.T @ flat / len(flat))
            self._whitening = (left / np.sqrt(values + self.zca_epsilon)) @ left.T

    def flow(
        self,
        x: ArrayLike,
        y: ArrayLike | None = None,
        batch_size: int = 32,
        shuffle: bool = True,
        sample_weight: ArrayLike | None = None,
        seed: int | None = None,
        subset: Subset = None,
    ) -> Batches:
        """Augmented batches of arrays.

        Args:
            x: images, (N, H, W, C).
            y: labels, (N, ...), or None.
            batch_size: images in a batch.
            shuffle: whether each epoch has another order.
            sample_weight: (N,), or None.
            seed: of the order and the augmentation.
            subset: "training" or "validation" of a ``validation_split``, or None for all.

        Returns:
            Batches of images, (images, labels) or (images, labels, weights).

        Raises:
            ValueError: if images and labels are not as many.
        """
        images = np.asarray(x)
        if images.ndim != 4:
            raise ValueError(f"x has shape {images.shape}, expected (N, H, W, C)")
        others = [None if part is None else np.asarray(part) for part in (y, sample_weight)]
        for part in others:
            if part is not None and len(part) != len(images):
                raise ValueError(f"{len(images)} images do not go with {len(part)} labels")
        chosen_part = self._part(len(images), subset)
        images = images[chosen_part]
        targets, weights = (None if other is None else other[chosen_part] for other in others)
        return Batches(
            self,
            len(images),
            lambda chosen: images[chosen].astype(np.float32),
            targets,
            batch_size,
            shuffle,
            seed,
            weights,
        )

    def flow_from_directory(
        self,
        directory: str | Path,
        target_size: tuple[int, int] = (256, 256),
        color_mode: Literal["grayscale", "rgb", "rgba"] = "rgb",
        classes: Sequence[str] | None = None,
        class_mode: Literal["categorical", "binary", "sparse", "input"] | None = "categorical",
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        subset: Subset = None,
        interpolation: str = "nearest",
    ) -> FolderBatches:
        """Augmented batches of the image files in ``directory/<class>/``.

        Args:
            directory: the folder.
            target_size: (height, width) to which images are resized.
            color_mode: "rgb", "rgba" or "grayscale".
            classes: names of the classes, in the order of their numbers; None: all, sorted.
            class_mode: the labels are one-hot vectors ("categorical"), numbers ("binary",
                "sparse"), the images ("input"), or absent (None).
            batch_size: images in a batch.
            shuffle: whether each epoch has another order.
            seed: of the order and the augmentation.
            subset: "training" or "validation" of a ``validation_split`` (of each class), or None.
            interpolation: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".

        Returns:
            Batches of images, or (images, labels).

        Raises:
            ValueError: if an argument has no meaning, or there are no images.
        """
        from PIL import Image

        modes = {"grayscale": "L", "rgb": "RGB", "rgba": "RGBA"}
        if color_mode not in modes:
            raise ValueError(f"color_mode={color_mode!r} is not one of {', '.join(modes)}")
        if class_mode not in ("categorical", "binary", "sparse", "input", None):
            raise ValueError(f"class_mode={class_mode!r} is not one Keras has")
        root = Path(directory)
        names = list(classes or sorted(path.name for path in root.iterdir() if path.is_dir()))
        files, labels = [], []
        for label, name in enumerate(names):
            found = sorted(
                path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
            )
            chosen = found[self._part(len(found), subset)]
            files += chosen
            labels += [label] * len(chosen)
        if not files:
            raise ValueError(f"{directory} has no images in folders of classes")
        resampling = Image.Resampling[interpolation.upper()]
        height, width = target_size

        def read(chosen: NDArray[np.intp]) -> Images:
            images = []
            for index in chosen:
                with Image.open(files[index], formats=formats()) as picture:
                    resized = picture.convert(modes[color_mode]).resize((width, height), resampling)
                images.append(np.asarray(resized))
            batch = np.stack(images).astype(np.float32).reshape(len(images), height, width, -1)
            return batch if self.data_format == "channels_last" else batch.transpose(0, 3, 1, 2)

        numbers = np.array(labels, np.int64)
        targets: NDArray[Any] | None = None
        if class_mode == "categorical":
            targets = np.eye(len(names), dtype=np.float32)[numbers]
        elif class_mode in ("binary", "sparse"):
            targets = numbers.astype(np.float32)
        elif class_mode == "input":
            targets = read(np.arange(len(files)))
        batches = FolderBatches(self, len(files), read, targets, batch_size, shuffle, seed)
        batches.filenames = [str(path.relative_to(root)) for path in files]
        batches.class_indices = {name: label for label, name in enumerate(names)}
        batches.classes = numbers
        return batches

    def random_transform(self, x: Images, seed: int | None = None) -> Images:
        """One image, augmented: (H, W, C) to the same shape."""
        images = self._to_last(np.asarray(x, np.float32)[None])
        return self._from_last(self._transformed(images, np.random.default_rng(seed)))[0]

    def standardize(self, x: Images) -> Images:
        """An image or images, rescaled, centred and normalised."""
        x = np.asarray(x, np.float32)
        images = self._to_last(x if x.ndim == 4 else x[None])
        images = self._from_last(self._standardized(images))
        return images if x.ndim == 4 else images[0]

    def augmented(self, images: Images, rng: np.random.Generator) -> Images:
        """(n, H, W, C) augmented, then standardized."""
        images = self._transformed(self._to_last(images), rng)
        return self._from_last(self._standardized(images))

    def _to_last(self, images: Images) -> Images:
        return images if self.data_format == "channels_last" else images.transpose(0, 2, 3, 1)

    def _from_last(self, images: Images) -> Images:
        return images if self.data_format == "channels_last" else images.transpose(0, 3, 1, 2)

    def _part(self, count: int, subset: Subset) -> slice:
        held_out = int(self.validation_split * count)
        parts = {
            None: slice(None),
            "validation": slice(held_out),
            "training": slice(held_out, None),
        }
        if subset not in parts:
            raise ValueError(f"subset={subset!r} is not 'training' or 'validation'")
        return parts[subset]

    def _transformed(self, images: Images, rng: np.random.Generator) -> Images:
        """(n, H, W, C) moved, shifted in their colours and mirrored."""
        n, height, width, _ = images.shape
        angle, shear = np.radians(
            rng.uniform(-1, 1, (2, n)) * [[self.rotation_range], [self.shear_range]]
        )
        shifts = ((self.height_shift_range, height), (self.width_shift_range, width))
        shift = np.stack([_pixels(rng, most, size, n) for most, size in shifts], axis=1)
        zoom = rng.uniform(*self._zoom, (n, 2))
        if angle.any() or shear.any() or shift.any() or (zoom != 1).any():
            images = self._warped(images, *_affine(angle, shift, shear, zoom))
        if self.channel_shift_range:
            most = self.channel_shift_range
            low = images.min(axis=(1, 2, 3), keepdims=True)
            high = images.max(axis=(1, 2, 3), keepdims=True)
            added = rng.uniform(-most, most, (n, 1, 1, 1)).astype(np.float32)
            images = np.clip(images + added, low, high)
        for axis, wanted in ((2, self.horizontal_flip), (1, self.vertical_flip)):
            if wanted:
                mirrored = rng.random((n, 1, 1, 1)) < 0.5
                images = np.where(mirrored, np.flip(images, axis), images)
        return images

    def _warped(
        self, images: Images, matrix: NDArray[np.float64], shift: NDArray[np.float64]
    ) -> Images:
        """The pixel at p, counted from the middle, is that from matrix @ p + shift."""
        n, height, width, channels = images.shape
        size = np.array([height, width])
        middle = (size - 1) / 2
        grid = np.indices((height, width)).reshape(2, -1) - middle[:, None]
        place = matrix @ grid + (shift + middle)[:, :, None]  # (n, 2, height * width)
        corner = np.floor(place).astype(np.int64)
        fraction = (place - corner).astype(np.float32)[..., None]
        pixels = images.reshape(-1, channels)
        first = np.arange(n)[:, None] * (height * width)

        def pixel(down: int, right: int) -> Images:
            row, column = corner[:, 0] + down, corner[:, 1] + right
            if self.fill_mode == "constant":
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                index = np.where(inside, row * width + column, 0)
                return np.where(inside[..., None], pixels[first + index], np.float32(self.cval))
            wrap = _INSIDE[self.fill_mode]
            return pixels[first + wrap(row, height) * width + wrap(column, width)]

        top = pixel(0, 0) + (pixel(0, 1) - pixel(0, 0)) * fraction[:, 1]
        bottom = pixel(1, 0) + (pixel(1, 1) - pixel(1, 0)) * fraction[:, 1]
        return (top + (bottom - top) * fraction[:, 0]).reshape(images.shape)

    def _standardized(self, images: NDArray[np.floating[Any]]) -> Images:
        if self.preprocessing_function is not None:
            images = np.stack([self.preprocessing_function(image) for image in images])
        if self.rescale:
            images = images * np.float32(self.rescale)
        if self.samplewise_center:
            images = images - images.mean(axis=(1, 2, 3), keepdims=True)
        if self.samplewise_std_normalization:
            images = images / (images.std(axis=(1, 2, 3), keepdims=True) + _EPSILON)
        if self.featurewise_center:
            images = images - self._fitted(self._mean)
        if self.featurewise_std_normalization:
            images = images / (self._fitted(self._deviation) + _EPSILON)
        if self.zca_whitening:
            whitening = self._fitted(self._whitening)
            flat = images.reshape(len(images), -1) @ whitening
            images = flat.astype(np.float32).reshape(images.shape)
        return images.astype(np.float32)

    @staticmethod
    def _fitted(statistics: NDArray[Any] | None) -> NDArray[Any]:
        if statistics is None:
            raise ValueError("the featurewise options need fit(images) first")
        return statistics


def _pixels(rng: np.random.Generator, shift: Shift, size: int, count: int) -> NDArray[np.float64]:
    """By how many pixels each of some images moves along an axis of this size."""
    if not np.any(shift):
        return np.zeros(count)
    if isinstance(shift, float):
        drawn = rng.uniform(-1, 1, count) * shift
    else:
        drawn = rng.choice(shift, count) * rng.choice([-1.0, 1.0], count)
    return drawn * size if np.max(np.abs(shift)) < 1 else drawn


def _reflected(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Abcd dcba abcd dcba ..."""
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


_INSIDE: dict[str, Callable[[NDArray[np.int64], int], NDArray[np.int64]]] = {
    "nearest": lambda index, size: np.clip(index, 0, size - 1),
    "reflect": _reflected,
    "wrap": lambda index, size: index % size,
}


def _affine(
    angle: NDArray[np.float64],
    shift: NDArray[np.float64],
    shear: NDArray[np.float64],
    zoom: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices (n, 2, 2) and shifts (n, 2), of (row, column): rotation @ shift @ shear @ zoom."""
    zero, one = np.zeros_like(angle), np.ones_like(angle)

    def stack(rows: list[list[NDArray[np.float64]]]) -> NDArray[np.float64]:
        return np.moveaxis(np.array(rows), -1, 0)

    rotation = stack([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shearing = stack([[np.cos(shear), zero], [-np.sin(shear), one]])
    zooming = stack([[zoom[:, 0], zero], [zero, zoom[:, 1]]])
    return rotation @ shearing @ zooming, (rotation @ shift[:, :, None])[:, :, 0]
