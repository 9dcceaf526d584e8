"""Tables of pandas, polars, pyarrow and xarray; none is imported unless in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bayesgen.schema import check_unique
from bayesgen.tables.arrays import from_array
from bayesgen.tables.columns import check_exact, codes_column, factorise, refuse, text_or_numbers
from bayesgen.tables.raw import RawColumn, RawTable, Type, stack

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import xarray as xr

__all__ = ["from_arrow", "from_pandas", "from_polars", "from_pyarrow", "from_xarray"]


def from_pandas(x: object) -> RawTable | None:
    """A pandas frame or series; None for anything else."""
    import pandas as pd

    if isinstance(x, pd.Series):
        column = _pandas_column(x, "data" if x.name is None else str(x.name))
        table = stack({"" if x.name is None else str(x.name): column})
        return table._replace(names=None) if x.name is None and column.type != "text" else table
    if not isinstance(x, pd.DataFrame):
        return None
    names = _names(x.columns.tolist())
    return stack({name: _pandas_column(x.iloc[:, i], name) for i, name in enumerate(names)})


def _names(given: Sequence[object]) -> list[str]:
    names = [str(name) for name in given]
    check_unique(names)
    return names


def _pandas_column(x: pd.Series[Any], name: str) -> RawColumn:
    import pandas as pd

    dtype = x.dtype
    if isinstance(dtype, pd.SparseDtype):
        x = pd.Series(np.asarray(x), name=x.name)
        dtype = x.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return codes_column(x.cat.codes.to_numpy(), list(dtype.categories), declared=True)
    types = pd.api.types
    if types.is_string_dtype(dtype) and not types.is_object_dtype(dtype):
        codes, levels = pd.factorize(x, sort=True)
        return codes_column(codes, list(levels), declared=False)
    if types.is_object_dtype(dtype):
        return text_or_numbers(x.to_numpy(dtype=object), name)
    if types.is_bool_dtype(dtype):
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "bool")
    if types.is_integer_dtype(dtype):
        if x.notna().any():
            check_exact(int(x.min()), int(x.max()), name)
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "integer")
    if types.is_float_dtype(dtype):
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "real")
    raise refuse(name, dtype)


def from_polars(x: object) -> RawTable | None:
    """A polars frame or series; None for anything else."""
    import polars as pl

    if isinstance(x, pl.LazyFrame):
        raise TypeError("got a polars LazyFrame; pass frame.collect().")
    if isinstance(x, pl.Series):
        column = _polars_column(x, x.name)
        return stack({x.name: column})._replace(names=(x.name,) if x.name else None)
    if not isinstance(x, pl.DataFrame):
        return None
    return stack({name: _polars_column(x.get_column(name), name) for name in x.columns})


def _polars_column(x: pl.Series, name: str) -> RawColumn:
    import polars as pl

    dtype = x.dtype
    if dtype == pl.String or dtype == pl.Categorical:
        codes, levels = factorise(x.cast(pl.String).to_list())
        return RawColumn(codes, "text", levels, dtype == pl.Categorical)
    if isinstance(dtype, pl.Enum):
        codes = x.to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
        return codes_column(codes, dtype.categories.to_list(), declared=True)
    if dtype.is_integer() and x.null_count() < len(x):
        check_exact(int(x.min()), int(x.max()), name)  # type: ignore[arg-type]
    if not (dtype.is_numeric() or dtype == pl.Boolean or dtype == pl.Null):
        raise refuse(name, dtype)
    type_: Type = "integer" if dtype.is_integer() else "bool" if dtype == pl.Boolean else "real"
    return RawColumn(x.cast(pl.Float64).fill_null(math.nan).to_numpy(), type_)


def from_pyarrow(x: object) -> RawTable | None:
    """A pyarrow table or record batch; None for anything else."""
    import pyarrow as pa

    return from_arrow(x) if isinstance(x, (pa.Table, pa.RecordBatch)) else None


def from_arrow(x: pa.Table | pa.RecordBatch) -> RawTable:
    """The columns of an Arrow table: what files are read as."""
    names = _names(x.schema.names)
    return stack({name: _arrow_column(x.column(i), name) for i, name in enumerate(names)})


def _arrow_column(x: Any, name: str) -> RawColumn:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(x, pa.ChunkedArray):
        x = x.combine_chunks()
    t = x.type
    declared = pa.types.is_dictionary(t)
    if declared and not (
        pa.types.is_string(t.value_type) or pa.types.is_large_string(t.value_type)
    ):
        x = x.cast(t.value_type).cast(pa.string())
    if declared or any(f(t) for f in (pa.types.is_string, pa.types.is_large_string)):
        coded = x if pa.types.is_dictionary(x.type) else x.dictionary_encode()
        codes = coded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
        return _sorted_levels(codes, coded.dictionary.to_pylist(), declared=declared)
    if pa.types.is_boolean(t):
        return RawColumn(_arrow_numbers(x.cast(pa.uint8())), "bool")
    if pa.types.is_integer(t):
        extremes = pc.min_max(x).as_py()
        if extremes["min"] is not None:
            check_exact(extremes["min"], extremes["max"], name)
        return RawColumn(_arrow_numbers(x), "integer")
    if pa.types.is_floating(t) or pa.types.is_decimal(t) or pa.types.is_null(t):
        return RawColumn(_arrow_numbers(x), "real")
    raise refuse(name, t)


def _arrow_numbers(x: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    values: NDArray[np.float64] = x.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _sorted_levels(codes: NDArray[Any], levels: Sequence[Any], *, declared: bool) -> RawColumn:
    """Files keep levels in the order of appearance, which would depend on the reader's blocks."""
    texts = [str(level) for level in levels]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    rank = np.empty(len(order) + 1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    rank[-1] = -1
    return codes_column(rank[codes], [texts[i] for i in order], declared=declared)


def from_xarray(x: object) -> RawTable | None:
    """An xarray Dataset or DataArray; None for anything else."""
    import xarray as xr

    if isinstance(x, xr.Dataset):
        return _xarray_dataset(x)
    if not isinstance(x, xr.DataArray):
        return None
    if x.ndim == 1 and x.name is not None:
        return stack({str(x.name): text_or_numbers(x.values, str(x.name))})
    raw = from_array(x.values)
    if x.ndim != 2 or x.dims[1] not in x.coords:
        return raw
    return raw._replace(names=tuple(_names(x.coords[x.dims[1]].values.tolist())))


def _xarray_dataset(x: xr.Dataset) -> RawTable:
    for name, variable in x.data_vars.items():
        if variable.ndim != 1 or variable.dims != next(iter(x.data_vars.values())).dims:
            raise ValueError(
                f"variable {name!r} has dimensions {variable.dims}; a Dataset needs 1-dimensional "
                f"variables that share one dimension, such as x.to_dataframe() gives."
            )
    return stack({str(k): text_or_numbers(v.values, str(k)) for k, v in x.data_vars.items()})
