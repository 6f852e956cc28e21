"""The files of a folder or an archive: their names, and the contents of those that are wanted.

Nothing that a file says of itself is believed: what it declares is compared with what is there
before memory is taken, links are followed within the folder or archive only, and what is neither a
file nor a folder (a FIFO, a device) is left alone.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ARCHIVE_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.zst", ".tzst", ".zip"),
)
MAX_FILE_BYTES = 2**29
"""An image of as many pixels as Pillow accepts, uncompressed, with room for six bytes of each."""
MAX_FILES = 5_000_000
DEFLATE_RATIO = 1032
"""How many bytes Deflate can make of one at most."""
_MAX_HEADER_BYTES = 2**20
_MAX_LINKS = 40
"""How many links lead on to the next; as many as Linux follows."""


class Files(Protocol):
    """Files by their paths below a root ("train/cat/1.png")."""

    names: list[str]
    folders: list[str]
    """The folders, also those with no files; archives need not name all that have some."""

    def read(
        self, wanted: set[str], unread: dict[str, str] | None = None
    ) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the wanted files, in the order that is quickest to read.

        Args:
            wanted: their names.
            unread: takes what is wrong with files that cannot be read, by their names, which are
                then left out; without it the first one is an error.

        Raises:
            ValueError: one cannot be read.
        """

    def extents(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Of files of an archive, each one's first byte in it and size.

        Raises:
            ValueError: it cannot be read from any place.
        """

    def __enter__(self) -> Files: ...

    def __exit__(self, *error: object) -> None: ...


def is_archive(name: str) -> bool:
    """Whether a file's name is that of an archive.

    Example:
        >>> is_archive("pets.tar.GZ"), is_archive("pets.gz")
        (True, False)
    """
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def open_files(path: Path) -> Files:
    """The files of a folder or an archive.

    Args:
        path: A folder, or a file; one whose name ends in ``.zip`` is a zip file, others are tar
            files, compressed or not as they begin.

    Returns:
        The :class:`Files`, to be used in a ``with`` statement.

    Raises:
        ValueError: The archive cannot be read, or has files that point outside of it.
    """
    if path.is_dir():
        return _Folder(path)
    return _Zip(path) if path.name.lower().endswith(".zip") else _Tar(path)


@contextmanager
def damage(what: str) -> Iterator[None]:
    """Turn whatever the parser of a damaged file raises into one ValueError.

    Example:
        >>> with damage("x.tar is not readable"):
        ...     raise EOFError("the file is cut short")
        Traceback (most recent call last):
        ValueError: x.tar is not readable: the file is cut short

    Args:
        what: What the error begins with.

    Yields:
        Nothing.

    Raises:
        ValueError: The block raised something.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {reason}") from None


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: list[str] = []
        self.folders: list[str] = []
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while pending:
            folder, above = pending.pop()
            try:
                status = (root / folder).stat()
                entries = list(os.scandir(root / folder))
            except OSError as error:
                raise ValueError(f"{root / folder} cannot be read: {error.strerror}") from None
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link that leads back: all that is in it is listed already
                continue
            if folder:
                self.folders.append(folder)
            for entry in entries:
                name = f"{folder}/{entry.name}".removeprefix("/")
                if _is_folder(entry):
                    if not entry.name.startswith("."):
                        pending.append((name, (*above, here)))
                elif _may_be_file(entry):
                    self.names.append(name)

    def read(
        self, wanted: set[str], unread: dict[str, str] | None = None
    ) -> Iterator[tuple[str, bytes]]:
        for name in sorted(wanted.intersection(self.names)):
            try:
                data = self._content(name)
            except ValueError as error:
                _leave_out([name], error, unread)
                continue
            yield name, data

    def _content(self, name: str) -> bytes:
        path = self.root / name
        try:
            _check_size(path, name, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None

    def extents(self, names: Sequence[str]) -> list[tuple[int, int]]:
        raise ValueError(f"{self.root} is a folder, whose files are read by themselves")

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a broken link, which is an error once it is read."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


class _Member(NamedTuple):
    """Where a file lies in its archive."""

    start: int
    size: int
    handle: Any = None


class _Archive(ABC):
    """Reads from the archive itself: nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, _Member] = {}
        self._broken: dict[str, str] = {}
        self._stream: Any = None
        self.folders: list[str] = []
        links: dict[str, str] = {}
        try:
            for name, found in self._index():
                if name.startswith("/") or ".." in name.split("/"):
                    raise ValueError(f"{path} is refused: {name!r} points outside of it")
                name = posixpath.normpath(name)
                if found is None:
                    self.folders.append(name)
                elif isinstance(found, str):
                    links[name] = found
                else:
                    self._members[name] = found
                    links.pop(name, None)
                if len(self._members) + len(links) + len(self.folders) > MAX_FILES:
                    raise ValueError(f"{path} has more than {MAX_FILES:,} files")
            self._follow(links)
        except BaseException:
            self._close()
            raise
        self.names = [*self._members, *self._broken]

    @abstractmethod
    def _index(self) -> Iterable[tuple[str, _Member | str | None]]:
        """The files' members, the links' targets (from the root), and None for folders."""

    @abstractmethod
    def _content(self, member: _Member) -> bytes:
        """What is in a file; called in the order of their starts."""

    def _follow(self, links: dict[str, str]) -> None:
        """Give links to files in the archive those files' contents; others mean nothing here."""
        inside = {posixpath.dirname(name) for name in self._members} | {*self.folders}
        for name, target in links.items():
            for _ in range(_MAX_LINKS):
                if target not in links:
                    break
                target = links[target]
            if target in self._members:
                self._members[name] = self._members[target]
            elif target in inside:
                self.folders.append(name)
            else:
                self._broken[name] = target

    def read(
        self, wanted: set[str], unread: dict[str, str] | None = None
    ) -> Iterator[tuple[str, bytes]]:
        for name in sorted(wanted.intersection(self._broken)):
            self._check_link(name)
        by_start: dict[int, list[str]] = {}
        for name in wanted.intersection(self._members):
            by_start.setdefault(self._members[name].start, []).append(name)
        try:
            # In the archive's order: a compressed one cannot seek back.
            for start in sorted(by_start):
                names = sorted(by_start[start])
                member = self._members[names[0]]
                try:
                    _check_size(self.path, names[0], member.size)
                    with damage(f"{self.path}: {names[0]} cannot be read"):
                        data = self._content(member)
                except ValueError as error:
                    _leave_out(names, error, unread)
                    continue
                for name in names:
                    yield name, data
        finally:
            self._close()

    def extents(self, names: Sequence[str]) -> list[tuple[int, int]]:
        raise ValueError(
            f"{self.path} cannot be read from any place, as folders and tar files that are not "
            "compressed can: unpack it to stream its images"
        )

    def _check_link(self, name: str) -> None:
        if name in self._broken:
            raise ValueError(
                f"{self.path} is refused: {name!r} is neither a file nor a folder in it, but a "
                f"link to {self._broken[name]!r}"
            )

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()


def _leave_out(names: Sequence[str], error: ValueError, unread: dict[str, str] | None) -> None:
    """Note what is wrong with files, or raise it where nobody takes it."""
    if unread is None:
        raise error
    unread |= dict.fromkeys(names, str(error))


def _check_size(path: Path, name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: {name} has {size:,} bytes; expected at most {MAX_FILE_BYTES:,} in a file"
        )


class _Header(tarfile.TarInfo):
    """A member's header; tarfile takes one that is damaged for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):  # a block of zeros, with which archives end
                raise
            raise tarfile.ReadError(f"{error}, where a file or the end should be") from None
        # What stands before a file is read at once: long names, times, and the like.
        before = not (header.isfile() or header.type in _WITHOUT_CONTENT)
        if header.size < 0 or (before and header.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


_WITHOUT_CONTENT = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
)


class _Tar(_Archive):
    def _index(self) -> Iterator[tuple[str, _Member | str | None]]:
        with damage(f"{self.path} is not a readable tar file"):
            self._stream = _decompressed(self.path)
            self._plain = isinstance(self._stream, io.BufferedReader)
            tar = tarfile.TarFile(fileobj=self._stream, mode="r", tarinfo=_Header)
        # Where there is no first member, Python 3.10 fails on looking for the next.
        more = tar.firstmember is not None  # type: ignore[attr-defined]
        while more:
            with damage(f"{self.path} is not a readable tar file"):
                member = tar.next()
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
            if member is None:
                break
            if member.issym():
                below = posixpath.dirname(member.name)
                yield member.name, posixpath.normpath(posixpath.join(below, member.linkname))
            elif member.islnk():
                yield member.name, posixpath.normpath(member.linkname)
            elif member.isdir():
                yield member.name, None
            elif member.isfile():
                yield member.name, _Member(member.offset_data, member.size, member.sparse)
        with damage(f"{self.path} is not a readable tar file"):
            while self._stream.read(2**20):  # the checksum stands at the end
                pass
        self._close()

    def _content(self, member: _Member) -> bytes:
        if self._stream is None:
            self._stream = _decompressed(self.path)
        self._stream.seek(member.start)
        if member.handle is None:
            return self._read(member.size)
        # Of a sparse file there are some pieces only; between them are zeros.
        data = bytearray(member.size)
        for start, size in member.handle:
            if not 0 <= start <= start + size <= member.size:
                raise ValueError("a piece of it lies beyond its end")
            data[start : start + size] = self._read(size)
        return bytes(data)

    def extents(self, names: Sequence[str]) -> list[tuple[int, int]]:
        if not self._plain or any(
            self._members[name].handle is not None for name in names if name in self._members
        ):
            return super().extents(names)  # which says that it cannot be done
        found = []
        for name in names:
            self._check_link(name)
            member = self._members[name]
            _check_size(self.path, name, member.size)
            found.append((member.start, member.size))
        return found

    def _read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if len(data) != size:
            raise ValueError("the archive is cut short")
        return data


def _decompressed(path: Path) -> Any:
    """A tar file's own bytes; whether they are compressed is told by how the file begins."""
    with path.open("rb") as file:
        start = file.read(6)
    for magic, opened in (
        (b"\x1f\x8b", gzip.open),
        (b"BZh", bz2.open),
        (b"\xfd7zXZ\0", lzma.open),
        (b"\x28\xb5\x2f\xfd", _open_zstd),
    ):
        if start.startswith(magic):
            return opened(path)
    return path.open("rb")


def _open_zstd(path: Path) -> Any:
    """Python has Zstandard since 3.14; two packages offer it to others."""
    for module in ("compression.zstd", "backports.zstd"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(module).open(path)
    with suppress(ModuleNotFoundError):
        decompressor = importlib.import_module("zstandard").ZstdDecompressor()
        return decompressor.stream_reader(path.open("rb"), read_across_frames=True)
    raise ImportError(
        f"{path} needs backports.zstd, which is not installed: pip install backports.zstd"
    )


class _Zip(_Archive):
    def _index(self) -> Iterator[tuple[str, _Member | str | None]]:
        with damage(f"{self.path} is not a readable zip file"):
            self._stream = zipfile.ZipFile(self.path)
            self._archive_size = self.path.stat().st_size
        for info in self._stream.infolist():
            name = info.filename.replace("\\", "/")  # which some programs of Windows write
            kind = stat.S_IFMT(info.external_attr >> 16)
            member = _Member(info.header_offset, info.file_size, info)
            if name.endswith("/") or kind == stat.S_IFDIR:
                yield name, None
            elif kind == stat.S_IFLNK:
                with damage(f"{self.path}: {name} cannot be read"):
                    if info.file_size > _MAX_HEADER_BYTES:
                        raise ValueError(f"a link of {info.file_size:,} bytes")
                    target = self._content(member).decode()
                yield name, posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            elif kind in (0, stat.S_IFREG):
                yield name, member

    def _content(self, member: _Member) -> bytes:
        info: zipfile.ZipInfo = member.handle
        if self._stream is None:
            self._stream = zipfile.ZipFile(self.path)
        check_member(info, self._archive_size)
        data: bytes = self._stream.read(info)
        return data


def check_member(info: zipfile.ZipInfo, archive_size: int) -> None:
    """Compare the sizes that a zip file's directory declares with what can be there.

    Args:
        info: The member.
        archive_size: Of the zip file, in bytes.

    Raises:
        ValueError: The member cannot be that large.
    """
    most = info.compress_size
    if info.compress_type == zipfile.ZIP_DEFLATED:
        most *= DEFLATE_RATIO
    elif info.compress_type != zipfile.ZIP_STORED:
        most = MAX_FILE_BYTES
    if info.compress_size > archive_size or info.file_size > most:
        raise ValueError(
            f"it declares {info.file_size:,} bytes, of which the archive has {info.compress_size:,}"
        )
