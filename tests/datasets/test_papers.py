"""The papers' photographs, from small copies of what their authors publish."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kconv import cli, datasets

Files = dict[str, bytes]


def image(shade: int, kind: str = "JPEG", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def pets() -> Files:
    """Two breeds, whose classes are 1 and 2; one that is only tested is 11."""
    files = {"annotations/README": b"", "annotations/trimaps/Abyssinian_1.png": image(9, "PNG")}
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, breed, part in (
        *((i, "Abyssinian", "trainval" if i < 4 else "test") for i in range(1, 6)),
        *((i, "american_bulldog", "trainval" if i < 3 else "test") for i in range(1, 4)),
        (100, "chihuahua", "test"),
    ):
        class_number = {"Abyssinian": 1, "american_bulldog": 2, "chihuahua": 11}[breed]
        lists[part].insert(0, f"{breed}_{number} {class_number} 1 1")
        files[f"images/{breed}_{number}.jpg"] = image(20 * number if number < 9 else 200)
        files[f"images/._{breed}_{number}.jpg"] = b"of a Mac"
    files["images/Abyssinian_9.mat"] = b"MATLAB"
    for part, lines in lists.items():
        files[f"annotations/{part}.txt"] = "\n".join(["#Image CLASS-ID", *lines, ""]).encode()
    return files


def plantdoc() -> Files:
    """The third class has training images only, as one of the published has."""
    files = {"README.md": b"", "PlantDoc_Examples.png": image(0, "PNG")}
    for part, count in (("train", 3), ("test", 2)):
        for label, plant in enumerate(("Apple Scab Leaf", "Bell_pepper leaf", "Tomato mites leaf")):
            if (part, label) != ("test", 2):
                for i in range(count):
                    name = f"{part}/{plant}/show.asp?id={i}&w=420.jpg"
                    files[name] = image(80 * label + 20 * i)
    return files


TISSUES = "tumor stroma complex lympho debris mucosa adipose empty".split()


def histology() -> Files:
    return {
        f"{label + 1:02}_{tissue.upper()}/1{i}_CRC-Prim_Row_{i}_Col_1.tif": image(
            30 * label + i, "TIFF"
        )
        for label, tissue in enumerate(TISSUES)
        for i in range(5)
    }


def cells() -> Files:
    files = {f"{c}/Thumbs.db": b"Windows" for c in ("Parasitized", "Uninfected")}
    for label, c in enumerate(("Parasitized", "Uninfected")):
        for i in range(10):
            files[f"{c}/C{i}_cell_{i}.png"] = image(100 * label + i, "PNG", (9 + i, 11))
    return files


def malaria() -> Files:
    """With the copy of all that one mirror has inside."""
    return cells() | {f"cell_images/{name}": data for name, data in cells().items()}


LAYOUTS: dict[str, tuple[Callable[[], Files], str]] = {
    "oxford_iiit_pet": (pets, ""),
    "cropped_plantdoc": (plantdoc, "PlantDoc-Dataset-master/"),
    "colorectal_histology": (histology, "Kather_texture_2016_image_tiles_5000/"),
    "malaria": (malaria, "cell_images/"),
}


def write(root: Path, files: Files, prefix: str = "") -> Path:
    for name, data in files.items():
        path = root / (prefix + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_archives(root: Path, files: Files, prefix: str) -> Path:
    """What the authors' sites offer: a zip file of all, or two tar files of the pets."""
    root.mkdir()
    if prefix:
        with zipfile.ZipFile(root / f"{prefix.rstrip('/')}.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(prefix + name, data)
        return root
    for part in ("images", "annotations"):
        with tarfile.open(root / f"{part}.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                if name.startswith(part):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def shades(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_pets_follow_the_authors_lists(tmp_path: Path) -> None:
    data = datasets.load("oxford_iiit_pet", data_dir=write(tmp_path, pets()), image_size=8)
    assert data.class_names == ("Abyssinian", "american_bulldog", "chihuahua")
    assert data.y_train.tolist() == [0, 0, 0, 1, 1]
    assert shades(data.x_train) == pytest.approx([60, 40, 20, 40, 20], abs=2)
    assert data.y_test.tolist() == [0, 0, 1, 2]
    assert shades(data.x_test) == pytest.approx([100, 80, 60, 200], abs=2)


def test_plantdoc_keeps_classes_without_test_images(tmp_path: Path) -> None:
    data = datasets.load("cropped_plantdoc", data_dir=write(tmp_path, plantdoc()), image_size=8)
    assert data.class_names == ("Apple Scab Leaf", "Bell_pepper leaf", "Tomato mites leaf")
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.y_test.tolist() == [0, 0, 1, 1]
    assert shades(data.x_test) == pytest.approx([0, 20, 80, 100], abs=2)


def test_histology_holds_a_fifth_of_each_tissue_back(tmp_path: Path) -> None:
    folder = write(tmp_path, histology(), "Kather_texture_2016_image_tiles_5000/")
    data = datasets.load("colorectal_histology", data_dir=folder, image_size=8)
    assert list(data.class_names) == TISSUES
    assert np.bincount(data.y_train).tolist() == [4] * 8
    assert data.y_test.tolist() == list(range(8))
    assert [shade // 30 for shade in shades(data.x_test)] == list(range(8))


def test_malaria_counts_no_image_twice(tmp_path: Path) -> None:
    folder = write(tmp_path, malaria(), "cell_images/")
    data = datasets.load("malaria", data_dir=folder, test_images=2, image_size=8)
    assert data.class_names == ("parasitized", "uninfected")
    assert np.bincount(data.y_train).tolist() == [8, 8]
    assert len(set(shades(data.x_train))) == 16
    assert [shade // 100 for shade in shades(data.x_test)] == [0, 1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_and_archives_are_alike(name: str, tmp_path: Path) -> None:
    make, prefix = LAYOUTS[name]
    places = {
        "plain": write(tmp_path / "plain", make()),
        "named": write(tmp_path / "named", make(), prefix),
        "archives": write_archives(tmp_path / "archives", make(), prefix),
    }
    if prefix:
        places["file"] = next(places["archives"].iterdir())
    loaded = {place: datasets.load(name, data_dir=path) for place, path in places.items()}
    expected = loaded.pop("plain")
    assert expected.image_shape == (224, 224, 3)
    for place, data in loaded.items():
        assert data.class_names == expected.class_names
        for array in ("x_train", "y_train", "x_test", "y_test"):
            np.testing.assert_array_equal(getattr(data, array), getattr(expected, array), place)


def without(files: Files, part: str) -> Files:
    return {name: data for name, data in files.items() if part not in name}


BAD_LAYOUTS: list[tuple[str, Files, str]] = [
    *((name, {"other/cat.png": image(0)}, f"{LAYOUTS[name][1][:-1]}") for name in LAYOUTS),
    ("oxford_iiit_pet", without(pets(), "annotations/"), "neither annotations/ nor annotations"),
    ("oxford_iiit_pet", without(pets(), "test.txt"), "annotations has no test.txt"),
    ("oxford_iiit_pet", without(pets(), "images/american_bulldog_2."), "has no american_bulldog_2"),
    ("oxford_iiit_pet", pets() | {"annotations/test.txt": b"cat 1"}, "has the line 'cat 1'"),
    ("oxford_iiit_pet", pets() | {"annotations/test.txt": b"#"}, "has no images to test with"),
    ("cropped_plantdoc", without(plantdoc(), "test/"), "no folder test/; expected train/<class>/"),
    ("colorectal_histology", without(histology(), "LYMPHO"), "has no folder 04_LYMPHO/; expected"),
    ("malaria", without(cells(), "Uninfected/C"), "class 'uninfected' has no images"),
    ("malaria", cells() | {"Parasitized/C0_cell_0.png": b""}, "C0_cell_0.png is not a readable"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "files", "message"), BAD_LAYOUTS)
def test_bad_layouts_are_refused(name: str, files: Files, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        datasets.load(name, data_dir=write(tmp_path / "data", files))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_folders_say_where_the_data_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is not downloaded: give data_dir.*https://"):
        datasets.load(name)
    with pytest.raises(ValueError, match=f"{name} is not at .*absent: expected"):
        datasets.load(name, data_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable zip file"),
        (None, "cell_0.png cannot be read"),
    ],
)
def test_damaged_zip_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = next(write_archives(tmp_path / "x", malaria(), "cell_images/").iterdir())
    if content is None:
        whole = path.read_bytes()
        start = whole.index(b"\x89PNG")
        content = whole[:start] + bytes(8) + whole[start + 8 :]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load("malaria", data_dir=path)


def test_zip_that_points_outside_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../train/cat/1.png", image(0))
    with pytest.raises(ValueError, match="points outside of it"):
        datasets.load(tmp_path / "x.zip")


def test_nearest_repeats_pixels() -> None:
    small = datasets.load("fashion_mnist_mini", train_images=10, test_images=10)
    large = datasets.load(
        "fashion_mnist_mini",
        train_images=10,
        test_images=10,
        image_size=7 * 28,
        interpolation="nearest",
    )
    np.testing.assert_array_equal(large.x_train, small.x_train.repeat(7, 1).repeat(7, 2))
    with pytest.raises(ValueError, match="unknown interpolation 'cubic': known are bilinear"):
        datasets.load("fashion_mnist_mini", interpolation="cubic")


def test_training_on_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", malaria())
    options = (
        "--framework torch --model kmobilenet --ktype D6_4ch --model-option alpha=0.125 --epochs 1"
    )
    run = ["--batch-size", "7", "--image-size", "16", "--output", str(tmp_path / "run")]
    where = ["--dataset", "malaria", "--data-dir", str(data)]
    assert cli.main(["train", *options.split(), *run, *where]) == 0
    output = capsys.readouterr().out
    assert "malaria: 14 training, 2 validation and 4 test images (16, 16, 3)" in output
    assert "parasitized" in (tmp_path / "run/report.txt").read_text()
