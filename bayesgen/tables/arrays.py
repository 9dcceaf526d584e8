"""Arrays, tensors and lists as raw tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesgen.tables.columns import check_exact, numbers
from bayesgen.tables.raw import RawTable, Type

__all__ = ["ALLOWED", "from_array", "from_sequence", "from_tensor"]

ALLOWED = (
    "a numpy array, torch tensor or list of numbers with 1 or 2 dimensions, a pandas, polars or "
    "pyarrow table, a dict of columns, an xarray Dataset or DataArray, or the path of a .csv, "
    ".tsv, .parquet or .npy file"
)


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


def from_tensor(x: Tensor) -> RawTable:
    """A tensor on any device, where it stays."""
    if x.layout != torch.strided or x.is_quantized:
        raise ValueError("got a sparse or quantised tensor; pass x.to_dense() or x.dequantize().")
    if x.is_complex():
        raise ValueError(
            f"data must be real, but the tensor is {x.dtype}; pass x.real or x.abs()."
        )
    x = x.detach()
    if x.dtype == torch.bool:
        return _numeric(x.to(torch.float64), "bool")
    if x.is_floating_point():
        return _numeric(x if x.dtype == torch.float64 else x.to(torch.float32), "real")
    if x.numel():
        low, high = x.aminmax()
        check_exact(int(low), int(high), None)
    return _numeric(x.to(torch.float64), "integer")


def from_array(x: NDArray[Any]) -> RawTable:
    """A numpy array of numbers; float32 and float64 share its memory."""
    if isinstance(x, np.ma.MaskedArray):
        mask, data = np.ma.getmaskarray(x), from_array(x.data)
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
        plain = (
            x if x.dtype.isnative and x.flags.writeable and _forward(x) else x.astype(x.dtype.type)
        )
        return _numeric(torch.from_numpy(plain), "real")
    flat, type_ = numbers(x.reshape(-1), None)
    return _numeric(torch.from_numpy(flat).reshape(x.shape), type_)


def _forward(x: NDArray[Any]) -> bool:
    """Whether torch can share the memory: it knows no negative strides."""
    return all(stride >= 0 for stride in x.strides)


def _holds_text(x: NDArray[Any]) -> bool:
    return any(issubclass(t, (str, bytes)) for t in set(map(type, x.ravel().tolist())))


def from_sequence(x: object) -> NDArray[Any]:
    """Lists and whatever numpy understands."""
    what = f"data must be {ALLOWED}, but got {type(x).__name__}"
    if isinstance(x, (str, bytes, set, frozenset)) or x is None:
        raise TypeError(f"{what}.")
    if isinstance(x, Sequence) and any(isinstance(row, Mapping) for row in x):
        raise TypeError("got a list of dicts; pass pandas.DataFrame(rows).")
    try:
        array = np.asarray(x)
    except ValueError as error:
        rows = x if isinstance(x, Sequence) else ()
        lengths = [len(row) if isinstance(row, Sequence) else 1 for row in rows]
        bad = next((i for i, n in enumerate(lengths) if n != lengths[0]), None)
        if bad is None:
            raise ValueError(f"{what} that numpy cannot read: {error}.") from error
        raise ValueError(
            f"all rows need the same number of values, but row 0 has {lengths[0]} and row {bad} "
            f"has {lengths[bad]}; write NaN for missing ones."
        ) from error
    if array.ndim == 0 and array.dtype.kind == "O":
        raise TypeError(f"{what}.")
    return array
