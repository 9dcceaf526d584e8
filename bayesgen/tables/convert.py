"""From what users hold - arrays, tensors, frames - to raw tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from bayesgen.tables.arrays import from_array, from_sequence, from_tensor
from bayesgen.tables.columns import text_or_numbers
from bayesgen.tables.frames import from_pandas, from_polars, from_pyarrow, from_xarray
from bayesgen.tables.raw import RawTable, stack

__all__ = ["raw_table"]


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
        return from_tensor(x)
    if isinstance(x, Mapping):
        return stack({str(k): text_or_numbers(np.asarray(v), str(k)) for k, v in x.items()})
    if isinstance(x, np.ndarray):
        return from_array(x)
    if type(x).__module__.startswith("scipy.sparse"):
        raise TypeError("got a sparse matrix; pass x.toarray().")
    return from_array(from_sequence(x))


_CONVERTERS: Mapping[str, Callable[[object], RawTable | None]] = {
    "pandas": from_pandas,
    "polars": from_polars,
    "pyarrow": from_pyarrow,
    "xarray": from_xarray,
}
