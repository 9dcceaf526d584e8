"""The columns of a table: names, kinds, levels - learnt from the first data, then held against new data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

__all__ = ["Kind", "RawTable", "Schema", "SchemaScan", "encode"]

Kind = Literal["real", "count", "binary", "category"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_LEVELS = 10_000
Levels = tuple[str, ...]


class RawTable(NamedTuple):
    """Some rows as they came: numbers, and codes into the levels found in these rows."""

    names: tuple[str, ...] | None
    """Names of the columns; None when the input had none, and columns are matched by position."""
    values: Tensor
    """``(m, d)`` in float32 or float64, NaN = missing; text columns hold codes into ``levels``."""
    types: tuple[Literal["real", "integer", "bool", "text"], ...]
    levels: tuple[Levels | None, ...]
    """What the codes of a text column mean."""
    declared: tuple[bool, ...]
    """Whether the input itself calls the column a categorical, so that its levels are meant."""


@dataclass(frozen=True)
class Schema:
    """Names, kinds and levels of the columns of a data set.

    Args:
        columns: Names, all different.
        kinds: ``"real"``, ``"count"``, ``"binary"`` or ``"category"`` for each column.
        levels: The levels of each category column, whose code is its position; None for others.

    Example:
        >>> schema = Schema(("x", "colour"), ("real", "category"), (None, ("blue", "red")))
        >>> Schema.from_config(schema.to_config()) == schema
        True
    """

    columns: tuple[str, ...]
    kinds: tuple[Kind, ...]
    levels: tuple[Levels | None, ...]

    def __post_init__(self) -> None:
        if not len(self.columns) == len(self.kinds) == len(self.levels):
            raise ValueError(
                f"a schema needs one kind and one levels entry for each column, but got "
                f"{len(self.columns)} columns, {len(self.kinds)} kinds, {len(self.levels)} levels."
            )
        check_unique(self.columns)
        for column, kind, levels in zip(self.columns, self.kinds, self.levels, strict=True):
            if kind not in KINDS:
                raise ValueError(
                    f"column {column!r} has kind {kind!r}; allowed are {', '.join(KINDS)}."
                )
            if (kind == "category") != (levels is not None):
                raise ValueError(
                    f"column {column!r} of kind {kind!r} has levels {levels!r}; category columns, "
                    f"and they alone, have levels."
                )

    def to_config(self) -> dict[str, Any]:
        """The schema as JSON values."""
        return {
            "columns": list(self.columns),
            "kinds": list(self.kinds),
            "levels": [None if levels is None else list(levels) for levels in self.levels],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_config`."""
        return cls(
            tuple(config["columns"]),
            tuple(config["kinds"]),
            tuple(None if levels is None else tuple(levels) for levels in config["levels"]),
        )


