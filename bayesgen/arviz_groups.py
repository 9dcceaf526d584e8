"""Numpy dictionaries to ArviZ, 0.2x and 1.x: the only place that knows that there are two.

Imports numpy alone (and ArviZ when called), so that it is tested with ArviZ 1.x on Python 3.12
without torch: ``tests/arviz1_check.py``.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUPS", "convert", "import_arviz", "is_datatree", "labels", "summarise"]

GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
)
"""The groups that :func:`convert` understands."""

Group = Mapping[str, NDArray[Any]]
_NO_DRAWS = {"observed_data"}
_SHORTENED = {"log_likelihood"}


def import_arviz() -> ModuleType:
    """ArviZ, without the notice that its 0.23 gives once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    module: ModuleType = arviz
    return module


def is_datatree() -> bool:
    """Whether this is ArviZ 1.x, whose container is xarray's ``DataTree``."""
    return int(str(import_arviz().__version__).split(".")[0]) >= 1


def convert(
    groups: Mapping[str, Group],
    *,
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Build ``InferenceData`` (ArviZ 0.2x) or a ``DataTree`` (1.x).

    Args:
        groups: Arrays by group and variable: ``(chain, draw, *event)``, without the first two in
            ``observed_data``. Groups without variables are left out.
        coords: Labels along named dimensions.
        dims: Names of each variable's event dimensions; those of variables of ``log_likelihood``
            may be longer than the array, since columns are summed over.
        attrs: JSON values, set on the container and on ``posterior``; nested ones become JSON
            text.

    Raises:
        ValueError: An unknown group, or an array that does not fit its dims and coords.
    """
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise ValueError(f"unknown groups {unknown}; allowed are {', '.join(GROUPS)}.")
    kept = {name: dict(group) for name, group in groups.items() if group}
    for name, group in kept.items():
        for variable, value in group.items():
            _check(name, variable, value, dims.get(variable), coords)
    flat = {key: _flatten(value) for key, value in (attrs or {}).items() if value is not None}
    named = {key: list(value) for key, value in coords.items() if _is_used(key, kept, dims)}
    listed = {key: list(value) for key, value in dims.items()}
    arviz = import_arviz()
    with warnings.catch_warnings():
        # Hundreds of short chains are meant.
        warnings.filterwarnings("ignore", "More chains|Found chain dimension", UserWarning)
        if is_datatree():
            data = arviz.from_dict(kept, coords=named, dims=listed, attrs={"/": flat})
        else:
            data = arviz.from_dict(**kept, coords=named, dims=listed, attrs=flat)
    if "posterior" in kept:
        data["posterior"].attrs.update(flat)
    return data


def summarise(data: Any) -> Any:
    """ArviZ's table of every variable of ``posterior``, as a frame of plain numbers."""
    arviz = import_arviz()
    # ArviZ 0.2x has a logger outside the registry.
    log = vars(arviz).get("_log", logging.getLogger("arviz"))
    log.addFilter(_tells_news)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # constant entries, as in a triangle, divide by 0
            return arviz.summary(data, round_to="none")
    finally:
        log.removeFilter(_tells_news)


def _tells_news(record: logging.LogRecord) -> bool:
    """Not that one chain has no R-hat: the table shows it."""
    return "Shape validation failed" not in record.getMessage()


def labels(
    name: str,
    shape: Sequence[int],
    *,
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
) -> list[str]:
    """ArviZ's names of the entries of one variable, in its order: ``loc[0, height]``.

    Args:
        name: The variable.
        shape: Its event shape.
        coords: Labels along named dimensions.
        dims: Names of each variable's event dimensions.
    """
    if not shape:
        return [name]
    along = [
        [str(label) for label in coords[dim]] if dim in coords else [str(i) for i in range(size)]
        for dim, size in zip(dims.get(name, [""] * len(shape)), shape, strict=True)
    ]
    return [
        f"{name}[{', '.join(part[i] for part, i in zip(along, index, strict=True))}]"
        for index in np.ndindex(*shape)
    ]


def _is_used(dim: str, groups: Mapping[str, Group], dims: Mapping[str, Sequence[str]]) -> bool:
    return any(dim in dims.get(variable, ()) for group in groups.values() for variable in group)


def _check(
    group: str,
    variable: str,
    value: NDArray[Any],
    dims: Sequence[str] | None,
    coords: Mapping[str, Sequence[Any]],
) -> None:
    lead = 0 if group in _NO_DRAWS else 2
    if value.ndim < lead:
        raise ValueError(f"{group}: '{variable}' has shape {value.shape}, without (chain, draw).")
    if dims is None:
        return
    event = value.shape[lead:]
    names = tuple(dims)[: len(event)] if group in _SHORTENED else tuple(dims)
    if len(names) != len(event):
        raise ValueError(
            f"{group}: '{variable}' has event shape {event}, but its dimensions are {names}. "
            "Correct the model's dims."
        )
    for name, size in zip(names, event, strict=True):
        if name in coords and len(coords[name]) != size:
            raise ValueError(
                f"{group}: '{variable}' has size {size} along '{name}', but coords name "
                f"{len(coords[name])} labels. Correct the model's coords."
            )


def _flatten(value: Any) -> str | float | int:
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, str | int | float) else json.dumps(value)
