"""What a file is, by its structure, and what weights it holds."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from kconv.weights._entries import Entry
from kconv.weights._keras_file import KerasFile, read_hdf5
from kconv.weights._models import METADATA, Source, is_state
from kconv.weights._safetensors import npz_entries, safetensors_entries, safetensors_header
from kconv.weights._torch_file import Tensor, Unreadable, entry, read_legacy, read_zip

__all__ = ["Candidate", "TorchFile", "described", "read"]


@dataclass(frozen=True)
class Candidate:
    """Weights by PyTorch's names, one of perhaps several such in a file.

    Attributes:
        taken: the keys that lead to them in the file.
        sources: the weights.
    """

    taken: tuple[str, ...]
    sources: dict[str, Source]


@dataclass(frozen=True)
class TorchFile:
    """A file with PyTorch's names and layouts.

    Attributes:
        format: what it is, in words.
        candidates: at least one, best first.
    """

    format: str
    candidates: list[Candidate]


def read(path: Path, stack: ExitStack, room: int) -> TorchFile | KerasFile:
    """Read the headers of a file or a folder.

    Args:
        path: where it is.
        stack: what keeps files open until the values have been read.
        room: bytes that a compressed part may have which is read at once.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is damaged, or holds no weights.
        ImportError: if the library that reads the format is missing.
    """
    mode = path.stat().st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ValueError(f"{path} is neither a file nor a folder")
    if stat.S_ISREG(mode):
        with path.open("rb"):  # for the operating system's own error
            pass
    try:
        if stat.S_ISDIR(mode):
            return _read_folder(path, stack, room)
        return _read_file(path, stack, room)
    except ImportError:
        raise
    except Exception as error:  # whatever a library says of a damaged file
        reason = described(error)
        raise ValueError(f"{path} is damaged, or holds no model's weights: {reason}") from error


def described(error: Exception) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__} {text}"


# Of Hugging Face's folders, whose first is used that is there; and of an unpacked .keras archive.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "model.weights.h5",
    "model.weights.json",
)


def _read_folder(path: Path, stack: ExitStack, room: int) -> TorchFile | KerasFile:
    names = [name for name in _IN_FOLDERS if (path / name).is_file()]
    if not names:
        raise ValueError(f"the folder has none of {', '.join(_IN_FOLDERS)}")
    config = None
    if names[0].startswith("model.weights") and (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_bytes())
    return _read_file(path / names[0], stack, room, config)


def _read_file(
    path: Path, stack: ExitStack, room: int, config: Any = None
) -> TorchFile | KerasFile:
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_hdf5([(_hdf5(path, stack), path.stat().st_size)], config)
    damage: ValueError | None = None
    try:
        header = safetensors_header(path)
    except ValueError as error:  # the length may look like the beginning of other formats
        header, damage = None, error
    if header is not None:
        entries, metadata = safetensors_entries(path, header)
        return TorchFile("safetensors", [Candidate((), _sources(entries, metadata))])
    if zipfile.is_zipfile(path) or head.startswith(b"PK"):
        return _read_zip(stack.enter_context(zipfile.ZipFile(path)), stack, room)
    if damage is not None:
        raise damage
    if head.startswith(b"\x80"):
        return _checkpoint(read_legacy(path))
    if head.lstrip()[:1] == b"{":
        return _read_index(path, stack, room, config)
    raise ValueError(
        "it is neither HDF5, .keras, a PyTorch checkpoint, safetensors, .npz nor an index of "
        f"shards, but begins with {head!r}"
    )


def _part(archive: zipfile.ZipFile, name: str, room: int) -> bytes:
    """A part of an archive, unless it is compressed and larger than a model's needs to be."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED and info.file_size > room:
        raise ValueError(f"its part {name!r} has {info.file_size} bytes, too many for this model")
    return archive.read(info)


def _hdf5(file: Path | BytesIO, stack: ExitStack) -> Any:
    import h5py

    return stack.enter_context(h5py.File(file, "r"))


def _read_zip(archive: zipfile.ZipFile, stack: ExitStack, room: int) -> TorchFile | KerasFile:
    infos = archive.infolist()
    names = {info.filename for info in infos}
    if len(names) < len(infos):
        raise ValueError("it has two parts of one name")
    if "config.json" in names and "model.weights.h5" in names:
        config = json.loads(_part(archive, "config.json", room))
        content = _part(archive, "model.weights.h5", room)
        return read_hdf5([(_hdf5(BytesIO(content), stack), len(content))], config)
    pickled = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if pickled:
        name = min(pickled, key=len)
        folder = name.removesuffix("data.pkl")
        if any(other.startswith(f"{folder}code/") for other in names):
            raise ValueError(
                "it is a TorchScript program: save its module's state_dict() with torch.save"
            )
        return _checkpoint(read_zip(archive, name))
    if names and all(name.endswith(".npy") for name in names):
        return TorchFile("npz", [Candidate((), _sources(npz_entries(archive), {}))])
    raise ValueError("it is a zip archive, but neither .keras, of torch.save nor .npz")


