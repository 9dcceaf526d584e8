"""Checked rows in memory and on disk, which can be passed over again and again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bayesgen.alignment import aligned
from bayesgen.schema import Schema
from bayesgen.tables.encode import encode
from bayesgen.tables.raw import RawTable

__all__ = [
    "BLOCK_BYTES",
    "FileRows",
    "MemoryRows",
    "Rows",
    "Source",
    "SubsetRows",
    "permutation",
    "rows_per_block",
]

BLOCK_BYTES = 4 * 2**20


def rows_per_block(num_columns: int) -> int:
    """Rows of float64 in one block."""
    return max(1, BLOCK_BYTES // (8 * num_columns))


class Source(ABC):
    """A file of raw rows, made of chunks that can be read in any order."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...] | None:
        """Names of the columns, None if the file has none."""

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """Number of columns."""

    @property
    @abstractmethod
    def num_chunks(self) -> int:
        """Number of chunks."""

    @abstractmethod
    def chunk(self, index: int) -> Iterator[RawTable]:
        """The rows of one chunk, in blocks."""

    def stamp(self) -> tuple[int, int] | None:
        """Size and time of the last change of the file, None for memory."""
        return None


class Rows(ABC):
    """Checked, encoded rows that can be passed over again and again."""

    num_rows: int

    @abstractmethod
    def pieces(self, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        """All rows as (number of the first, ``(b, d)`` rows); ``generator`` permutes chunks."""

    def blocks(self, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """All rows in blocks ``(b, d)``; ``generator`` permutes chunks, and rows within blocks."""
        for _, piece in self.pieces(generator):
            yield piece if generator is None else piece[permutation(len(piece), generator)]


class MemoryRows(Rows):
    """Rows held as one tensor; shuffled as a whole."""

    def __init__(self, values: Tensor) -> None:
        self.values = aligned(values)
        self.num_rows = len(values)

    def pieces(self, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        del generator
        step = rows_per_block(self.values.shape[1])
        for start in range(0, self.num_rows, step):
            yield start, self.values[start : start + step]

    def blocks(self, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        if generator is None:
            yield from super().blocks()
            return
        order = permutation(self.num_rows, generator).to(self.values.device)
        for index in order.split(rows_per_block(self.values.shape[1])):
            yield self.values[index]


class FileRows(Rows):
    """Rows read from a source in each pass, at flat memory.

    Args:
        source: Where the raw rows come from.
        schema: What they must agree with.
        chunk_rows: The number of rows of each chunk, as counted when the file was scanned.
    """

    def __init__(self, source: Source, schema: Schema, chunk_rows: list[int]) -> None:
        self.source, self._schema = source, schema
        self._starts = np.concatenate(([0], np.cumsum(chunk_rows))).tolist()
        self._stamp = source.stamp()
        self.num_rows = self._starts[-1]

    def pieces(self, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        if self.source.stamp() != self._stamp:
            raise ValueError(
                "the file has changed since it was first read; call as_dataset again."
            )
        num = self.source.num_chunks
        order = range(num) if generator is None else permutation(num, generator).tolist()
        for index in order:
            start = self._starts[index]
            for raw in self.source.chunk(index):
                yield start, encode(raw, self._schema, start)
                start += len(raw.values)


class SubsetRows(Rows):
    """Some rows of others, in their order: a mask of one byte a row."""

    def __init__(self, rows: Rows, mask: Tensor) -> None:
        self.parent, self.mask = rows, mask
        self.num_rows = int(mask.sum())

    def pieces(self, generator: torch.Generator | None = None) -> Iterator[tuple[int, Tensor]]:
        for start, piece in self.parent.pieces(generator):
            kept = piece[self.mask[start : start + len(piece)]]
            if len(kept):
                yield int(self.mask[:start].sum()), kept


def permutation(n: int, generator: torch.Generator) -> Tensor:
    """A random order of ``n`` things, on the CPU."""
    return torch.randperm(n, generator=generator, device=generator.device).cpu()
