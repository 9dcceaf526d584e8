"""Checks of engine settings: what was given, what is allowed."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points

__all__ = ["check_called", "check_choice", "check_settings"]


@functools.cache
def _declared() -> tuple[EntryPoint, ...]:
    """Makers of models; to read them from disk takes a tenth of a small run's time."""
    return tuple(entry_points(group="bayesgen.models"))


def check_called(engine: object, kind: type, model: object) -> None:
    """Refuse a class, or a maker of models, where the thing that it makes is meant.

    Raises:
        TypeError: Parentheses forgotten after the engine or after the model.
    """
    if not isinstance(engine, kind):
        raise TypeError(
            "run was called on the engine's class, not on an engine: write the parentheses, such "
            "as VB().run(model, data)."
        )
    name = getattr(model, "__name__", "")
    if not name:  # made already
        return
    declared = [point.load() for point in _declared() if point.name == name]
    if isinstance(model, type) or any(model is maker for maker in declared):
        raise TypeError(
            f"{type(engine).__name__}().run needs a model, but got {name} itself: call it first, "
            f"such as {type(engine).__name__}().run({name}(...), data)."
        )


def check_choice(owner: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name}={value!r}, but it must be one of {', '.join(allowed)}.")


def check_settings(owner: str, *, tolerance: float = 1.0, **counts: int | None) -> None:
    """Refuse counts below 1 (None is allowed where it is the default) and a tolerance below 0."""
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{owner}: {name}={value!r}, but it must be a whole number of at least 1."
            )
    if not 0.0 <= tolerance < float("inf"):
        raise ValueError(f"{owner}: tolerance={tolerance!r}, but it must be a finite number >= 0.")
