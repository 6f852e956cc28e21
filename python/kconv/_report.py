"""What a conversion did to a model: the same report for every framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What a conversion changed in a model, what it left, and why.

    ``str(report)`` is a table. A layer that the conversion is not about, such as a 5x5 convolution
    that ``compress`` meets, is in neither list.

    Example:
        >>> print(Report("compress", {"head": "KPointwiseConv2d"}, {"stem": "it has hooks"}))
        compress: 1 changed, 1 kept
          changed  head  KPointwiseConv2d
          kept     stem  it has hooks

    Attributes:
        action: the function that made the model what it is.
        changed: what each changed layer has become, by its name in the model ("" is the model).
        kept: why a layer stayed as it was, by its name.
    """

    action: Literal["accelerate", "compress", "fuse", "restore", "to_native"]
    changed: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        rows = [("changed", *item) for item in self.changed.items()]
        rows += [("kept", *item) for item in self.kept.items()]
        width = max((len(name) for _, name, _ in rows), default=0)
        lines = [f"  {what:7}  {name:{width}}  {text}" for what, name, text in rows]
        head = f"{self.action}: {len(self.changed)} changed, {len(self.kept)} kept"
        return "\n".join([head, *lines])
