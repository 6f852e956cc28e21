"""Streamed images beside the same in memory: folders, tar files, shards, objects of others."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kconv import datasets
from kconv.datasets.streams import StreamedFiles, open_shards, shard_paths


def png(seed: int, size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def contents() -> Iterator[tuple[str, bytes]]:
    """ImageNet's layout: train/<class>/ and val/<class>/."""
    for number in range(14):
        part = "train" if number < 10 else "val"
        yield f"{part}/n0{number % 2}/{number}.png", png(number)


@pytest.fixture(params=["folder", "tar"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            for name, data in contents():
                add(tar, name, data)
        return tmp_path / "images.tar"
    for name, data in contents():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_streamed_images_are_those_in_memory(source: Path) -> None:
    kwargs: dict[str, Any] = {"image_size": 6, "train_images": 7, "interpolation": "nearest"}
    memory = datasets.load(source, **kwargs)
    streamed = datasets.load(source, stream=True, **kwargs)
    assert isinstance(streamed.x_train, StreamedFiles)
    assert streamed.image_shape == memory.image_shape
    assert streamed.class_names == memory.class_names == ("n00", "n01")
    assert streamed.x_test is streamed.x_val
    for name in ("y_train", "y_test", "y_val"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(memory, name))
    order = np.array([5, 0, 6])
    np.testing.assert_array_equal(streamed.x_train[order], memory.x_train[order])
    np.testing.assert_array_equal(streamed.x_test[1:3], memory.x_test[1:3])
    np.testing.assert_array_equal(streamed.x_test[2], memory.x_test[2])
    again = pickle.loads(pickle.dumps(streamed.x_train))
    np.testing.assert_array_equal(again[order], memory.x_train[order])


def test_streams_only_what_is_large(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of_all = 14 * 6 * 6 * 3
    for memory, kind in ((4 * bytes_of_all, np.ndarray), (4 * bytes_of_all - 1, StreamedFiles)):
        monkeypatch.setattr(datasets, "memory", lambda memory=memory: memory)
        assert isinstance(datasets.load(source, image_size=6, stream=None).x_train, kind)
    with pytest.raises(ValueError, match="stream=True needs an image_size"):
        datasets.load(source, stream=True)
    with pytest.raises(ValueError, match="mnist_mini comes as arrays"):
        datasets.load("fashion_mnist_mini", stream=True)


def test_compressed_archive_cannot_be_streamed(tmp_path: Path) -> None:
    path = tmp_path / "images.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in contents():
            add(tar, name, data)
    with pytest.raises(ValueError, match=r"images\.tar\.gz cannot be read from any place.*unpack"):
        datasets.load(path, image_size=6, stream=True)
    assert isinstance(datasets.load(path, image_size=6, stream=None).x_train, np.ndarray)


@pytest.mark.parametrize("size", [None, 6])
def test_bad_images_are_left_out(size: int | None, tmp_path: Path) -> None:
    """Those that are no images, and files that cannot be read: here a link that leads nowhere."""
    for number in range(8):
        (folder := tmp_path / f"data/{'ab'[number % 2]}").mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(b"none" if number in (0, 7) else png(number))
    (tmp_path / "data/a/00.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"a/00\.png cannot be read: No such file"):
        datasets.load(tmp_path / "data", image_size=size)
    unread: dict[str, str] = {}
    data = datasets.load(tmp_path / "data", image_size=size, unread=unread)
    assert sorted(unread) == ["a/0.png", "a/00.png", "b/7.png"]
    assert len(data.x_train) + len(data.x_test) == 6
    assert len(data.x_train) == len(data.y_train)
    assert data.x_train.reshape(len(data.x_train), -1).any(axis=1).all()
    if size is None:
        return
    streamed = datasets.load(tmp_path / "data", image_size=6, stream=True)
    parts = [streamed.x_train, streamed.x_test]
    failed = [part.read(np.arange(len(part)))[1] for part in parts]
    messages = sorted(text for part in failed for text in part.values())
    assert [text.split()[1] for text in messages] == ["a/0.png", "a/00.png", "b/7.png"]


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"none of 4 images can be read, the first as .*a/0\.png"):
        datasets.load(tmp_path, image_size=6, unread={})


def test_truncated_archive_names_the_image(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in contents():
            add(tar, name, data)
    data = datasets.load(path, image_size=6, stream=True)
    path.write_bytes(path.read_bytes()[: 512 * 3])
    with pytest.raises(ValueError, match=r"train/n0\d/\d\.png is not a readable.*cut short"):
        data.x_train[:]


def shard(path: Path, numbers: range, *, label: bool = True) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            add(tar, f"a.folder/{number:03}.png", png(number))
            add(tar, f"a.folder/{number:03}.json", b"{}")
            if label:
                add(tar, f"a.folder/{number:03}.cls", str(number % 3).encode())


def test_shards_of_webdataset(tmp_path: Path) -> None:
    for part in range(3):
        shard(tmp_path / f"train-{part:02}.tar", range(4 * part, 4 * part + 4))
    shard(tmp_path / "test.tar", range(20, 23))
    pattern = tmp_path / "train-{00..02}.tar"
    assert shard_paths(pattern)[2] == tmp_path / "train-02.tar"
    data = datasets.load_shards(pattern, [tmp_path / "test.tar"], image_size=5)
    assert data.y_train.tolist() == [number % 3 for number in range(12)]
    assert data.class_names == ("0", "1", "2")
    expected = Image.open(io.BytesIO(png(9))).resize((5, 5), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.x_train[9], np.asarray(expected))

    with pytest.raises(ValueError, match="the labels go from 0 to 2, and there are 2 class names"):
        datasets.load_shards(pattern, pattern, image_size=5, class_names="ab")
    (tmp_path / "train-01.tar").unlink()
    with pytest.raises(ValueError, match=r"the shard .*train-01\.tar is missing, of 3"):
        open_shards(pattern, 5)
    shard(tmp_path / "none.tar", range(2), label=False)
    with pytest.raises(ValueError, match=r"000\.png has no \.cls file"):
        open_shards(tmp_path / "none.tar", 5)
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for name in ("0.png", "0.mask.png", "0.CLS"):
            add(tar, name, b"1" if name.endswith("CLS") else png(0))
    with pytest.raises(ValueError, match=r"0\.png and 0\.mask\.png are of one sample"):
        open_shards(tmp_path / "two.tar", 5)


class Pairs:
    """As torchvision's: (picture, label) by number, and the labels in a list."""

    classes = ("cat", "dog")

    def __init__(self, count: int) -> None:
        self.targets = [number % 2 for number in range(count)]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        self.reads += 1
        return Image.open(io.BytesIO(png(number))), self.targets[number]


def test_objects_of_other_libraries() -> None:
    pairs = Pairs(1000)
    rows = [{"img": np.full((6, 6), n, np.uint8), "label": n % 2} for n in range(4)]
    data = datasets.from_objects({"train": pairs, "validation": Pairs(2)}, image_size=6)
    assert pairs.reads < 100  # its shape and keys are seen at the first, its labels at some
    assert data.class_names == ("cat", "dog")
    assert data.x_test is data.x_val
    expected = Image.open(io.BytesIO(png(4))).resize((6, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.x_train[4], np.asarray(expected))
    grey = datasets.from_objects({"train": rows, "test": rows})
    assert grey.image_shape == (6, 6, 1)
    np.testing.assert_array_equal(grey.x_train[3], np.full((6, 6, 1), 3))


class Damaged(Pairs):
    """Whose first files are no images."""

    def __init__(self, count: int, bad: int) -> None:
        super().__init__(count)
        self.bad = bad

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        data = b"no image" if number < self.bad else png(number)
        return Image.open(io.BytesIO(data)), self.targets[number]


def test_damaged_objects_are_told_when_they_are_read() -> None:
    data = datasets.from_objects({"train": Damaged(5, 2), "test": Pairs(2)})
    assert data.image_shape == (9, 7, 3)
    images, failed = data.x_train.read(np.arange(5))  # type: ignore[union-attr]
    assert sorted(failed) == [0, 1]
    assert failed[0].startswith("image 0 cannot be read: cannot identify image file")
    np.testing.assert_array_equal(images[4], np.asarray(Image.open(io.BytesIO(png(4)))))
    with pytest.raises(ValueError, match="none of 3 images can be read, the first as cannot ident"):
        datasets.from_objects({"train": Damaged(3, 3), "test": Pairs(2)})
    unlisted = Damaged(3, 1)
    unlisted.target_transform = int  # type: ignore[attr-defined]  # so that each item is asked
    with pytest.raises(ValueError, match="image 0 cannot be read, nor its label: cannot identify"):
        datasets.from_objects({"train": unlisted, "test": Pairs(2)})


def test_hugging_face(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    from datasets.table import InMemoryTable

    names = library.ClassLabel(names=["cat", "dog"])
    features = library.Features({"image": library.Image(), "label": names})
    rows = {
        "image": [{"bytes": b"no image" if n == 2 else png(n), "path": None} for n in range(5)],
        "label": [n % 2 for n in range(5)],
    }
    table = InMemoryTable.from_pydict(rows, schema=features.arrow_schema)
    # With a fingerprint, as some releases of pyarrow have what theirs cannot be made of.
    info = library.DatasetInfo(features=features)
    part = library.Dataset(table, info=info, fingerprint="kconv")
    data = datasets.from_objects(library.DatasetDict({"train": part, "validation": part}))
    assert data.class_names == ("cat", "dog")
    assert data.y_train.tolist() == [0, 1, 0, 1, 0]
    assert data.x_test is data.x_val
    images, failed = data.x_train.read(np.arange(5))  # type: ignore[union-attr]
    assert list(failed) == [2]
    np.testing.assert_array_equal(images[3], np.asarray(Image.open(io.BytesIO(png(3)))))


PIXELS = np.random.default_rng(5).integers(0, 256, (5, 6, 3), np.uint8)


class Others(Pairs):
    classes = ("bird", "dog")


def test_pictures_of_an_object_are_as_those_of_files() -> None:
    """Pillow would clip grey values of 16 bits; and the first picture decides of all."""
    grey = PIXELS[..., 0]
    deep, shallow = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    data = datasets.from_objects(
        {
            "test": [(Image.new("RGB", (6, 5)), 0), (PIXELS[:4], 0)],
            "train": [(deep, 0), (shallow, 1)],
        }
    )
    assert data.x_train.shape == (2, 5, 6, 1)
    assert data.x_test.shape == (2, 5, 6, 1)
    np.testing.assert_array_equal(data.x_train[0], grey[..., None])
    np.testing.assert_array_equal(data.x_train[1], grey[..., None])
    with pytest.raises(ValueError, match="mode 'RGB', where the first one is grey"):
        data.x_test[0]
    colour = datasets.from_objects({"train": [(PIXELS, 0)], "test": [(deep, 0), (PIXELS[:4], 0)]})
    np.testing.assert_array_equal(colour.x_test[0], np.stack([grey] * 3, axis=-1))
    with pytest.raises(ValueError, match="it is 4x6, others 5x6"):
        colour.x_test[1]


def test_labels_are_those_of_the_items() -> None:
    """Which a transform of images and labels together may change, as torchvision's data have it."""
    joint = Pairs(2)
    joint.transforms = len  # type: ignore[attr-defined]
    joint.targets = [7, 7]
    joint.__class__ = type("Joint", (Pairs,), {"__getitem__": lambda self, n: (PIXELS, 1 - n)})
    data = datasets.from_objects({"train": joint, "test": joint})
    assert data.y_train.tolist() == [1, 0]
    column = Pairs(3)
    column.targets = np.array([[1], [0], [1]])  # type: ignore[assignment]
    assert datasets.from_objects({"train": column, "test": column}).y_train.tolist() == [1, 0, 1]
    column.targets = np.array([[1, 0], [0, 1], [1, 0]])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the labels are int64 of shape \(3, 2\)"):
        datasets.from_objects({"train": column, "test": column})


class Halves(Pairs):
    """Which gives other labels than its parent's list has, as users' own classes do."""

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return super().__getitem__(number)[0], int(number > len(self) // 2)


class Quadruples(Pairs):
    """Whose list is of more than the label, as that of torchvision's ``QMNIST``."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.labels = np.stack([self.targets, [7] * count], axis=1)
        del self.targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(png(number))), int(self.labels[number, 0])


@pytest.mark.parametrize("kind", [Halves, Quadruples])
def test_lists_of_other_labels_do_not_count(kind: type[Pairs]) -> None:
    items = kind(9)
    data = datasets.from_objects({"train": items, "test": Pairs(2)}, image_size=6)
    assert data.y_train.tolist() == [items[number][1] for number in range(9)]


def test_parts_of_a_data_set_know_its_classes() -> None:
    """As PyTorch's ``random_split`` makes them."""
    torch_data = pytest.importorskip("torch.utils.data")
    train, test = torch_data.random_split(Pairs(8), [6, 2])
    data = datasets.from_objects({"train": train, "test": torch_data.Subset(test, [1])})
    assert data.class_names == ("cat", "dog")
    assert data.y_train.tolist() == [train[number][1] for number in range(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"interpolation": "bicubic"}, "unknown interpolation 'bicubic'"),
    ],
)
def test_resizing_is_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    shard(path := tmp_path / "a.tar", range(2))
    with pytest.raises(ValueError, match=message):
        datasets.from_objects({"train": Pairs(2), "test": Pairs(2)}, **options)
    with pytest.raises(ValueError, match=message):
        datasets.load_shards(path, path, **{"image_size": 4, **options})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": Pairs(2)}, "have the parts train; expected 'train' with 'test'"),
        ({"train": Pairs(2), "tset": Pairs(2)}, "have a part 'tset'; known are train, test"),
        ({"train": iter([]), "test": Pairs(2)}, "has no items by number"),
        ([Pairs(2), Pairs(2)], "the data are a list, expected a mapping with 'train' and 'test'"),
        ({"train": [(None, 0)], "test": Pairs(2)}, "an image is a NoneType, expected a picture"),
        ({"train": [], "test": Pairs(2)}, "have no items"),
        ({"train": [{"x": 1}], "test": Pairs(2)}, "an item of the data is a dict, expected"),
        ({"train": [(np.zeros((2, 2)), 0)], "test": Pairs(2)}, "an image is float64 of shape"),
        ({"train": [(np.zeros((2, 2), "u1"), -1)] * 2, "test": Pairs(2)}, "labels go from -1 to 1"),
        ({"train": [(PIXELS, 0.5)], "test": Pairs(2)}, "nor its label: 'float' object"),
        ({"train": [(PIXELS.transpose(2, 0, 1), 0)], "test": Pairs(2)}, r"shape \(3, 5, 6\)"),
        ({"train": Pairs(2), "test": Others(2)}, "'test' has other classes .*: bird, cat"),
        ({"train": Pairs(2), "val": Pairs(2), "valid": Pairs(2)}, "of which two are one"),
    ],
)
def test_objects_that_are_no_data(data: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        datasets.from_objects(data)
