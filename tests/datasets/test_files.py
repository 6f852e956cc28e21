"""Folders and archives: links, odd names, sizes that are declared but not there, damage."""

from __future__ import annotations

import importlib
import io
import os
import stat
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kconv import datasets
from kconv.datasets import files as files_module
from kconv.datasets.files import open_files

Files = dict[str, bytes]
Links = dict[str, tuple[bytes, str]]
"""Types and targets by name."""


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> Files:
    """Every picture has a shade of its own."""
    names = [f"{p}/{c}/{i}.png" for p in ("train", "test") for c in ("cat", "dog") for i in (0, 1)]
    return {name: png(10 * number) for number, name in enumerate(names)}


def shades(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def write_folder(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: Files, mode: str = "w", links: Links | None = None) -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def write_zip(path: Path, files: Files, links: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is: the constructor would mend backslashes on Windows
            archive.writestr(info, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return path


# Folders


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "a", pictures())
    elsewhere = write_folder(tmp_path / "b", {"emus/1.png": png(200), "emus/2.png": png(201)})
    for part in ("train", "test"):
        (root / part / "emu").symlink_to(elsewhere / "emus")
    (root / "train/cat/loop").symlink_to("../..")
    (root / "train/cat/self").symlink_to("self")
    (root / "train/dog/5.png").symlink_to("1.png")
    data = datasets.load(root)
    assert data.class_names == ("cat", "dog", "emu")
    assert shades(data.x_train) == [0, 10, 20, 30, 30, 200, 201]
    assert data.y_test.tolist() == [0, 0, 1, 1, 2, 2]


def test_broken_links_are_errors_and_fifos_are_not_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path, pictures())
    os.mkfifo(root / "train/cat/fifo.png")
    assert len(datasets.load(root).x_train) == 4
    (root / "train/cat/gone.png").symlink_to("nothing.png")
    with pytest.raises(ValueError, match=r"train/cat/gone\.png cannot be read: No such file"):
        datasets.load(root)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path, pictures())
    with (root / "train/cat/hole.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"hole\.png has 1,099,511,627,776 bytes; expected at mo"):
        datasets.load(root)


# Tar


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_tar_files(tmp_path: Path, mode: str) -> None:
    links = {
        "train/cat/hard.png": (tarfile.LNKTYPE, "./train/cat/0.png"),
        "train/dog/soft.png": (tarfile.SYMTYPE, "../cat/hard.png"),
        "etc": (tarfile.SYMTYPE, "/etc"),
        "latest": (tarfile.SYMTYPE, "train"),
        "notes.txt": (tarfile.SYMTYPE, "../../notes.txt"),
        "pipe": (tarfile.FIFOTYPE, ""),
    }
    data = datasets.load(write_tar(tmp_path / "x.tar", pictures(), mode, links))
    assert shades(data.x_train) == [0, 10, 0, 20, 30, 0]
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd", "link.png", "9.png"])
def test_links_out_of_archives_are_refused(tmp_path: Path, target: str) -> None:
    name = "train/cat/link.png"
    tar = write_tar(tmp_path / "x.tar", pictures(), links={name: (tarfile.SYMTYPE, target)})
    archive = write_zip(tmp_path / "x.zip", pictures(), {name: target})
    for path in (tar, archive):
        with pytest.raises(ValueError, match=r"link\.png' is neither a file nor a folder in it"):
            datasets.load(path)


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tbz2", "w:bz2"), (".TGZ", "w:gz"), (".Tar.XZ", "w:xz"), (".tgz", "w")]
)
def test_suffixes_of_any_case_and_compression_by_content(
    tmp_path: Path, suffix: str, mode: str
) -> None:
    data = datasets.load(write_tar(tmp_path / f"x{suffix}", pictures(), mode))
    assert shades(data.x_test) == [40, 50, 60, 70]


@pytest.mark.parametrize("module", ["backports.zstd", "zstandard"])
def test_tar_zst(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = pytest.importorskip(module).compress
    real = importlib.import_module

    def only_this(name: str) -> object:
        if "zst" in name and name != module:
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr(files_module.importlib, "import_module", only_this)
    tar = write_tar(tmp_path / "x.tar", pictures()).read_bytes()
    path = tmp_path / "x.tar.zst"
    path.write_bytes(compress(tar[:3000]) + compress(tar[3000:]))  # two frames
    assert shades(datasets.load(path).x_train) == [0, 10, 20, 30]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.tar\.zst is not a readable tar file"):
        datasets.load(path)


def test_tar_zst_without_a_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(files_module.importlib, "import_module", missing)
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ImportError, match=r"needs backports\.zstd, .*: pip install backports"):
        datasets.load(tmp_path / "x.tar.zst")


def headers(archive: bytes) -> list[int]:
    starts, start = [], 0
    while any(archive[start : start + 512]):
        starts.append(start)
        start += 1024  # the pictures are shorter than a block
    return starts


def test_no_damaged_header_passes_for_the_end(tmp_path: Path) -> None:
    """tarfile would take the files before it for the whole archive."""
    whole = write_tar(tmp_path / "x.tar", pictures()).read_bytes()
    assert len(headers(whole)) == 8
    for start in headers(whole):
        for content in (whole[: start + 7] + b"?" + whole[start + 8 :], whole[:start]):
            (tmp_path / "x.tar").write_bytes(content)
            with pytest.raises(ValueError, match=r"x\.tar is not a readable tar file"):
                datasets.load(tmp_path / "x.tar")


