"""Packages that only some of kconv needs."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, packages: str, purpose: str) -> Any:
    """Import a module, or say what to install for it.

    Example:
        >>> require("no_such_module", "no-such-package", "the example")
        Traceback (most recent call last):
        ImportError: the example needs no_such_module, which is not installed: pip install
        no-such-package

    Args:
        module: Its name.
        packages: What pip installs it as.
        purpose: What needs it, for the error.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name:
            missing = error.name.partition(".")[0]  # may also be what the module needs itself
            named = packages if missing == top else missing
            raise ImportError(
                f"{purpose} needs {missing}, which is not installed: pip install {named}",
                name=missing,
            ) from None
        raise ImportError(f"{purpose} needs {top}, which cannot be imported: {error}") from error
