"""The columns of a table: names, kinds and levels, learnt once and then held against new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

__all__ = ["KINDS", "Kind", "Levels", "Schema", "check_unique"]

Kind = Literal["real", "count", "binary", "category"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Levels = tuple[str, ...]


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
                f"column {name!r} occurs more than once; rename or drop one, in pandas for "
                f"example "
                f"by frame.loc[:, ~frame.columns.duplicated()]."
            )
        seen.add(name)