def test_declared_sizes_in_tar_files_are_not_believed(tmp_path: Path) -> None:
    member = tarfile.TarInfo("train/cat/9.png")
    member.size = 2**50
    whole = write_tar(tmp_path / "x.tar", pictures()).read_bytes()
    end = 1024 * len(headers(whole))
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        member.type = kind
        header = member.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "x.tar").write_bytes(whole[:end] + header + whole[end:])
        with pytest.raises(ValueError, match=r"x\.tar is not a readable tar file"):
            datasets.load(tmp_path / "x.tar")


def sparse(whole: bytes, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """An archive with one more picture, sparse as GNU tar writes it."""
    stored = b"".join(piece for _, piece in pieces)
    member = tarfile.TarInfo("train/cat/9.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(stored)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    places = [(start, len(piece)) for start, piece in pieces] + [(size, 0)]
    for number, place in enumerate(places):
        header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % place
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    end = 1024 * len(headers(whole))
    return whole[:end] + header + stored + bytes(-len(stored) % 512) + whole[end:]


def test_sparse_files_in_tar_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (99, 0, 0)).save(buffer, "BMP")
    bmp = buffer.getvalue()
    path = write_tar(tmp_path / "x.tar", pictures())
    whole = path.read_bytes()
    path.write_bytes(sparse(whole, [(0, bmp[:54]), (54, bmp[54:])], len(bmp) + 10_000))
    assert shades(datasets.load(path).x_train) == [0, 10, 99, 20, 30]
    path.write_bytes(sparse(whole, [(0, bmp[:54]), (9000, bmp[54:])], len(bmp)))
    with pytest.raises(ValueError, match=r"9\.png cannot be read: a piece of it lies beyond"):
        datasets.load(path)
    path.write_bytes(sparse(whole, [], 2**33 - 1))  # of which there are no bytes
    with pytest.raises(ValueError, match=r"9\.png has 8,589,934,591 bytes; expected at most"):
        datasets.load(path)


# Zip


def test_names_in_zip_files(tmp_path: Path) -> None:
    expected = [0, 10, 20, 30]
    for change in (
        lambda name: f"./{name}",
        lambda name: name.replace("/", "\\"),
        lambda name: f"pets//{name}",
    ):
        path = write_zip(tmp_path / "x.ZIP", {change(n): d for n, d in pictures().items()})
        assert shades(datasets.load(path).x_train) == expected
    of_a_mac = {"__MACOSX/._train": b"", "__MACOSX/train/": b"", "__MACOSX/train/cat/._0.png": b""}
    path = write_zip(tmp_path / "mac.zip", pictures() | of_a_mac)
    assert shades(datasets.load(path).x_train) == expected


def test_links_in_zip_files(tmp_path: Path) -> None:
    links = {"train/dog/5.png": "../cat/1.png", "readme": "/usr/share/readme"}
    data = datasets.load(write_zip(tmp_path / "x.zip", pictures(), links))
    assert shades(data.x_train) == [0, 10, 20, 30, 10]


@pytest.mark.parametrize("declared", [2**24, 2**31])
def test_declared_sizes_in_zip_files_are_not_believed(tmp_path: Path, declared: int) -> None:
    path = write_zip(tmp_path / "x.zip", pictures())
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")  # the first file's entry in the directory
    content[at + 24 : at + 28] = struct.pack("<I", declared)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.png (has 2,147,|cannot be read: it declares 16,7)"):
        datasets.load(path)


def test_archives_do_not_stay_open(tmp_path: Path) -> None:
    good = {".tar": write_tar, ".zip": write_zip}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for suffix, write in good.items():
            path = write(tmp_path / f"x{suffix}", pictures())
            datasets.load(path)
            write(path, pictures() | {"../x.png": b""})
            with pytest.raises(ValueError, match="points outside of it"):
                datasets.load(path)
            write(path, pictures() | {"train/cat/0.png": b"broken"})
            with pytest.raises(ValueError, match="is not a readable image"):
                datasets.load(path)
    opened = {file.resolve() for file in Path("/proc/self/fd").iterdir()}
    assert not opened.intersection(tmp_path.iterdir())


# Damage


def write_gzipped(path: Path, files: Files) -> Path:
    return write_tar(path, files, "w:gz")


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".tar", write_tar), (".tar.gz", write_gzipped), (".zip", write_zip)],
)
def test_random_damage(tmp_path: Path, suffix: str, write: Callable[[Path, Files], Path]) -> None:
    """Some of it stays without effect; the rest is a ValueError, and no picture is another's."""
    path = write(tmp_path / f"x{suffix}", {name: bytes(99) + name.encode() for name in pictures()})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        if rng.random() < 0.2:
            del content[rng.integers(len(content)) :]
        else:
            for position in rng.integers(0, len(content), rng.integers(1, 4)):
                content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            with open_files(path) as files:
                for _name, data in files.read(set(files.names)):
                    assert len(data) <= 2**20
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30