def check_unique(names: Sequence[str]) -> None:
    """Refuse duplicate and missing names."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"column {name!r} occurs more than once; rename or drop one, in pandas for example "
                f"by frame.loc[:, ~frame.columns.duplicated()]."
            )
        seen.add(name)


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


def check_finite(raw: RawTable, names: Sequence[str], offset: int) -> None:
    """Refuse infinite entries, naming the first."""
    bad = raw.values.isinf()
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"row {row + offset}, column {names[column]!r} is {float(raw.values[row, column])}; "
            f"data must be finite, with NaN for a missing value. Replace infinities, for example by "
            f"x[np.isinf(x)] = np.nan."
        )


# ------------------------------------------------------------------ learning a schema
@dataclass
class _Seen:
    """What a scan knows about one column so far."""

    types: set[str] = field(default_factory=set)
    num_observed: int = 0
    negative: bool = False
    fractional: bool = False
    not_binary: tuple[int, float] | None = None
    levels: dict[str, None] = field(default_factory=dict)
    same_levels: bool = True
    declared: bool = False
    num_numeric_text: int = 0
    not_number: tuple[int, str] | None = None


class SchemaScan:
    """Learns a schema from rows that arrive in pieces; the pieces' sizes do not matter."""

    def __init__(self, names: Sequence[str], kinds: Mapping[str, Kind] | Kind | None) -> None:
        check_unique(names)
        self.names = tuple(names)
        self.kinds = _wanted_kinds(self.names, kinds)
        self.num_rows = 0
        self._seen = [_Seen() for _ in self.names]

    def update(self, raw: RawTable) -> None:
        """Take in the next rows."""
        check_finite(raw, self.names, self.num_rows)
        for i, name in enumerate(self.names):
            values = raw.values[:, i]
            observed = ~values.isnan()
            num_observed = int(observed.sum())
            if num_observed == 0:
                continue
            seen = self._seen[i]
            seen.num_observed += num_observed
            seen.types.add(raw.types[i])
            if raw.types[i] == "text":
                self._see_text(seen, raw, i, observed)
            else:
                self._see_numbers(seen, values, raw.types[i], self.kinds.get(name))
            if len(seen.levels) > MAX_LEVELS:
                raise ValueError(
                    f"column {name!r} has more than {MAX_LEVELS} levels: it looks like an "
                    f"identifier or free text. Leave it out with columns=[...]."
                )
        self.num_rows += len(raw.values)

    def _see_numbers(
        self, seen: _Seen, values: Tensor, type_: str, wanted: Kind | None
    ) -> None:
        observed = values[~values.isnan()]
        seen.negative |= bool((observed < 0).any())
        if wanted == "count":
            seen.fractional |= bool((observed != observed.floor()).any())
        if wanted == "binary" and seen.not_binary is None:
            bad = (values != 0) & (values != 1) & ~values.isnan()
            if bool(bad.any()):
                row = first_row(bad)
                seen.not_binary = (self.num_rows + row, float(values[row]))
        if wanted == "category":
            for value in observed.unique().tolist():
                seen.levels.setdefault(label(value, is_bool=type_ == "bool"))
            seen.same_levels = False

    def _see_text(self, seen: _Seen, raw: RawTable, i: int, observed: Tensor) -> None:
        levels = raw.levels[i] or ()
        if seen.levels and tuple(seen.levels) != levels:
            seen.same_levels = False
        seen.declared |= raw.declared[i]
        seen.levels.update(dict.fromkeys(levels))
        codes = raw.values[:, i].nan_to_num(nan=0.0).long()
        numeric = torch.tensor([is_number(level) for level in levels])[codes]
        seen.num_numeric_text += int((numeric & observed).sum())
        wrong = ~numeric & observed
        if seen.not_number is None and bool(wrong.any()):
            row = first_row(wrong)
            seen.not_number = (self.num_rows + row, levels[int(codes[row])])

    def finish(self) -> Schema:
        """The schema of all rows seen, or an error that names the column that has none."""
        kinds: list[Kind] = []
        levels: list[Levels | None] = []
        for name, seen in zip(self.names, self._seen, strict=True):
            wanted = self.kinds.get(name)
            if seen.num_observed == 0:
                raise ValueError(
                    f"column {name!r} has no observed value; leave it out with columns=[...]."
                )
            kind = _infer(seen) if wanted is None else wanted
            _check_kind(name, seen, kind, wanted)
            kinds.append(kind)
            if kind == "category":
                keep = seen.declared and seen.same_levels
                levels.append(tuple(seen.levels) if keep else tuple(_sort_levels(seen.levels)))
            else:
                levels.append(None)
        return Schema(self.names, tuple(kinds), tuple(levels))


def _wanted_kinds(
    names: Sequence[str], kinds: Mapping[str, Kind] | Kind | None
) -> Mapping[str, Kind]:
    if kinds is None:
        return {}
    wanted = dict.fromkeys(names, kinds) if isinstance(kinds, str) else dict(kinds)
    for name, kind in wanted.items():
        if name not in names:
            raise ValueError(f"kinds names column {name!r}, but the columns are {shorten(names)}.")
        if kind not in KINDS:
            raise ValueError(
                f"column {name!r} is given kind {kind!r}; allowed are {', '.join(KINDS)}."
            )
    return wanted


