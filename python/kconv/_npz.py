"""NumPy's .npz files, whose declared sizes are checked before memory is taken."""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv.datasets.files import check_member, damage


def read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read all arrays of a file that ``numpy.savez`` or ``numpy.savez_compressed`` wrote.

    Args:
        path: The file.

    Returns:
        The arrays by their names; they own their memory.

    Raises:
        ValueError: It is no such file, is damaged, or has arrays of objects or records.
        OSError: It cannot be opened.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        with (
            damage(f"{os.fspath(path)} is not an .npz file, or is damaged"),
            zipfile.ZipFile(file) as archive,
        ):
            return {
                info.filename.removesuffix(".npy"): _read_array(archive, info, size)
                for info in archive.infolist()
            }


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> NDArray[Any]:
    check_member(info, size)
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
        else:
            raise ValueError(f"{info.filename} is of version {version}")
        if dtype.hasobject or dtype.names or dtype.subdtype:
            raise ValueError(f"{info.filename} holds {dtype}, not numbers")
        count = math.prod(shape)
        if member.tell() + count * dtype.itemsize != info.file_size or count < 0:
            raise ValueError(
                f"{info.filename} declares {shape} of {dtype}, which its {info.file_size:,} bytes "
                "are not"
            )
        data = bytearray(member.read())  # which compares the checksum
        array: NDArray[Any] = np.frombuffer(data, dtype, count)
    return array.reshape(shape, order="F" if fortran else "C")
