"""Data in: arrays, frames, tensors and files become named, checked numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesgen.schema import Kind, Schema
from bayesgen.tables.convert import raw_table
from bayesgen.tables.dataset import Dataset
from bayesgen.tables.encode import encode
from bayesgen.tables.moments import ColumnSummary
from bayesgen.tables.raw import RawTable, Type, default_names
from bayesgen.tables.rows import FileRows, MemoryRows, Rows, Source, SubsetRows
from bayesgen.tables.scan import SchemaScan
from bayesgen.tables.sources import ArraySource, MemorySource, SelectedSource, open_source

__all__ = ["MAX_BYTES_IN_MEMORY", "ColumnSummary", "Dataset", "Kind", "Schema", "as_dataset"]

MAX_BYTES_IN_MEMORY = 256 * 2**20
"""Files larger than this are streamed from disk unless ``in_memory=True``."""


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
    Numbers in a category column are its levels in a table with names, and codes in an array
    without.

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
    # What is raw here went through the scan, which refuses infinities.
    parts = [encode(p, schema, is_finite=True) if isinstance(p, RawTable) else p for p in kept]
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
