"""Learning a schema from rows that arrive in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesgen.schema import KINDS, Kind, Levels, Schema, check_unique
from bayesgen.tables.encode import check_finite
from bayesgen.tables.raw import RawTable, first_row, is_number, label, shorten

__all__ = ["MAX_LEVELS", "SchemaScan"]

MAX_LEVELS = 10_000


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
    are_codes: bool = False


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
        complete = check_finite(raw, self.names, self.num_rows)
        values, n = raw.values, len(raw.values)
        if n and complete:
            observed = torch.ones((), dtype=torch.bool).expand(values.shape)
            counts = [n] * len(self.names)
        else:
            observed = ~values.isnan()
            counts = observed.sum(0).tolist()
        # The sign says nothing of columns that are real in any case.
        plain = set(raw.types) == {"real"} and set(self.kinds.values()) <= {"real"}
        negative = [False] * len(counts) if plain else (values < 0).any(0).tolist()
        for i, name in enumerate(self.names):
            if counts[i] == 0:
                continue
            seen = self._seen[i]
            seen.num_observed += counts[i]
            seen.types.add(raw.types[i])
            if raw.types[i] == "text":
                self._see_text(seen, raw, i, observed[:, i])
            else:
                seen.negative |= negative[i]
                self._see_numbers(seen, raw, i, self.kinds.get(name))
            if len(seen.levels) > MAX_LEVELS:
                raise ValueError(
                    f"column {name!r} has more than {MAX_LEVELS} levels: it looks like an "
                    f"identifier or free text. Leave it out with columns=[...]."
                )
        self.num_rows += len(raw.values)

    def _see_numbers(self, seen: _Seen, raw: RawTable, i: int, wanted: Kind | None) -> None:
        """What only matters for numbers that are to be something in particular."""
        if wanted in (None, "real"):
            return
        values = raw.values[:, i]
        seen.fractional |= bool(((values != values.floor()) & ~values.isnan()).any())
        if wanted == "binary" and seen.not_binary is None:
            bad = (values != 0) & (values != 1) & ~values.isnan()
            if bool(bad.any()):
                row = first_row(bad)
                seen.not_binary = (self.num_rows + row, float(values[row]))
        if wanted == "category":
            for value in values[~values.isnan()].unique().tolist():
                seen.levels.setdefault(label(value, is_bool=raw.types[i] == "bool"))
            seen.same_levels = False
            seen.are_codes |= raw.names is None

    def _see_text(self, seen: _Seen, raw: RawTable, i: int, observed: Tensor) -> None:
        levels = raw.levels[i] or ()
        if seen.levels and tuple(seen.levels) != levels:
            seen.same_levels = False
        seen.declared |= raw.declared[i]
        seen.levels.update(dict.fromkeys(levels))
        codes = raw.values[:, i].nan_to_num(nan=0.0).long()
        numeric = torch.tensor([is_number(v) for v in levels], device=codes.device)[codes]
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
            if kind == "category" and seen.are_codes:
                levels.append(_code_levels(name, seen))
            elif kind == "category":
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
            f"column {name!r} is to be a count, but has {what} values; use "
            f"kinds={{{name!r}: 'real'}}."
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
    if len(seen.types) > 1 or (
        not seen.declared and 2 * seen.num_numeric_text > seen.num_observed
    ):
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
            f"column {name!r} holds text that is different in every row, like an identifier; "
            f"leave "
            f"it out with columns=[...], {hint}"
        )


def _code_levels(name: str, seen: _Seen) -> Levels:
    """Categories of an array without names are codes: their own levels, from 0 to the largest."""
    largest = max(map(float, seen.levels))
    if seen.negative or seen.fractional or largest >= MAX_LEVELS:
        raise ValueError(
            f"column {name!r} is to be a category: in an array without names it must hold codes "
            f"0, 1, ..., but it holds {shorten(list(seen.levels))}. Name the columns with "
            f"columns=[...], and any number is a level."
        )
    return tuple(str(code) for code in range(int(largest) + 1))


def _sort_levels(levels: Mapping[str, None]) -> list[str]:
    """Sorted: as numbers where all are."""
    key: Callable[[str], Any] = float if all(map(is_number, levels)) else str
    return sorted(levels, key=key)
