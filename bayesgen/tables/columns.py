"""One column of any type as numbers, or as codes into levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayesgen.schema import Levels
from bayesgen.tables.raw import RawColumn, Type

__all__ = ["check_exact", "codes_column", "factorise", "numbers", "refuse", "text_or_numbers"]


def _in(name: str | None) -> str:
    return "the data" if name is None else f"column {name!r}"


def check_exact(low: int, high: int, name: str | None) -> None:
    """Integers beyond 2**53 would be rounded in float64."""
    worst = high if high >= -low else low
    if abs(worst) > 2**53:
        raise ValueError(
            f"{_in(name)} holds the integer {worst}, beyond 2**53, which float64 cannot hold "
            f"exactly; if it is an identifier leave it out, else convert by .astype(float)."
        )


def refuse(name: str | None, dtype: object) -> ValueError:
    """The error for a column of a type that cannot be used."""
    text = str(dtype)
    fix = "leave it out with columns=[...]"
    if any(word in text.lower() for word in ("date", "time", "duration", "period", "m8")):
        fix = "convert it to a number, such as days since the first, or " + fix
    if "complex" in text:
        fix = "pass its real part or modulus"
    return ValueError(
        f"{_in(name)} is {text}; columns must hold numbers, booleans, text or categories: {fix}."
    )


def numbers(x: NDArray[Any], name: str | None) -> tuple[NDArray[np.float64], Type]:
    """One-dimensional numbers as float64, missing as NaN, and what they were."""
    kind = x.dtype.kind
    if kind == "b":
        return x.astype(np.float64), "bool"
    if kind in "iu":
        if x.size:
            check_exact(int(x.min()), int(x.max()), name)
        return x.astype(np.float64), "integer"
    if kind == "f":
        return x.astype(np.float64), "real"
    if kind == "O":
        return _object_numbers(x, name)
    raise refuse(name, x.dtype)


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
            check_exact(int(value), int(value), name)
            kinds.add("integer")
        elif isinstance(value, (complex, np.complexfloating)) or isinstance(value, (list, tuple)):
            raise refuse(name, type(value).__name__)
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


def text_or_numbers(x: NDArray[Any], name: str) -> RawColumn:
    """A column of a table from a 1-d array of any type; text is allowed here."""
    if x.ndim != 1:
        raise ValueError(f"column {name!r} has shape {x.shape}; a column must be 1-dimensional.")
    if isinstance(x, np.ma.MaskedArray):
        column, mask = text_or_numbers(x.data, name), np.ma.getmaskarray(x)
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
    return RawColumn(*numbers(x, name))


def codes_column(codes: NDArray[Any], levels: Sequence[object], *, declared: bool) -> RawColumn:
    """A column that came as codes, -1 = missing."""
    values = np.where(codes < 0, np.nan, codes.astype(np.float64))
    return RawColumn(values, "text", tuple(str(level) for level in levels), declared)
