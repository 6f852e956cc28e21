"""Parameters and buffers that a forward hands to functions, as a module would have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from kconv.models import graph
from kconv.torch._lift import Derived

__all__ = ["Borrowed", "Parameter", "parameter"]


@dataclass(frozen=True, kw_only=True)
class Parameter(Derived):
    """A parameter or buffer, or all of it in another shape; ``numbers`` is the shape.

    Attributes:
        owner: the module that has it.
        attribute: its name there.
    """

    owner: nn.Module = field(compare=False)
    attribute: str

    @property
    def tensor(self) -> Any:
        """As it is now."""
        return _tensor(self.owner, self.attribute)

    @property
    def is_whole(self) -> bool:
        """Whether it has the shape that the module keeps it in."""
        return self.numbers == tuple(self.tensor.shape)


def parameter(name: str, owner: nn.Module, attribute: str) -> tuple[graph.Layer, ...]:
    """What reads a tensor of a module; nothing if it has none of that name."""
    tensor = _tensor(owner, attribute)
    if not isinstance(tensor, Tensor):
        return ()
    made = Parameter(
        name=name,
        inputs=(),
        shape=(),
        kind="parameter",
        source=name,
        numbers=tuple(tensor.shape),
        owner=owner,
        attribute=attribute,
    )
    return (made,)


def _tensor(owner: nn.Module, attribute: str) -> Any:
    tensor = owner._parameters.get(attribute)
    return owner._buffers.get(attribute) if tensor is None else tensor


class Borrowed:
    """Stands for a module whose weights a function was called with.

    Attributes:
        places: modules and the names of their tensors, by the names that these would have here.
        training: of a batch norm, whether it normalises with the batch's own statistics.
        momentum: of a batch norm.
    """

    num_batches_tracked = None
    """Whoever calls the function counts."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self.training = False
        self.momentum = 0.0

    def __getattr__(self, name: str) -> Any:
        places = self.__dict__.get("places", {})
        if name not in places:
            raise AttributeError(name)
        return _tensor(*places[name])

    @property
    def _buffers(self) -> dict[str, Any]:
        return {name: _tensor(*place) for name, place in self.places.items()}

    def lift(
        self,
        lifter: Callable[..., Any],
        name: str,
        x: graph.Layer,
        tensors: Mapping[str, Any],
        **options: Any,
    ) -> Any:
        """What a module with these tensors and attributes is lifted to.

        Args:
            lifter: of that kind of modules.
            name: of the layer.
            x: what it reads.
            tensors: by their names; None for one that is not there.
            **options: the module's other attributes.
        """
        given = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        if isinstance(x, Derived) or not all(
            isinstance(tensor, Parameter) and tensor.is_whole for tensor in given.values()
        ):
            return None
        self.places = {key: (tensor.owner, tensor.attribute) for key, tensor in given.items()}
        constants = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()
        }
        module = SimpleNamespace(
            _parameters={key: tensor.tensor for key, tensor in given.items()}, **constants
        )
        return lifter(module, {"name": name, "inputs": (x.name,)}, [x])
