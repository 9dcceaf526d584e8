"""From what users hold - arrays, tensors, frames - to raw columns of numbers and codes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesgen.schema import Levels, RawTable

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa
    import xarray as xr

__all__ = ["RawColumn", "from_arrow", "raw_table", "stack"]

ALLOWED = (
    "a numpy array, torch tensor or list of numbers with 1 or 2 dimensions, a pandas, polars or "
    "pyarrow table, a dict of columns, an xarray Dataset or DataArray, or the path of a .csv, "
    ".tsv, .parquet or .npy file"
)
Type = Literal["real", "integer", "bool", "text"]


class RawColumn(NamedTuple):
    """One column as it came."""

    values: NDArray[np.float64]
    type: Type
    levels: Levels | None = None
    declared: bool = False


def raw_table(x: object) -> RawTable:
    """Turn ``x`` into raw columns.

    Raises:
        TypeError: If ``x`` is of a type that is not understood.
        ValueError: If its content or shape is not.
    """
    for module, convert in _CONVERTERS.items():
        if module in sys.modules and (raw := convert(x)) is not None:
            return raw
    if isinstance(x, Tensor):
        return _from_tensor(x)
    if isinstance(x, Mapping):
        return stack({str(k): _column(np.asarray(v), str(k)) for k, v in x.items()})
    if isinstance(x, np.ndarray):
        return _from_array(x)
    if type(x).__module__.startswith("scipy.sparse"):
        raise TypeError("got a sparse matrix; pass x.toarray().")
    return _from_array(_from_sequence(x))


def stack(columns: Mapping[str, RawColumn]) -> RawTable:
    """Put named columns side by side."""
    if not columns:
        raise ValueError("the table has no columns; at least one is needed.")
    lengths = {name: len(column.values) for name, column in columns.items()}
    first, num_rows = next(iter(lengths.items()))
    for name, length in lengths.items():
        if length != num_rows:
            raise ValueError(
                f"column {name!r} has {length} rows, but column {first!r} has {num_rows}; "
                f"all need the same number."
            )
    values = np.empty((num_rows, len(columns)))
    for i, column in enumerate(columns.values()):
        values[:, i] = column.values
    parts = columns.values()
    return RawTable(
        tuple(columns),
        torch.from_numpy(values),
        tuple(c.type for c in parts),
        tuple(c.levels for c in parts),
        tuple(c.declared for c in parts),
    )


# ------------------------------------------------------------------ arrays, tensors, lists
def _numeric(values: Tensor, type_: Type) -> RawTable:
    """A table of one type; 1-d input is one column."""
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise ValueError(
            f"data must have 1 or 2 dimensions (rows, columns), but the shape is "
            f"{tuple(values.shape)}; flatten the trailing ones by x.reshape(len(x), -1)."
            if values.ndim
            else f"data must have 1 or 2 dimensions (rows, columns), but got the single number "
            f"{float(values):g}; pass [[{float(values):g}]]."
        )
    d = values.shape[1]
    return RawTable(None, values, (type_,) * d, (None,) * d, (False,) * d)


def _from_tensor(x: Tensor) -> RawTable:
    if x.layout != torch.strided or x.is_quantized:
        raise ValueError("got a sparse or quantised tensor; pass x.to_dense() or x.dequantize().")
    if x.is_complex():
        raise ValueError(f"data must be real, but the tensor is {x.dtype}; pass x.real or x.abs().")
    x = x.detach()
    if x.dtype == torch.bool:
        return _numeric(x.to(torch.float64), "bool")
    if x.is_floating_point():
        return _numeric(x if x.dtype == torch.float64 else x.to(torch.float32), "real")
    if x.numel():
        low, high = x.aminmax()
        _check_exact(int(low), int(high), None)
    return _numeric(x.to(torch.float64), "integer")


def _from_array(x: NDArray[Any]) -> RawTable:
    if isinstance(x, np.ma.MaskedArray):
        mask, data = np.ma.getmaskarray(x), _from_array(x.data)
        missing = torch.from_numpy(mask.reshape(data.values.shape))
        return data._replace(values=data.values.masked_fill(missing, torch.nan))
    if x.dtype.names is not None:
        raise ValueError("got a structured array; pass pandas.DataFrame(x).")
    if x.dtype.kind in "US" or (x.dtype.kind == "O" and _holds_text(x)):
        raise ValueError(
            "an array must hold numbers, but this one holds text; for a table with text columns "
            "pass pandas.DataFrame(x, columns=[...]), else convert by x.astype(float)."
        )
    if x.dtype == np.float32 or x.dtype == np.float64:
        plain = x if x.dtype.isnative and x.flags.writeable and _forward(x) else x.astype(x.dtype.type)
        return _numeric(torch.from_numpy(plain), "real")
    flat, type_ = _numbers(x.reshape(-1), None)
    return _numeric(torch.from_numpy(flat).reshape(x.shape), type_)


def _forward(x: NDArray[Any]) -> bool:
    """Whether torch can share the memory: it knows no negative strides."""
    return all(stride >= 0 for stride in x.strides)


def _holds_text(x: NDArray[Any]) -> bool:
    return any(issubclass(t, (str, bytes)) for t in set(map(type, x.ravel().tolist())))


def _from_sequence(x: object) -> NDArray[Any]:
    """Lists and whatever numpy understands."""
    what = f"data must be {ALLOWED}, but got {type(x).__name__}"
    if isinstance(x, (str, bytes, set, frozenset)) or x is None:
        raise TypeError(f"{what}.")
    if isinstance(x, Sequence) and any(isinstance(row, Mapping) for row in x):
        raise TypeError("got a list of dicts; pass pandas.DataFrame(rows).")
    try:
        array = np.asarray(x)
    except ValueError as error:
        lengths = [len(row) if isinstance(row, Sequence) else 1 for row in x]  # type: ignore[attr-defined]
        bad = next((i for i, n in enumerate(lengths) if n != lengths[0]), 0)
        raise ValueError(
            f"all rows need the same number of values, but row 0 has {lengths[0]} and row {bad} "
            f"has {lengths[bad]}; write NaN for missing ones."
        ) from error
    if array.ndim == 0 and array.dtype.kind == "O":
        raise TypeError(f"{what}.")
    return array


# ------------------------------------------------------------------ one column
def _in(name: str | None) -> str:
    return "the data" if name is None else f"column {name!r}"


def _check_exact(low: int, high: int, name: str | None) -> None:
    """Integers beyond 2**53 would be rounded in float64."""
    worst = high if high >= -low else low
    if abs(worst) > 2**53:
        raise ValueError(
            f"{_in(name)} holds the integer {worst}, beyond 2**53, which float64 cannot hold "
            f"exactly; if it is an identifier leave it out, else convert by .astype(float)."
        )


def _refuse(name: str | None, dtype: object) -> ValueError:
    text = str(dtype)
    fix = "leave it out with columns=[...]"
    if any(word in text.lower() for word in ("date", "time", "duration", "period", "m8")):
        fix = "convert it to a number, such as days since the first, or " + fix
    if "complex" in text:
        fix = "pass its real part or modulus"
    return ValueError(
        f"{_in(name)} is {text}; columns must hold numbers, booleans, text or categories: {fix}."
    )


def _numbers(x: NDArray[Any], name: str | None) -> tuple[NDArray[np.float64], Type]:
    """One-dimensional numbers as float64, missing as NaN, and what they were."""
    kind = x.dtype.kind
    if kind == "b":
        return x.astype(np.float64), "bool"
    if kind in "iu":
        if x.size:
            _check_exact(int(x.min()), int(x.max()), name)
        return x.astype(np.float64), "integer"
    if kind == "f":
        return x.astype(np.float64), "real"
    if kind == "O":
        return _object_numbers(x, name)
    raise _refuse(name, x.dtype)


def _is_missing(value: object) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    return isinstance(value, float) and math.isnan(value)


def _object_numbers(x: NDArray[Any], name: str | None) -> tuple[NDArray[np.float64], Type]:
    values = x.tolist()
    out = np.full(len(values), np.nan)
    kinds: set[Type] = set()
    for i, value in enumerate(values):
        if _is_missing(value):
            continue
        if isinstance(value, (bool, np.bool_)):
            kinds.add("bool")
        elif isinstance(value, (int, np.integer)):
            _check_exact(int(value), int(value), name)
            kinds.add("integer")
        elif isinstance(value, (complex, np.complexfloating)) or isinstance(value, (list, tuple)):
            raise _refuse(name, type(value).__name__)
        else:
            kinds.add("real")
        try:
            out[i] = float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"row {i} of {_in(name)} holds {value!r} of type {type(value).__name__} among "
                f"numbers; correct it, or use None for a missing value."
            ) from None
    return out, kinds.pop() if len(kinds) == 1 else "real"


def factorise(values: Sequence[object]) -> tuple[NDArray[np.float64], Levels]:
    """Codes (NaN = missing) into the sorted distinct strings of ``values``."""
    texts = [None if _is_missing(v) else str(v) for v in values]
    levels = tuple(sorted({t for t in texts if t is not None}))
    where: dict[str | None, float] = {t: float(i) for i, t in enumerate(levels)}
    where[None] = math.nan
    return np.fromiter((where[t] for t in texts), np.float64, len(texts)), levels


def _column(x: NDArray[Any], name: str) -> RawColumn:
    """A column of a table from a 1-d array of any type; text is allowed here."""
    if x.ndim != 1:
        raise ValueError(f"column {name!r} has shape {x.shape}; a column must be 1-dimensional.")
    if isinstance(x, np.ma.MaskedArray):
        column, mask = _column(x.data, name), np.ma.getmaskarray(x)
        return column._replace(values=np.where(mask, np.nan, column.values))
    if x.dtype.kind in "OU":
        values = x.tolist()
        texts = [isinstance(v, str) for v in values]
        if any(texts):
            for row, (value, is_text) in enumerate(zip(values, texts, strict=True)):
                if not is_text and not _is_missing(value):
                    text = values[texts.index(True)]
                    raise ValueError(
                        f"column {name!r} mixes text ({text!r} in row {texts.index(True)}) with "
                        f"{type(value).__name__} ({value!r} in row {row}); make it one of them."
                    )
            codes, levels = factorise(values)
            return RawColumn(codes, "text", levels)
    return RawColumn(*_numbers(x, name))


def _codes(codes: NDArray[Any], levels: Sequence[object], *, declared: bool) -> RawColumn:
    """A column that came as codes, -1 = missing."""
    values = np.where(codes < 0, np.nan, codes.astype(np.float64))
    return RawColumn(values, "text", tuple(str(level) for level in levels), declared)


# ------------------------------------------------------------------ frames
def _from_pandas(x: object) -> RawTable | None:
    import pandas as pd

    if isinstance(x, pd.Series):
        column = _pandas_column(x, "data" if x.name is None else str(x.name))
        table = stack({"" if x.name is None else str(x.name): column})
        return table._replace(names=None) if x.name is None and column.type != "text" else table
    if not isinstance(x, pd.DataFrame):
        return None
    names = _names(x.columns)
    return stack({name: _pandas_column(x.iloc[:, i], name) for i, name in enumerate(names)})


def _names(given: Sequence[object]) -> list[str]:
    names = [str(name) for name in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"column {name!r} occurs more than once; keep the first, in pandas by "
                f"frame.loc[:, ~frame.columns.duplicated()], or rename."
            )
    return names


def _pandas_column(x: pd.Series[Any], name: str) -> RawColumn:
    import pandas as pd

    dtype = x.dtype
    if isinstance(dtype, pd.SparseDtype):
        x = x.sparse.to_dense()
        dtype = x.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return _codes(x.cat.codes.to_numpy(), list(dtype.categories), declared=True)
    types = pd.api.types
    if types.is_string_dtype(dtype) and not types.is_object_dtype(dtype):
        codes, levels = pd.factorize(x, sort=True)
        return _codes(codes, list(levels), declared=False)
    if types.is_object_dtype(dtype):
        return _column(x.to_numpy(dtype=object), name)
    if types.is_bool_dtype(dtype):
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "bool")
    if types.is_integer_dtype(dtype):
        if x.notna().any():
            _check_exact(int(x.min()), int(x.max()), name)
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "integer")
    if types.is_float_dtype(dtype):
        return RawColumn(x.to_numpy(dtype=np.float64, na_value=np.nan), "real")
    raise _refuse(name, dtype)


def _from_polars(x: object) -> RawTable | None:
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
        return _codes(codes, dtype.categories.to_list(), declared=True)
    if dtype.is_integer() and x.null_count() < len(x):
        _check_exact(int(x.min()), int(x.max()), name)  # type: ignore[arg-type]
    if not (dtype.is_numeric() or dtype == pl.Boolean or dtype == pl.Null):
        raise _refuse(name, dtype)
    type_: Type = "integer" if dtype.is_integer() else "bool" if dtype == pl.Boolean else "real"
    return RawColumn(x.cast(pl.Float64).fill_null(math.nan).to_numpy(), type_)


def _from_pyarrow(x: object) -> RawTable | None:
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
    if declared and not (pa.types.is_string(t.value_type) or pa.types.is_large_string(t.value_type)):
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
            _check_exact(extremes["min"], extremes["max"], name)
        return RawColumn(_arrow_numbers(x), "integer")
    if pa.types.is_floating(t) or pa.types.is_decimal(t) or pa.types.is_null(t):
        return RawColumn(_arrow_numbers(x), "real")
    raise _refuse(name, t)


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
    return _codes(rank[codes], [texts[i] for i in order], declared=declared)


def _from_xarray(x: object) -> RawTable | None:
    import xarray as xr

    if isinstance(x, xr.Dataset):
        return _xarray_dataset(x)
    if not isinstance(x, xr.DataArray):
        return None
    if x.ndim == 1 and x.name is not None:
        return stack({str(x.name): _column(x.values, str(x.name))})
    raw = _from_array(x.values)
    labels = x.coords.get(x.dims[1]) if x.ndim == 2 else None
    return raw if labels is None else raw._replace(names=tuple(_names(labels.values.tolist())))


def _xarray_dataset(x: xr.Dataset) -> RawTable:
    for name, variable in x.data_vars.items():
        if variable.ndim != 1 or variable.dims != next(iter(x.data_vars.values())).dims:
            raise ValueError(
                f"variable {name!r} has dimensions {variable.dims}; a Dataset needs 1-dimensional "
                f"variables that share one dimension, such as x.to_dataframe() gives."
            )
    return stack({str(k): _column(v.values, str(k)) for k, v in x.data_vars.items()})


_CONVERTERS: Mapping[str, Callable[[object], RawTable | None]] = {
    "pandas": _from_pandas,
    "polars": _from_polars,
    "pyarrow": _from_pyarrow,
    "xarray": _from_xarray,
}
