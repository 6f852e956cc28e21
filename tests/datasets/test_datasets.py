"""Data sets: the embedded one, original files, folders and tar files, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kconv
from kconv import datasets

Files = dict[str, bytes]


def png(color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def split_layout() -> Files:
    """Red cats and blue dogs; the brightness tells the images apart."""
    files = {}
    for part, count in (("train", 5), ("test", 2)):
        for i in range(count):
            files[f"{part}/cat/{i}.png"] = png((250 - i, 0, 0))
            files[f"{part}/dog/{i}.PNG"] = png((0, 0, 250 - i))
    return files


def validation(name: str) -> Files:
    return {f"{name}/{c}/{i}.png": png((100 + i, 0, 0)) for c in ("cat", "dog") for i in range(3)}


def write_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:] if path.suffix != '.tar' else ''}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def same(a: datasets.Dataset, b: datasets.Dataset) -> bool:
    arrays = ("x_train", "y_train", "x_test", "y_test")
    return a.class_names == b.class_names and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


# The embedded subset


def test_embedded_subset_is_balanced_and_small() -> None:
    data = datasets.load("fashion_mnist_mini")
    assert data.x_train.shape == (6000, 28, 28, 1)
    assert data.x_test.shape == (1000, 28, 28, 1)
    assert data.x_train.dtype == np.uint8
    assert np.bincount(data.y_train).tolist() == [600] * 10
    assert np.bincount(data.y_test).tolist() == [100] * 10
    assert len(data.class_names) == 10
    folder = Path(kconv.__file__).parent / "data/fashion_mnist_mini"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_resize_keeps_the_picture() -> None:
    small, large = (datasets.load("fashion_mnist_mini", image_size=size) for size in (28, 56))
    assert large.image_shape == (56, 56, 1)
    halved = large.x_test.reshape(1000, 28, 2, 28, 2).mean((2, 4))
    assert np.corrcoef(halved.ravel(), small.x_test.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("count", [1, 10, 25, 6000, 9999])
def test_limits_take_from_all_classes(count: int) -> None:
    data = datasets.load("fashion_mnist_mini", train_images=count, test_images=count)
    assert len(data.x_train) == min(count, 6000)
    assert np.ptp(np.bincount(data.y_train, minlength=10)) <= 1
    assert len(data.y_test) == min(count, 1000)


@pytest.mark.parametrize("option", ["image_size", "train_images", "test_images"])
def test_options_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
        datasets.load("fashion_mnist_mini", **{option: 0})


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'nope': known are fashion_mnist_mini"):
        datasets.load("nope")


# Original files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_local_files(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 7), ("t10k", 3))
    }
    for part, x in images.items():
        labels = np.arange(len(x), dtype=np.uint8)
        for name, array in (
            (f"{part}-images-idx3-ubyte", x),
            (f"{part}-labels-idx1-ubyte", labels),
        ):
            data = idx(array)
            (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    data = datasets.load("mnist", data_dir=tmp_path)
    assert np.array_equal(data.x_train[..., 0], images["train"])
    assert np.array_equal(data.x_test[..., 0], images["t10k"])
    assert data.y_train.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "cut short"),
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load("fashion_mnist", data_dir=tmp_path)


def test_missing_original_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither train-images-idx3-ubyte nor"):
        datasets.load("mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has neither cifar-10-python\.tar\.gz nor"):
        datasets.load("cifar10", data_dir=tmp_path)


def cifar_files(folder: str, parts: list[str], label_key: bytes) -> tuple[Files, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(parts), 4, 32, 32, 3), np.uint8)
    files = {}
    for part, x in zip(parts, images, strict=True):
        batch = {b"data": x.transpose(0, 3, 1, 2).reshape(4, -1), label_key: [0, 1, 2, 3]}
        files[f"{folder}/{part}"] = pickle.dumps(batch, protocol=2)
    return files, images


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_local_files(tmp_path: Path, name: str, packed: bool) -> None:
    if name == "cifar10":
        parts = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        files, images = cifar_files("cifar-10-batches-py", parts, b"labels")
    else:
        files, images = cifar_files("cifar-100-python", ["train", "test"], b"fine_labels")
    if packed:
        archive = {"cifar10": "cifar-10", "cifar100": "cifar-100"}[name]
        write_tar(tmp_path / f"{archive}-python.tar.gz", files)
    else:
        write_folder(tmp_path, files)
    data = datasets.load(name, data_dir=tmp_path)
    assert np.array_equal(data.x_train, images[:-1].reshape(-1, 32, 32, 3))
    assert np.array_equal(data.x_test, images[-1])
    assert data.y_test.tolist() == [0, 1, 2, 3]
    assert len(data.class_names) == int(name.removeprefix("cifar"))


# Folders and tar files of images


def test_folder_with_train_and_test(tmp_path: Path) -> None:
    files = split_layout() | {
        "train/.DS_Store": b"x",
        "train/cat/notes.txt": b"x",
        "README.md": b"",
    }
    data = datasets.load(write_folder(tmp_path, files))
    assert data.class_names == ("cat", "dog")
    assert data.x_train.shape == (10, 8, 8, 3)
    assert data.y_train.tolist() == [0] * 5 + [1] * 5
    assert data.x_train[:5, 0, 0, 0].tolist() == [250, 249, 248, 247, 246]
    assert data.x_train[5:, 0, 0, 2].tolist() == [250, 249, 248, 247, 246]
    assert data.y_test.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("prefix", ["", "./", "pets/", "a/b/"])
def test_tar_equals_folder(tmp_path: Path, suffix: str, prefix: str) -> None:
    folder = write_folder(tmp_path / "folder", split_layout())
    backwards = dict(reversed(split_layout().items()))
    tar = write_tar(
        tmp_path / f"x{suffix}", {prefix + name: data for name, data in backwards.items()}
    )
    assert same(datasets.load(tar), datasets.load(folder))


def test_folder_of_classes_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    files = {f"{c}/{i:02d}.png": png((i, 0, 0)) for c in ("cat", "dog", "emu") for i in range(11)}
    data = datasets.load(write_folder(tmp_path / "a", files))
    assert np.bincount(data.y_train).tolist() == [9, 9, 9]
    assert np.bincount(data.y_test).tolist() == [2, 2, 2]
    for label in range(3):
        parts = [data.x_train[data.y_train == label], data.x_test[data.y_test == label]]
        assert sorted(np.concatenate(parts)[:, 0, 0, 0].tolist()) == list(range(11))
    backwards = dict(reversed(files.items()))
    assert same(data, datasets.load(write_folder(tmp_path / "b", backwards)))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_images(tmp_path: Path, name: str) -> None:
    files = validation(name)
    both = datasets.load(write_folder(tmp_path / "both", split_layout() | files))
    assert both.x_val is not None
    assert both.y_val is not None
    assert both.x_val[:, 0, 0, 0].tolist() == [100, 101, 102] * 2
    assert both.y_val.tolist() == [0, 0, 0, 1, 1, 1]
    assert (len(both.x_train), len(both.x_test)) == (10, 4)
    no_test = {n: d for n, d in split_layout().items() if n.startswith("train")}
    one = datasets.load(write_folder(tmp_path / "one", no_test | files), test_images=4)
    assert one.x_val is one.x_test
    assert one.x_test[:, 0, 0, 0].tolist() == [100, 101] * 2
    assert datasets.load(write_folder(tmp_path / "none", split_layout())).x_val is None


def test_folders_below_a_class(tmp_path: Path) -> None:
    deep = {"train/cat/a/b/x.png": png((9, 0, 0)), "test/dog/test/x.png": png((8, 0, 0))}
    data = datasets.load(write_folder(tmp_path / "split", split_layout() | deep))
    assert data.x_train[:, 0, 0, 0].tolist()[:6] == [250, 249, 248, 247, 246, 9]
    assert data.x_test[:, 0, 0, 0].tolist() == [250, 249, 0, 0, 8]
    flat = {f"{c}/{d}/{i}.png": png() for c in ("bus", "train") for d in "ab" for i in (1, 2)}
    data = datasets.load(write_folder(tmp_path / "flat", flat))
    assert data.class_names == ("bus", "train")
    assert len(data.x_train) == 6


def test_empty_class_folder_is_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path, split_layout())
    (root / "train/emu").mkdir()
    (root / "train/.cache").mkdir()
    with pytest.raises(ValueError, match="class 'emu' has no images in train/, but 0 other files"):
        datasets.load(root)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path, split_layout())
    for source, count in ((str(root), 14), ("fashion_mnist_mini", 7000)):
        with pytest.raises(ValueError, match=f"{count:,} images of 100000x100000 take .* GB; the"):
            datasets.load(source, image_size=100_000)


def test_train_may_be_a_class(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": png() for c in ("bus", "train") for i in range(3)}
    assert datasets.load(write_folder(tmp_path, files)).class_names == ("bus", "train")


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    files = split_layout() | {"train/cat/wide.png": png((9, 9, 9), (20, 10))}
    folder = write_folder(tmp_path, files)
    with pytest.raises(ValueError, match=r"differ in size .*give an image size"):
        datasets.load(folder)
    assert datasets.load(folder, image_size=5).x_train.shape == (11, 5, 5, 3)


def test_grey_and_palette_images_become_colour(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 77).save(buffer, "GIF")
    data = datasets.load(
        write_folder(tmp_path, split_layout() | {"test/cat/0.gif": buffer.getvalue()})
    )
    assert data.x_test[0, 0, 0].tolist() == [77, 77, 77]


def test_only_the_chosen_images_are_decoded(tmp_path: Path) -> None:
    files = split_layout() | {"train/cat/4.png": b"broken"}
    folder = write_folder(tmp_path, files)
    assert len(datasets.load(folder, train_images=8).x_train) == 8
    with pytest.raises(ValueError, match=r"train/cat/4\.png is not a readable image"):
        datasets.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: {}, "has no images; expected train/<class>/"),
        (lambda files: {"train/cat/a.txt": b""}, "has no images"),
        (lambda files: files | {"loose.png": png()}, r"is mixed up at loose\.png"),
        (lambda files: files | {"emu/a.png": png()}, r"is mixed up at emu/a\.png"),
        (lambda files: files | {"train/b.png": png()}, r"is mixed up at train/b\.png"),
        (lambda files: files | {"val/b.png": png()}, r"is mixed up at val/b\.png"),
        (lambda files: files | {"val/cat/b.png": png()}, "'dog' has images in only one of "),
        (lambda files: files | validation("val") | validation("valid"), "folders for validation"),
        (
            lambda files: files | {"train/emu/1.xyz": b"", "train/emu/2.txt": b""},
            r"'emu' has no images in train/, but 2 other files \(\.txt, \.xyz\); expected \.avif",
        ),
        (
            lambda files: files | {f"train/cat/{i}.heic": b"" for i in range(3)},
            r"class 'cat' has images of unread kinds in train/, 3 files \(\.heic\)",
        ),
        (
            lambda files: {n[5:]: d for n, d in validation("test").items()} | {"emu/a": b""},
            r"class 'emu' has no images, but 1 other files \(no suffix\)",
        ),
        (
            lambda files: {n.replace("dog", "\x1b[2J"): d for n, d in files.items()},
            r"class name '\\x1b\[2J' cannot be printed",
        ),
        (lambda files: files | {"train/emu/b.png": png()}, "class 'emu' has images in only one"),
        (lambda files: {n: d for n, d in files.items() if n[:5] == "train"}, "in only one of"),
        (lambda files: {n: d for n, d in files.items() if "cat" in n}, "has the one class 'cat'"),
        (lambda files: {"cat/a.png": png(), "dog/a.png": png()}, "class 'cat' has one image"),
        (lambda files: files | {"test/dog/x.jpg": png()[:40]}, r"test/dog/x\.jpg is not a"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused(
    tmp_path: Path, change: Callable[[Files], Files], message: str
) -> None:
    files = change(split_layout())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        datasets.load(write_folder(tmp_path / "folder", files))
    with pytest.raises(ValueError, match=message):
        datasets.load(write_tar(tmp_path / "folder.tar", files))


@pytest.mark.parametrize("name", ["../train/cat/x.png", "/train/cat/x.png", "train/../../x.png"])
def test_tar_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", split_layout() | {name: png()})
    with pytest.raises(ValueError, match="points outside of it"):
        datasets.load(tar)


@pytest.mark.parametrize("keep", [0, 100, -600])
def test_damaged_tar_is_refused(tmp_path: Path, keep: int) -> None:
    whole = write_tar(tmp_path / "x.tar.gz", split_layout()).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"x\.tar\.gz is not a readable tar file"):
        datasets.load(tmp_path / "x.tar.gz")


def test_cifar10_archive_of_images() -> None:
    root = os.environ.get("KCONV_REFERENCE")
    archive = Path(root or "").parent / "data/cifar10-jpeg.tar.xz"
    if not root or not archive.is_file():
        pytest.skip("KCONV_REFERENCE names no folder with ../data/cifar10-jpeg.tar.xz")
    data = datasets.load(archive, train_images=200, test_images=50)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.x_train.shape == (200, 32, 32, 3)
    assert np.bincount(data.y_train).tolist() == [20] * 10
    assert np.bincount(data.y_test).tolist() == [5] * 10


def test_downloads_do_not_write_among_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may be JSON, for other programs."""

    def load_data() -> Any:
        print("Downloading data from ...")
        part = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([3, 9])
        return part, part

    keras: Any = types.ModuleType("keras")
    keras.datasets = types.SimpleNamespace(mnist=types.SimpleNamespace(load_data=load_data))
    keras.config = types.SimpleNamespace(image_data_format=lambda: "channels_last")
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    data = datasets.load("mnist")
    assert data.y_test.tolist() == [3, 9]
    assert capsys.readouterr() == ("", "Downloading data from ...\n")