# Shards.


def _read_index(path: Path, stack: ExitStack, room: int, config: Any) -> TorchFile | KerasFile:
    """Hugging Face's and Keras's indices: which weight is in which file of the same folder."""
    index = json.loads(path.read_bytes())
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map, which indices of shards have")
    names: dict[str, None] = {}
    for value in places.values():
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"it refers to {name!r}, no file of its own folder")
            names[name] = None
    for name in names:
        if not (path.parent / name).is_file():
            raise ValueError(f"its shard {name!r} is missing")
    paths = [path.parent / name for name in names]
    with paths[0].open("rb") as file:
        is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if is_hdf5:
        return read_hdf5([(_hdf5(p, stack), p.stat().st_size) for p in paths], config)
    sources: dict[str, Source] = {}
    kind = ""
    for shard in paths:
        part = _read_file(shard, stack, room)
        if not isinstance(part, TorchFile):
            raise ValueError(f"its shard {shard.name!r} is of another format")
        found = part.candidates[0].sources
        if twice := found.keys() & sources.keys():
            raise ValueError(f"{min(twice)!r} is in two of its shards")
        sources.update(found)
        kind = part.format
    if sources.keys() != places.keys():
        differing = sorted(sources.keys() ^ places.keys())
        raise ValueError(f"index and shards do not agree on {differing[0]!r}")
    return TorchFile(f"{kind}, {len(paths)} shards", [Candidate((), sources)])


# Checkpoints of PyTorch.


def _sources(entries: dict[str, Entry], metadata: dict[str, str]) -> dict[str, Source]:
    sources = {name: Source(item.shape, item.read) for name, item in entries.items()}
    states = json.loads(metadata.get(METADATA, "{}"))
    if not isinstance(states, dict) or states.keys() & entries.keys():
        raise ValueError("its metadata's states are damaged")
    for name, value in states.items():
        sources[name] = Source(None, _constant(value))
    return sources


def _constant(value: Any) -> Any:
    return lambda: value


# Averages first, as timm takes them: they are what a trainer evaluates.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
_PREFERRED = (*_AVERAGES, "state_dict", "model_state_dict", "model", "model_state", "net")
_DEPTH = 3


def _checkpoint(root: Any) -> TorchFile:
    if isinstance(root, Unreadable):
        raise ValueError(
            f"it is a pickled {root.described}, which only running its code could read: "
            "save model.state_dict() instead"
        )
    found = list(_state_dicts(root, (), set()))
    if not found:
        modules = [
            f"{key!r} is a pickled {value.described}"
            for key, value in (root.items() if isinstance(root, dict) else ())
            if isinstance(value, Unreadable) and key in _PREFERRED
        ]
        raise ValueError(
            f"{modules[0]}, which only running its code could read: save its state_dict() instead"
            if modules
            else f"it holds a {type(root).__name__.lstrip('_').lower()} without a state_dict of "
            "tensors"
        )

    def rank(item: tuple[tuple[str, ...], Any]) -> tuple[int, ...]:
        known = (_PREFERRED.index(k) if k in _PREFERRED else len(_PREFERRED) for k in item[0])
        return (*known,)

    found.sort(key=rank)
    candidates = [
        Candidate(keys, {name: _tensor_source(name, value) for name, value in state.items()})
        for keys, state in found
    ]
    return TorchFile("a PyTorch checkpoint", candidates)


def _tensor_source(name: str, value: Any) -> Source:
    if isinstance(value, Tensor):
        item = entry(value)
        return Source(item.shape, item.read)
    return Source(None, lambda: _state(name, value))


def _state(name: str, value: Any) -> Any:
    """A state beside the tensors, with arrays in the place of its tensors."""
    if isinstance(value, Tensor):
        return entry(value).read()
    if isinstance(value, Unreadable):
        raise ValueError(f"{name!r} holds a {value.described}, which only running code could make")
    if isinstance(value, dict):
        return {key: _state(name, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_state(name, item) for item in value)
    return value


def _state_dicts(
    value: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The mappings of tensors in a checkpoint, each once, with the keys that lead to it."""
    if not isinstance(value, dict) or id(value) in seen or len(keys) > _DEPTH:
        return
    seen.add(id(value))
    if not all(isinstance(key, str) for key in value):
        return
    if all(_belongs(key, item) for key, item in value.items()):
        if value or not keys:
            yield keys, value
        return
    if "param_groups" in value:  # an optimizer
        return
    for key, item in value.items():
        yield from _state_dicts(item, (*keys, key), seen)


def _belongs(name: str, value: Any) -> bool:
    if isinstance(value, Unreadable):
        return value.described.startswith("torch._utils._rebuild")  # a sparse tensor, for example
    return isinstance(value, Tensor) or is_state(name)
