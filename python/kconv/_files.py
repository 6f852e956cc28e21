"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes the path's place once it is written whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "a.txt"
        ...     with replacing(target) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     target.read_text()
        'whole'

    Args:
        path: The file to make or replace.

    Yields:
        The temporary file's path; it has the same suffix.

    Raises:
        OSError: It could not be written; the old file is still there.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # else a crash may leave the new name with no contents
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # h5py and torch report a full disk as RuntimeError
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of :func:`replacing` from a folder to which nobody else writes.

    A process that was killed has left them.
    """
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+\.partial(\.[^.]*)?", path.name):
            path.unlink(missing_ok=True)