def _infer(seen: _Seen) -> Kind:
    if "text" in seen.types:
        return "category"
    if seen.types == {"bool"}:
        return "binary"
    return "count" if seen.types == {"integer"} and not seen.negative else "real"


def _check_kind(name: str, seen: _Seen, kind: Kind, wanted: Kind | None) -> None:
    """Refuse data that contradict the kind asked for, or text that is hardly a category."""
    is_text = "text" in seen.types
    if wanted in ("real", "count", "binary") and is_text:
        row, text = seen.not_number or (0, "a number written as text")
        raise ValueError(f"column {name!r} is to be {wanted}, but row {row} holds text, {text!r}.")
    if wanted == "count" and (seen.negative or seen.fractional):
        what = "negative" if seen.negative else "fractional"
        raise ValueError(
            f"column {name!r} is to be a count, but has {what} values; use kinds={{{name!r}: 'real'}}."
        )
    if wanted == "binary" and seen.not_binary is not None:
        row, value = seen.not_binary
        raise ValueError(
            f"column {name!r} is to be binary (0 or 1), but row {row} holds {value:g}; "
            f"use kinds={{{name!r}: 'category'}}."
        )
    if wanted is not None or not is_text:
        return
    hint = f"or declare it with kinds={{{name!r}: 'category'}}."
    if len(seen.types) > 1 or (not seen.declared and 2 * seen.num_numeric_text > seen.num_observed):
        if seen.not_number is None:
            raise ValueError(
                f"column {name!r} holds numbers written as text; convert it, in pandas by "
                f"frame[{name!r}].astype(float), {hint}"
            )
        row, text = seen.not_number
        raise ValueError(
            f"column {name!r} holds numbers, but row {row} holds the text {text!r}; correct the "
            f"cell (leave it empty if it is missing), {hint}"
        )
    if not seen.declared and len(seen.levels) == seen.num_observed > 20:
        raise ValueError(
            f"column {name!r} holds text that is different in every row, like an identifier; leave "
            f"it out with columns=[...], {hint}"
        )


def _sort_levels(levels: Mapping[str, None]) -> list[str]:
    """Sorted: as numbers where all are."""
    key: Callable[[str], Any] = float if all(map(is_number, levels)) else str
    return sorted(levels, key=key)


# ------------------------------------------------------------------ holding a schema against rows
def match_columns(raw: RawTable, schema: Schema) -> list[int]:
    """Where each column of the schema stands in ``raw``: by name, or by position without names."""
    if raw.names is None:
        if raw.values.shape[1] != len(schema.columns):
            n, d = raw.values.shape
            row = " For a single row pass x[None, :]." if d == 1 and n == len(schema.columns) else ""
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
    extra = [name for name in raw.names if name not in schema.columns]
    if extra:
        raise ValueError(
            f"unknown column{'s' * (len(extra) > 1)} {shorten(extra)}; needed are "
            f"{shorten(schema.columns)}. Leave the others out with columns=[...], in pandas by "
            f"frame[[...]]."
        )
    return [where[name] for name in schema.columns]


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


def encode(raw: RawTable, schema: Schema, offset: int = 0) -> Tensor:
    """The rows as ``(m, d)`` numbers in the schema's order, checked; ``offset`` is the first's row number.

    Raises:
        ValueError: For columns that do not match, infinite entries, text in a number column, unknown
            levels, and entries other than 0 and 1 in a binary column.
    """
    order = match_columns(raw, schema)
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
                    f"row {row + offset}, column {name!r} holds {float(column[row]):g}, but the column "
                    f"is binary: pass 0, 1, or NaN for a missing value."
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
    where = {level: code for code, level in enumerate(levels)}
    table = torch.tensor([where.get(level, -1) for level in given], device=column.device)
    new = table[codes].to(column.dtype)
    unknown = (new < 0) & ~missing
    if bool(unknown.any()):
        row = first_row(unknown)
        raise ValueError(
            f"row {row + offset}, column {name!r} holds the unknown level {given[int(codes[row])]!r}; "
            f"allowed are {shorten(levels)}, or a missing value."
        )
    return torch.where(missing, torch.nan, new)
