"""Rows as they came: numbers, and codes into the levels that were found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesgen.schema import Levels

__all__ = [
    "RawColumn",
    "RawTable",
    "Type",
    "default_names",
    "first_row",
    "is_number",
    "label",
    "select",
    "shorten",
    "stack",
]

Type = Literal["real", "integer", "bool", "text"]


class RawTable(NamedTuple):
    """Some rows as they came: numbers, and codes into the levels found in these rows."""

    names: tuple[str, ...] | None
    """Names of the columns; None when the input had none, and columns are matched by position."""
    values: Tensor
    """``(m, d)`` in float32 or float64, NaN = missing; text columns hold codes into ``levels``."""
    types: tuple[Type, ...]
    levels: tuple[Levels | None, ...]
    """What the codes of a text column mean."""
    declared: tuple[bool, ...]
    """Whether the input itself calls the column a categorical, so that its levels are meant."""


class RawColumn(NamedTuple):
    """One column as it came."""

    values: NDArray[np.float64]
    type: Type
    levels: Levels | None = None
    declared: bool = False


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


def select(raw: RawTable, columns: Sequence[str]) -> RawTable:
    """Give names to columns that have none, or keep the named ones in the order asked for."""
    if raw.names is None:
        if len(columns) != raw.values.shape[1]:
            raise ValueError(
                f"columns has {len(columns)} names ({shorten(columns)}), but the data have "
                f"{raw.values.shape[1]} columns."
            )
        return raw._replace(names=tuple(columns))
    where = {name: i for i, name in enumerate(raw.names)}
    if absent := [name for name in columns if name not in where]:
        raise ValueError(f"there is no column {shorten(absent)}; there are {shorten(raw.names)}.")
    order = [where[name] for name in columns]
    return RawTable(
        tuple(columns),
        raw.values[:, order],
        tuple(raw.types[i] for i in order),
        tuple(raw.levels[i] for i in order),
        tuple(raw.declared[i] for i in order),
    )


def default_names(num_columns: int) -> tuple[str, ...]:
    """Names of the columns of an array: ``x0``, ``x1``, ..."""
    return tuple(f"x{i}" for i in range(num_columns))


def label(value: float, *, is_bool: bool = False) -> str:
    """How a number is written as a level."""
    if is_bool:
        return str(bool(value))
    return str(int(value)) if value.is_integer() else repr(value)


def is_number(text: str) -> bool:
    """Whether ``text`` would be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def shorten(items: Sequence[str], limit: int = 10) -> str:
    """Names for a message, the first few of many."""
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(repr(item) for item in items[:limit]) + more


def first_row(mask: Tensor) -> int:
    """Position of the first true entry."""
    return int(mask.nonzero()[0, 0])
