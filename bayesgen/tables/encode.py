"""Holding a schema against rows: columns matched, categories coded, the rest refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesgen.schema import Levels, Schema, check_unique
from bayesgen.tables.raw import RawTable, first_row, is_number, label, shorten

__all__ = ["check_finite", "encode", "match_columns"]


def check_finite(raw: RawTable, names: Sequence[str], offset: int) -> bool:
    """Refuse infinite entries, naming the first; say whether all are proven to be there."""
    # A finite sum proves all entries finite, without a mask as large as the data.
    if bool(raw.values.sum().isfinite()):
        return True
    bad = raw.values.isinf()
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"row {row + offset}, column {names[column]!r} is {float(raw.values[row, column])}; "
            f"data must be finite, with NaN for a missing value. Replace infinities, for example "
            f"by "
            f"x[np.isinf(x)] = np.nan."
        )
    return False


def match_columns(raw: RawTable, schema: Schema) -> list[int]:
    """Where each column of the schema stands in ``raw``: by name, or by position without names."""
    if raw.names is None:
        if raw.values.shape[1] != len(schema.columns):
            n, d = raw.values.shape
            row = (
                " For a single row pass x[None, :]." if d == 1 and n == len(schema.columns) else ""
            )
            raise ValueError(
                f"got {d} column{'s' * (d != 1)}, but {len(schema.columns)} are needed: "
                f"{shorten(schema.columns)}.{row}"
            )
        return list(range(raw.values.shape[1]))
    check_unique(raw.names)
    where = {name: i for i, name in enumerate(raw.names)}
    missing = [name for name in schema.columns if name not in where]
    if missing:
        raise ValueError(
            f"missing column{'s' * (len(missing) > 1)} {shorten(missing)}; got "
            f"{shorten(raw.names)}. Rename the columns, fill an unknown one with NaN, or pass "
            f"an array without names to match by position."
        )
    known = set(schema.columns)
    extra = [name for name in raw.names if name not in known]
    if extra:
        raise ValueError(
            f"unknown column{'s' * (len(extra) > 1)} {shorten(extra)}; needed are "
            f"{shorten(schema.columns)}. Leave the others out with columns=[...], in pandas by "
            f"frame[[...]]."
        )
    return [where[name] for name in schema.columns]


def encode(raw: RawTable, schema: Schema, offset: int = 0, *, is_finite: bool = False) -> Tensor:
    """The rows as ``(m, d)`` checked numbers in the schema's order; ``offset`` counts rows before.

    ``is_finite`` says that infinities have been looked for already.

    Raises:
        ValueError: For columns that do not match, infinite entries, text in a number column,
        unknown
            levels, and entries other than 0 and 1 in a binary column.
    """
    order = match_columns(raw, schema)
    if not is_finite:
        check_finite(raw, [schema.columns[order.index(i)] for i in range(len(order))], offset)
    values = raw.values
    if order != list(range(len(order))):
        values = values[:, order]
    codes: dict[int, Tensor] = {}
    for i, (name, kind) in enumerate(zip(schema.columns, schema.kinds, strict=True)):
        column = values[:, i]
        if kind == "category":
            codes[i] = _recode(raw, order[i], name, schema.levels[i] or (), offset)
        elif raw.types[order[i]] == "text" and not bool(column.isnan().all()):
            row = first_row(~column.isnan())
            text = (raw.levels[order[i]] or ())[int(column[row])]
            raise ValueError(
                f"row {row + offset}, column {name!r} holds text, {text!r}, but the column is "
                f"{kind}: pass a number, or NaN for a missing value."
            )
        elif kind == "binary":
            bad = (column != 0) & (column != 1) & ~column.isnan()
            if bool(bad.any()):
                row = first_row(bad)
                raise ValueError(
                    f"row {row + offset}, column {name!r} holds {float(column[row]):g}, but the "
                    f"column is binary: pass 0, 1, or NaN for a missing value."
                )
    if codes:
        values = values.clone()
        for i, column in codes.items():
            values[:, i] = column
    return values


def _recode(raw: RawTable, i: int, name: str, levels: Levels, offset: int) -> Tensor:
    """Codes of one column in terms of the schema's levels."""
    column = raw.values[:, i]
    missing = column.isnan()
    if raw.types[i] == "text":
        given, codes = raw.levels[i] or (), column.nan_to_num(nan=0.0).long()
    else:
        unique, codes = column.nan_to_num(nan=0.0).unique(return_inverse=True)
        given = tuple(label(v, is_bool=raw.types[i] == "bool") for v in unique.tolist())
    if not given:
        return column
    if raw.names is None and raw.types[i] != "text":
        levels = _array_levels(name, levels)
    where = {level: code for code, level in enumerate(levels)}
    table = torch.tensor([where.get(level, -1) for level in given], device=column.device)
    new = table[codes].to(column.dtype)
    unknown = (new < 0) & ~missing
    if bool(unknown.any()):
        row = first_row(unknown)
        raise ValueError(
            f"row {row + offset}, column {name!r} holds the unknown level "
            f"{given[int(codes[row])]!r}; allowed are {shorten(levels)}, or a missing value."
        )
    return torch.where(missing, torch.nan, new)


def _array_levels(name: str, levels: Levels) -> Levels:
    """What numbers in an array without names stand for: codes, unless they could be levels too."""
    codes = tuple(str(code) for code in range(len(levels)))
    if levels != codes and any(is_number(level) for level in levels):
        raise ValueError(
            f"column {name!r} has the levels {shorten(levels)}: numbers in an array without names "
            f"could be levels or codes. Pass a table with named columns (levels), or "
            f"Dataset.from_codes(x, schema)."
        )
    return codes
