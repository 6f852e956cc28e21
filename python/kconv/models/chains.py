"""Which parts of a graph can run as one operation each, where many tensors are alive at a time.

Networks of any origin have skip connections across stages, several outputs, and layers that no
fused operation stands for. A chain here is a set of nodes that reads one value from outside and of
which one value is read outside; everything else may be alive beside it.

Example:
    >>> nodes = [
    ...     Node("conv", ("x",), fusable=True, is_convolution=True),
    ...     Node("relu", ("conv",), fusable=True),
    ...     Node("other", ("x",)),  # no fused operation computes it
    ...     Node("sum", ("relu", "other"), fusable=True),
    ... ]
    >>> find_chains(["x"], nodes, ["sum"])
    [Chain(input='x', nodes=('conv', 'relu'))]
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Chain", "Node", "find_chains"]


@dataclass(frozen=True)
class Node:
    """A value, and what it is computed from.

    Attributes:
        name: of the value.
        inputs: the names of the values that it is computed from.
        fusable: whether a fused operation can compute it.
        ends: whether it may be the last of a chain.
        is_convolution: whether it is one; a chain without any is not worth an operation.
        mode: what all nodes of a chain that have one must have in common (None: has none).
        writes: the names of values that it may change in place, where it is not run as part of a
            chain: inputs, and what else is in their memory.
    """

    name: str
    inputs: tuple[str, ...]
    fusable: bool = False
    ends: bool = True
    is_convolution: bool = False
    mode: Hashable = None
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Nodes that run as one operation, in their order; the last is what others read."""

    input: str
    nodes: tuple[str, ...]


def find_chains(
    sources: Iterable[str],
    nodes: Sequence[Node],
    outputs: Iterable[str],
    *,
    starts: Container[str] | None = None,
) -> list[Chain]:
    """The largest chains, from the first node on.

    Args:
        sources: the names of the values that come from outside.
        nodes: in the order in which they are computed.
        outputs: the names of the values that are read after all.
        starts: the names of those values that chains may read; None for all.

    Returns:
        The chains, in the order of their first nodes. Computed where its first node stands, each
        sees its input as its nodes would.
    """
    names = [*sources, *(node.name for node in nodes)]
    place = {name: i for i, name in enumerate(names)}
    first = len(names) - len(nodes)
    # Sets of values are the bits of integers: bit i for names[i], the bit after the last for a
    # reader outside.
    readers = [0] * len(names)
    for i, node in enumerate(nodes, first):
        for name in node.inputs:
            readers[place[name]] |= 1 << i
    for name in outputs:
        readers[place[name]] |= 1 << len(names)
    search = _Search(nodes, first, place, readers)
    chains = []
    for start in range(len(names)):
        if not search.inner >> start & 1 and (starts is None or names[start] in starts):
            while chain := search.largest_from(start):
                chains.append(Chain(names[start], tuple(names[i] for i in _bits(chain))))
    chains.sort(key=lambda chain: place[chain.nodes[0]])
    return chains


class _Search:
    """What chains have been found so far, and the next one."""

    def __init__(
        self, nodes: Sequence[Node], first: int, place: Mapping[str, int], readers: list[int]
    ) -> None:
        self._nodes, self._first, self._readers = nodes, first, readers
        self._inputs = [[place[name] for name in node.inputs] for node in nodes]
        self._taken = 0
        self.inner = 0
        """The nodes of chains but for their last ones, which begin no further chain."""
        self._convolutions = _set(first + i for i, n in enumerate(nodes) if n.is_convolution)
        self._writers = [0] * len(readers)
        for i, node in enumerate(nodes, first):
            for name in () if node.fusable else node.writes:
                self._writers[place[name]] |= 1 << i
        self._own_writers = _set(first + i for i, n in enumerate(nodes) if n.writes and n.fusable)

    def largest_from(self, start: int) -> int:
        """The nodes of the largest chain that reads a value; 0 for none."""
        # For each node that can be computed from the value alone: the nodes that this takes, the
        # readers of these but for the node's own, and their mode.
        takes: dict[int, int] = {start: 0}
        read: dict[int, int] = {start: 0}
        modes: dict[int, Hashable] = {start: None}
        best, best_size = 0, 0
        for i in range(max(start + 1, self._first), self._first + len(self._nodes)):
            node, inputs = self._nodes[i - self._first], self._inputs[i - self._first]
            if not node.fusable or self._taken >> i & 1 or not inputs:
                continue
            if not all(x in takes for x in inputs):
                continue
            common = {modes[x] for x in inputs} | {node.mode}
            common.discard(None)
            if len(common) > 1:
                continue
            modes[i] = common.pop() if common else None
            takes[i], read[i] = 1 << i, 0
            for x in inputs:
                takes[i] |= takes[x]
                read[i] |= read[x] | (self._readers[x] if x != start else 0)
            size = takes[i].bit_count()
            if (
                node.ends
                and size > best_size
                and not read[i] & ~takes[i]
                and takes[i] & self._convolutions
                and not self._is_written_between(start, takes[i])
            ):
                best, best_size = takes[i], size
        if best:
            self._taken |= best
            self.inner |= best & ~(1 << best.bit_length() - 1)
        return best

    def _is_written_between(self, start: int, chain: int) -> bool:
        """Whether a chain's input may change between two of its readers, inside or outside."""
        own = self._readers[start] & chain
        if own & self._own_writers and self._readers[start] & ~chain:
            return True  # a chain may run node by node, and earlier than they stand
        writers = self._writers[start] & ~chain
        last, lowest = own.bit_length(), (own & -own).bit_length()
        return any(lowest <= i + 1 <= last for i in _bits(writers))


def _set(members: Iterable[int]) -> int:
    result = 0
    for member in members:
        result |= 1 << member
    return result


def _bits(members: int) -> Iterable[int]:
    while members:
        lowest = members & -members
        yield lowest.bit_length() - 1
        members ^= lowest
