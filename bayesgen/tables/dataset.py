"""The checked table that everything else in bayesgen takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bayesgen.schema import Kind, Schema
from bayesgen.tables.moments import ColumnSummary, summarise, summarise_products
from bayesgen.tables.rows import MemoryRows, Rows, SubsetRows, permutation

__all__ = ["Dataset"]


@final
class Dataset:
    """A table of checked numbers with named columns; made by :func:`~bayesgen.data.as_dataset`.

    Categories are codes ``0 .. L-1``, booleans 0 and 1, missing entries NaN. Rows are in memory,
    or streamed from a file, which each pass reads again in blocks of a few megabytes.
    """

    def __init__(self, schema: Schema, rows: Rows) -> None:
        self._schema = schema
        self._rows = rows

    @classmethod
    def from_codes(cls, values: Tensor, schema: Schema) -> Dataset:
        """Rows ``(n, d)`` coded already, as :meth:`tensor` returns and models sample them.

        Raises:
            ValueError: If the shape does not fit the schema.
        """
        if values.ndim != 2 or values.shape[1] != len(schema.columns) or not len(values):
            raise ValueError(
                f"values must be (n, {len(schema.columns)}) with at least one row, but the shape "
                f"is {tuple(values.shape)}."
            )
        return cls(schema, MemoryRows(values.detach()))

    # -------------------------------------------------------------- what it is
    @property
    def schema(self) -> Schema:
        """Names, kinds and levels of the columns."""
        return self._schema

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self._schema.columns

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of each column: ``real``, ``count``, ``binary`` or ``category``."""
        return self._schema.kinds

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self._rows.num_rows

    @property
    def num_columns(self) -> int:
        """Number of columns."""
        return len(self._schema.columns)

    @property
    def in_memory(self) -> bool:
        """Whether :meth:`tensor` works; otherwise rows stream through :meth:`batches`."""
        return isinstance(self._rows, MemoryRows)

    @property
    def has_missing(self) -> bool:
        """Whether any entry is missing."""
        return bool((self.summary().count < self.num_rows).any())

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        names = ", ".join(
            f"{c} {k}" for c, k in list(zip(self.columns, self.kinds, strict=True))[:8]
        )
        more = ", ..." if self.num_columns > 8 else ""
        where = "in memory" if self.in_memory else "streamed"
        return f"Dataset({self.num_rows} x {self.num_columns}, {where}: {names}{more})"

    # -------------------------------------------------------------- rows
    def tensor(
        self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
    ) -> Tensor:
        """All rows, ``(n, d)``, NaN = missing. May share memory with the input: do not modify it.

        Raises:
            ValueError: If the rows stream from disk.
        """
        if not isinstance(self._rows, MemoryRows):
            raise ValueError(
                f"the {self.num_rows} rows stream from disk; use .batches(batch_size), or load "
                f"them "
                f"by as_dataset(path, in_memory=True)."
            )
        return self._rows.values.to(device, dtype)

    def to_columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """The columns in the user's terms: ``pandas.DataFrame(data.to_columns())`` is a table.

        Categories are their levels, None where missing; counts and binary columns are integers
        unless some are missing, which are NaN.

        Raises:
            ValueError: If the rows stream from disk.

        Example:
            >>> from bayesgen.data import as_dataset
            >>> as_dataset({"k": ["b", None], "x": [1, 2]}).to_columns()
            {'k': array(['b', None], dtype=object), 'x': array([1, 2])}
        """
        values = self.tensor().numpy()
        return {
            name: _decode(values[:, i], self.kinds[i], self._schema.levels[i])
            for i, name in enumerate(self.columns)
        }

    def batches(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """One pass over all rows in batches ``(batch_size, d)``; the last may be smaller.

        Args:
            batch_size: Rows in a batch.
            dtype: Of the batches.
            device: Of the batches.
            generator: Shuffles. Rows in memory come in a uniformly random order. Streamed rows
                come in a random order of the file's chunks (row groups of Parquet, stretches of
                about 4 MB of others), with the rows within each block of about 4 MB in random
                order: a file that is sorted should be shuffled once on disk.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}.")
        return self._batches(batch_size, dtype, torch.device(device), generator)

    def _batches(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        if isinstance(self._rows, MemoryRows):
            values = self._rows.values
            if generator is None:
                for batch in values.split(size):
                    yield batch.to(device, dtype)
                return
            for index in permutation(self.num_rows, generator).to(values.device).split(size):
                yield values[index].to(device, dtype)
            return
        held: list[Tensor] = []
        num_held = 0
        for block in self._rows.blocks(generator):
            held.append(block)
            num_held += len(block)
            if num_held < size:
                continue
            *full, last = torch.cat(held).split(size)
            if len(last) == size:
                full.append(last)
                last = last[:0]
            for batch in full:
                yield batch.to(device, dtype)
            held, num_held = [last.clone()], len(last)
        if num_held:
            yield torch.cat(held).to(device, dtype)

    def subset(self, index: Sequence[int] | slice | np.ndarray[Any, Any] | Tensor) -> Dataset:
        """Some rows, by positions, a slice or a boolean mask.

        Rows in memory come in the order asked for. Streamed rows keep the order of the file, and
        each can be taken only once.
        """
        positions = self._positions(index)
        if isinstance(self._rows, MemoryRows):
            values = self._rows.values
            return Dataset(self._schema, MemoryRows(values[positions.to(values.device)]))
        mask = torch.zeros(self.num_rows, dtype=torch.bool)
        mask[positions] = True
        if int(mask.sum()) < len(positions):
            raise ValueError(
                "streamed rows can be taken only once, but the index repeats some; "
                "load the file by as_dataset(path, in_memory=True)."
            )
        rows = self._rows
        if isinstance(rows, SubsetRows):  # keep one mask over the file
            whole = torch.zeros_like(rows.mask)
            whole[rows.mask.nonzero()[:, 0][mask]] = True
            rows, mask = rows.parent, whole
        return Dataset(self._schema, SubsetRows(rows, mask))

    def _positions(self, index: Sequence[int] | slice | np.ndarray[Any, Any] | Tensor) -> Tensor:
        n = self.num_rows
        if isinstance(index, slice):
            positions = torch.arange(*index.indices(n))
        else:
            given = torch.as_tensor(index).cpu()
            if given.dtype == torch.bool:
                if given.shape != (n,):
                    raise ValueError(f"the mask has shape {tuple(given.shape)}, not ({n},).")
                positions = given.nonzero()[:, 0]
            elif given.is_floating_point() and given.numel():
                raise TypeError("index must hold integers or booleans, but got floats.")
            else:
                positions = given.long().reshape(-1)
        if len(positions) == 0:
            raise ValueError("the subset would be empty; at least one row is needed.")
        low, high = int(positions.min()), int(positions.max())
        if low < -n or high >= n:
            raise IndexError(f"row {low if low < -n else high} is out of range for {n} rows.")
        return torch.where(positions < 0, positions + n, positions)

    def split(self, fraction: float, generator: torch.Generator) -> tuple[Dataset, Dataset]:
        """Two random parts in row order, the first with ``round(fraction * num_rows)`` rows."""
        first = round(fraction * self.num_rows)
        if not 0 < first < self.num_rows:
            raise ValueError(
                f"fraction={fraction} of {self.num_rows} rows leaves one part empty; both need a "
                f"row."
            )
        mask = torch.zeros(self.num_rows, dtype=torch.bool)
        mask[permutation(self.num_rows, generator)[:first]] = True
        return self.subset(mask), self.subset(~mask)

    # -------------------------------------------------------------- what is in it
    def summary(self) -> ColumnSummary:
        """Count, mean and variance of the observed entries of each column.

        In float64 on the CPU, exact at any offset; computed in one pass, once.
        """
        return self._looked[0]

    @cached_property
    def products(self) -> Tensor | None:
        """Sums over complete rows of products of deviations from the means, ``(d, d)``.

        In float64 on the CPU. Asked for before anything else, the same pass gives the summary and
        the fingerprint too. None where there are gaps, or where the first rows lie so far from
        the others that the sums would lose digits.
        """
        fingerprint = _Fingerprint(self._schema)
        found = summarise_products(self._blocks(), self.columns, fingerprint.visit)
        if found is None:
            return None
        summary, products = found
        self.__dict__.setdefault("_looked", (summary, fingerprint.digest.hexdigest()))
        return products

    @cached_property
    def _looked(self) -> tuple[ColumnSummary, str]:
        """Summary and fingerprint: both look at every entry, once and together."""
        fingerprint = _Fingerprint(self._schema)
        summary = summarise(self._blocks(), self.columns, fingerprint.visit)
        return summary, fingerprint.digest.hexdigest()

    def _blocks(self) -> Iterator[Tensor]:
        return (block.to("cpu") for block in self._rows.blocks())

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest observed entry of each column, ``(d,)``; NaN without any."""
        low = torch.full((self.num_columns,), torch.inf, dtype=torch.float64)
        high = -low
        for block in self._rows.blocks():
            x = block.to("cpu", torch.float64)
            low = torch.minimum(low, x.nan_to_num(nan=torch.inf).amin(0))
            high = torch.maximum(high, x.nan_to_num(nan=-torch.inf).amax(0))
        empty = low > high
        return low.masked_fill(empty, torch.nan), high.masked_fill(empty, torch.nan)

    def fingerprint(self) -> str:
        """SHA-256 of the schema and of a 64-bit number a row, however the rows are held.

        A row's number mixes the bits of its entries in float64 and adds them with odd weights,
        modulo 2^64: one changed entry of a row always shows, several escape with a chance of some
        2^-40. It guards against mistakes, not against forgery.
        """
        return self._looked[1]


class _Fingerprint:
    """A digest that is shown all rows, piece by piece, and hears one number of 64 bits of each."""

    def __init__(self, schema: Schema) -> None:
        self.digest = hashlib.sha256(repr(schema.to_config()).encode())
        weights = hashlib.shake_256(b"rows").digest(8 * len(schema.columns))
        self._odd = np.frombuffer(weights, dtype="<u8") | np.uint64(1)
        self._space = np.empty((0, len(schema.columns)), np.uint64)

    def visit(self, rows: Tensor, gaps: bool) -> None:
        """The next rows, in float64."""
        bits = rows.contiguous().numpy().view(np.uint64)
        if len(bits) > len(self._space):
            self._space = np.empty_like(bits)
        mixed = np.right_shift(bits, np.uint64(32), out=self._space[: len(bits)])
        mixed ^= bits  # low bits, which short numbers leave empty, hear of the high ones
        if gaps:
            mixed[rows.isnan().numpy()] = np.uint64(2**63 - 1)  # one NaN of the many
        numbers: np.ndarray[Any, Any] = np.einsum("ij,j->i", mixed, self._odd)
        self.digest.update(numbers.astype("<u8").tobytes())


def _decode(
    column: np.ndarray[Any, Any], kind: Kind, levels: tuple[str, ...] | None
) -> np.ndarray[Any, Any]:
    """One column of numbers and codes, in the user's terms."""
    missing = np.isnan(column)
    if levels is not None:
        lookup = np.array([*levels, None], dtype=object)
        return lookup[np.where(missing, len(levels), column).astype(np.int64)]
    whole = kind != "real" and not missing.any() and bool((column == np.floor(column)).all())
    return column.astype(np.int64) if whole else column.copy()
