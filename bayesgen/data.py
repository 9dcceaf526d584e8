"""Data in: arrays, frames, tensors and files become named, checked numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bayesgen.schema import Kind, Schema
from bayesgen.tables.convert import raw_table
from bayesgen.tables.encode import encode
from bayesgen.tables.moments import ColumnSummary, summarise
from bayesgen.tables.raw import RawTable, Type, default_names
from bayesgen.tables.rows import FileRows, MemoryRows, Rows, Source, SubsetRows, permutation
from bayesgen.tables.scan import SchemaScan
from bayesgen.tables.sources import ArraySource, MemorySource, SelectedSource, open_source

__all__ = ["MAX_BYTES_IN_MEMORY", "ColumnSummary", "Dataset", "Kind", "Schema", "as_dataset"]

MAX_BYTES_IN_MEMORY = 256 * 2**20
"""Files larger than this are streamed from disk unless ``in_memory=True``."""


@final
class Dataset:
    """A table of checked numbers with named columns; made by :func:`as_dataset`.

    Categories are codes ``0 .. L-1``, booleans 0 and 1, missing entries NaN. Rows are in memory,
    or streamed from a file, which each pass reads again in blocks of a few megabytes.
    """

    def __init__(self, schema: Schema, rows: Rows) -> None:
        self._schema = schema
        self._rows = rows
        self._summary: ColumnSummary | None = None
        self._fingerprint: str | None = None

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
            come
                in a random order of the file's chunks (row groups of Parquet, stretches of about
                8 MB of others), with the rows within each block of about 8 MB in random order: a
                file that is sorted should be shuffled once on disk.
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
        """Count, mean, variance, minimum and maximum of the observed entries of each column.

        In float64 on the CPU, exact at any offset; computed in one pass, once.
        """
        if self._summary is None:
            blocks = (block.to("cpu") for block in self._rows.blocks())
            self._summary = summarise(blocks, self.columns)
        return self._summary

    def fingerprint(self) -> str:
        """SHA-256 of the schema and all entries in float64, row by row, however they are held."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(self._schema.to_config()).encode())
            for block in self._rows.blocks():
                values = block.to("cpu", torch.float64)
                values = torch.where(values.isnan(), math.nan, values)  # one NaN of the many
                digest.update(values.contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


# ------------------------------------------------------------------ data in
def as_dataset(
    x: object,
    *,
    schema: Schema | None = None,
    columns: Sequence[str] | None = None,
    kinds: Mapping[str, Kind] | Kind | None = None,
    allow_missing: bool = True,
    in_memory: bool | None = None,
) -> Dataset:
    """Check data of any common form and return it as a :class:`Dataset`.

    Without ``schema`` the kinds are learnt: text and categoricals are categories (levels in the
    order declared, else sorted), booleans are binary, integers that are never negative are counts,
    the rest is real. With ``schema`` - that of the data a model was fitted to - columns are
    matched by name (by position if the input has no names) and categories get the same codes.

    Args:
        x: Numbers as a numpy array, torch tensor or list of 1 (one column) or 2 dimensions; a
            pandas, polars or pyarrow table, a dict of columns, an xarray Dataset or DataArray; the
            path of a ``.csv`` or ``.tsv`` file with a header, or of a ``.parquet`` or ``.npy``
            file; a Dataset. NaN, None, NA and masked entries are missing.
        schema: The schema that the data must have.
        columns: Names for the columns of an array; or the columns of a table to keep, in order.
        kinds: Kinds to use instead of the learnt ones, by column, or one for all.
        allow_missing: Whether missing entries are allowed.
        in_memory: Whether a file is loaded (True) or streamed (False); by default files up to
            :data:`MAX_BYTES_IN_MEMORY` are loaded.

    Raises:
        TypeError: If ``x`` is of a type that is not understood.
        ValueError: If its shape or content is not allowed: the message names the row or column.
        FileNotFoundError: If there is no such file.

    Example:
        >>> data = as_dataset([[1.0, 2.0], [3.0, float("nan")]], columns=["a", "b"])
        >>> data
        Dataset(2 x 2, in memory: a real, b real)
        >>> data.summary().mean.tolist()
        [2.0, 2.0]
    """
    if schema is not None and kinds is not None:
        raise ValueError("pass schema or kinds, not both: a schema has its own kinds.")
    if isinstance(columns, str):
        raise TypeError(
            f"columns must be a list of names, but got {columns!r}; pass [{columns!r}]."
        )
    if isinstance(x, Dataset):
        if columns is None and kinds is None and schema in (None, x.schema):
            return _check_missing(x, allow_missing)
        data = _reread(x._rows, x.schema, schema, columns, kinds)
    else:
        source, stream = _open(x, schema, columns, kinds, in_memory)
        data = _read(_select(source, columns), schema, kinds, stream)
    return _check_missing(data, allow_missing)


def _select(source: Source, columns: Sequence[str] | None) -> Source:
    return source if columns is None else SelectedSource(source, columns)


def _reread(
    rows: Rows,
    old: Schema,
    schema: Schema | None,
    columns: Sequence[str] | None,
    kinds: Mapping[str, Kind] | Kind | None,
) -> Dataset:
    """Hold the rows of a Dataset against another schema."""
    if isinstance(rows, SubsetRows):
        whole = _reread(rows.parent, old, schema, columns, kinds)
        return Dataset(whole.schema, SubsetRows(whole._rows, rows.mask))
    if isinstance(rows, FileRows):
        return _read(_select(rows.source, columns), schema, kinds, stream=True)
    assert isinstance(rows, MemoryRows)
    raw = RawTable(
        None if old.columns == default_names(len(old.columns)) else old.columns,
        rows.values,
        tuple(_TYPES[kind] for kind in old.kinds),
        old.levels,
        tuple(kind == "category" for kind in old.kinds),
    )
    return _read(_select(MemorySource(raw), columns), schema, kinds, stream=False)


_TYPES: Mapping[Kind, Type] = {
    "real": "real",
    "count": "integer",
    "binary": "bool",
    "category": "text",
}


def _open(
    x: object,
    schema: Schema | None,
    columns: Sequence[str] | None,
    kinds: Mapping[str, Kind] | Kind | None,
    in_memory: bool | None,
) -> tuple[Source, bool]:
    """Where the rows come from, and whether to stream them."""
    if isinstance(x, np.memmap):
        array: np.ndarray[Any, Any] = x
        return ArraySource(lambda: array), _streams(x.nbytes, in_memory)
    if not isinstance(x, (str, Path)):
        if in_memory is False:
            raise ValueError(
                f"in_memory=False streams a file, but got {type(x).__name__}; write it to a "
                f".parquet or .npy file and pass the path."
            )
        return MemorySource(raw_table(x)), False
    path = Path(x).expanduser()
    if schema is not None:
        kinds = dict(zip(schema.columns, schema.kinds, strict=True))
    source = open_source(path, columns, kinds)
    return source, _streams(path.stat().st_size, in_memory)


def _streams(num_bytes: int, in_memory: bool | None) -> bool:
    return num_bytes > MAX_BYTES_IN_MEMORY if in_memory is None else not in_memory


def _read(
    source: Source,
    schema: Schema | None,
    kinds: Mapping[str, Kind] | Kind | None,
    stream: bool,
) -> Dataset:
    """One pass that counts, checks and learns what is not given; keeps rows unless streamed."""
    names = source.names if source.names is not None else default_names(source.num_columns)
    if not names:
        raise ValueError("the data have no columns; at least one is needed.")
    scan = SchemaScan(names, kinds) if schema is None else None
    kept: list[RawTable | Tensor] = []
    chunk_rows: list[int] = []
    num_rows = 0
    for index in range(source.num_chunks):
        before = num_rows
        for raw in source.chunk(index):
            if scan is not None:
                scan.update(raw)
            rows = raw if schema is None else encode(raw, schema, num_rows)
            num_rows += len(raw.values)
            if not stream:
                kept.append(rows)
        chunk_rows.append(num_rows - before)
    if num_rows == 0:
        raise ValueError("the data have no rows; at least one is needed.")
    if scan is not None:
        schema = scan.finish()
    assert schema is not None
    if stream:
        return Dataset(schema, FileRows(source, schema, chunk_rows))
    parts = [encode(p, schema) if isinstance(p, RawTable) else p for p in kept]
    return Dataset(schema, MemoryRows(parts[0] if len(parts) == 1 else torch.cat(parts)))


def _check_missing(data: Dataset, allow_missing: bool) -> Dataset:
    if allow_missing or not data.has_missing:
        return data
    start = 0
    for block in data._rows.blocks():
        missing = block.isnan().nonzero()
        if len(missing):
            row, column = missing[0].tolist()
            raise ValueError(
                f"row {start + row}, column {data.columns[column]!r} is missing, but missing "
                f"values "
                f"are not allowed here; drop such rows, in pandas by frame.dropna(), or fill them."
            )
        start += len(block)
    raise AssertionError("unreachable")
