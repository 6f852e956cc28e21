"""The processes that train one network together, as ``torchrun`` or Ray Train starts them.

Each takes its share of every batch. Whatever is decided is decided by all from the same numbers, or
by the first, which alone writes files.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kconv._kconv import available_cpus

__all__ = ["PeerError", "Ranks", "is_one_of_several", "joined"]


class PeerError(RuntimeError):
    """Another process of the run has ended before its end."""


class Ranks:
    """A process that trains alone: the first and only one.

    Attributes:
        rank: Which process this is, from 0 on.
        size: How many there are.
        threads: How many this one may use, if not what its framework uses.
    """

    rank = 0
    size = 1
    threads: int | None = None

    def sum(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of all processes' arrays."""
        return np.asarray(values, np.float64)

    def first_of(self, value: Any) -> Any:
        """The first process's value."""
        return value

    def all_of(self, value: Any) -> list[Any]:
        """Every process's value."""
        return [value]


class TorchRanks(Ranks):
    """Processes that ``torch.distributed`` connects: by gloo, or as they have been already."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        # Whose functions have the process group of the time of its import as their default, so that
        # it would never end, nor would its threads, which abort a process whose interpreter ends.
        import torch.distributed.nn.functional
        from torch.distributed.rendezvous import rendezvous

        self._torch, self._dist = torch, dist
        self._connects = not dist.is_initialized()
        if self._connects:
            store, rank, size = next(rendezvous("env://"))
            store = dist.PrefixStore(  # type: ignore[attr-defined]  # public, but not in __all__
                agree(store, rank, size), store
            )
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # torchrun sets 1 where nothing is set, however many CPUs there are.
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            self.threads = max(1, available_cpus() // here)

    def sum(self, values: NDArray[Any]) -> NDArray[np.float64]:
        tensor = self._torch.tensor(np.asarray(values, np.float64))
        self._dist.all_reduce(tensor)
        total: NDArray[np.float64] = tensor.numpy()
        return total

    def first_of(self, value: Any) -> Any:
        values = [value]
        self._dist.broadcast_object_list(values)
        return values[0]

    def all_of(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the connections that were made here, once nobody needs them any more."""
        if self._connects:
            self._dist.destroy_process_group()
            gc.collect()  # what shares gradients holds them too


def agree(store: Any, rank: int, size: int) -> str:
    """A name that the processes that have started together, and they alone, give to their keys.

    ``torchrun`` keeps one store when it starts processes again, in which the addresses of those
    that were lost still are; its count of restarts may differ from machine to machine. So each
    process leaves a word that nobody has used, and the first one answers it with the name, until
    all have confirmed the name by their word: a lost process's word stays without confirmation.

    Args:
        store: Of ``torch.distributed``, which all of them reach.
        rank: Which process this is.
        size: How many there are.

    Returns:
        The name.

    Raises:
        PeerError: A process has not come in the store's time.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"kconv/word/{rank}", word)
        name: str = store.get(f"kconv/name/{word}").decode()
        store.set(f"{name}/{word}", "")
        return name
    deadline = time.monotonic() + store.timeout.total_seconds()
    waiting = set(range(1, size))
    while waiting:
        for other in sorted(waiting):
            if not store.check([f"kconv/word/{other}"]):
                continue
            theirs = store.get(f"kconv/word/{other}").decode()
            store.set(f"kconv/name/{theirs}", word)
            if store.check([f"{word}/{theirs}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > deadline:
            raise PeerError(f"process {min(waiting)} of {size} has not started in time")
        time.sleep(0.01)
    return word


def is_one_of_several() -> bool:
    """Whether ``torchrun`` or Ray has started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


@contextmanager
def joined(framework: str) -> Iterator[Ranks]:
    """Connect to the other processes that ``torchrun`` or Ray has started, if there are any.

    Args:
        framework: What trains.

    Yields:
        The :class:`Ranks`.

    Raises:
        ValueError: The framework trains in one process only.
        PeerError: Another process has ended.
    """
    if not is_one_of_several():
        yield Ranks()
        return
    world = os.environ["WORLD_SIZE"]
    if framework != "torch":
        raise ValueError(
            f"framework={framework!r} trains in one process; in WORLD_SIZE={world} of them only "
            "'torch' does"
        )
    try:
        ranks = TorchRanks()
        yield ranks
        ranks.leave()
    except RuntimeError as error:
        if isinstance(error, PeerError) or not _is_of_a_connection(error):
            raise
        raise PeerError(
            f"process {os.environ['RANK']} of {world} has lost another one, which was ended or is "
            "out of reach: go on with --resume from the last checkpoint"
        ) from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Whether gloo, or the store of torchrun, could not reach a process."""
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("gloo", "connection", "disterror", "distnetwork", "peer"))
