"""Minibatches without replacement, in an order that a checkpoint can restore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.data import Dataset

__all__ = ["Order", "Stream", "begin"]

Place = Mapping[str, int]


def begin(generator: torch.Generator) -> dict[str, int]:
    """The start of a pass: its seed, and batches taken from it."""
    seed = torch.randint(2**32, (), generator=generator, device=generator.device)
    return {"seed": int(seed), "taken": 0}


class Order:
    """Random passes over ``size`` rows, ``batch_size`` at a time; a short last batch is left out.

    Every row is in every pass with the same probability, and every batch has the same size. Where
    the passes stand is a small dict of numbers: the seed of the pass, and batches taken from it.
    """

    def __init__(self, size: int, batch_size: int, device: torch.device) -> None:
        self.size, self.batch_size, self.device = size, batch_size, device
        self.num_batches = size // batch_size
        self._seed = -1
        self._rows = torch.zeros(0, dtype=torch.int64)

    def take(
        self, place: Place, count: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, int]]:
        """The next ``count`` batches ``(count, batch_size)``, and where the pass stands then."""
        parts, here, missing = [], dict(place), count
        while missing:
            if here["taken"] == self.num_batches:
                here = begin(generator)
            rows = self._pass(here["seed"])
            now = min(missing, self.num_batches - here["taken"])
            parts.append(rows[here["taken"] : here["taken"] + now])
            here["taken"] += now
            missing -= now
        return torch.cat(parts).to(self.device), here

    def _pass(self, seed: int) -> Tensor:
        if seed != self._seed:
            order = torch.randperm(self.size, generator=rng.make_generator(seed))
            kept = order[: self.num_batches * self.batch_size]
            self._rows, self._seed = kept.reshape(self.num_batches, self.batch_size), seed
        return self._rows


class Stream:
    """The same for rows that stream from disk, in the file's random order of chunks."""

    def __init__(
        self, data: Dataset, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.data, self.batch_size, self.dtype, self.device = data, batch_size, dtype, device
        self.num_batches = data.num_rows // batch_size
        self._at: tuple[int, int] | None = None
        self._batches: Iterator[Tensor] = iter(())

    def take(
        self, place: Place, count: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, int]]:
        """The next batches, one after the other ``(count * batch_size, d)``, and the place."""
        parts, here = [], dict(place)
        for _ in range(count):
            if here["taken"] == self.num_batches:
                here = begin(generator)
            parts.append(self._next(here["seed"], here["taken"]))
            here["taken"] += 1
        return torch.cat(parts), here

    def _next(self, seed: int, taken: int) -> Tensor:
        if self._at != (seed, taken):
            generator: Any = rng.make_generator(seed)
            self._batches = self.data.batches(
                self.batch_size, dtype=self.dtype, device=self.device, generator=generator
            )
            for _ in range(taken):
                next(self._batches)
        self._at = (seed, taken + 1)
        return next(self._batches)
