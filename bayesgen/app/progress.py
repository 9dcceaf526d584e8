"""How a run goes, on stderr: a live bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from bayesgen.inference.run import Callback, Engine, Progress

__all__ = ["live_numbers", "progress", "say"]

_WORDS = {
    "elbo": "ELBO",
    "num_occupied": "clusters",
    "log_likelihood": "log likelihood",
    "objective": "objective",
}
_SECONDS_BETWEEN_LINES = 10.0


def say(message: str, *, quiet: bool = False, end: str = "\n") -> None:
    """One line on stderr."""
    if not quiet:
        print(message, end=end, file=sys.stderr, flush=True)


def live_numbers(values: Mapping[str, float]) -> str:
    """``ELBO -1284.7, clusters 2``."""
    shown = []
    for name, value in values.items():
        digits = f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"
        shown.append(f"{_WORDS.get(name, name.replace('_', ' '))} {digits}")
    return ", ".join(shown)


def _total(engine: Engine[Any]) -> int | None:
    """Steps of the run; None where ``max_steps`` is a setting and so only a bound."""
    bound = any(f.name == "max_steps" for f in dataclasses.fields(engine))
    return None if bound else engine.max_steps


@contextmanager
def progress(
    engine: Engine[Any], *, quiet: bool = False, label: str = "", stream: TextIO | None = None
) -> Iterator[list[Callback]]:
    """Callbacks that show the steps of one run.

    Args:
        engine: The engine that will run.
        quiet: Show nothing.
        label: What is shown before the numbers; the engine's name by default.
        stream: Where to; stderr by default.
    """
    out = sys.stderr if stream is None else stream
    name = label or type(engine).__name__
    if quiet:
        yield []
    elif out.isatty():
        with _bar(name, _total(engine), out) as callback:
            yield [callback]
    else:
        yield [_Lines(name, _total(engine), out)]


@contextmanager
def _bar(name: str, total: int | None, out: TextIO) -> Iterator[Callback]:
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=" steps", file=out, dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            bar.set_postfix_str(live_numbers(progress.values), refresh=False)
            bar.update(progress.step - bar.n)  # a resumed run starts above zero

        yield show


class _Lines:
    """The first step, then at most one line in ten seconds: what a log file can bear."""

    def __init__(self, name: str, total: int | None, out: TextIO) -> None:
        self.name, self.total, self.out = name, total, out
        self.last: float | None = None

    def __call__(self, progress: Progress) -> None:
        """Show a step, if it is time."""
        now = time.monotonic()
        recent = self.last is not None and now - self.last < _SECONDS_BETWEEN_LINES
        if recent and progress.step != self.total:
            return
        self.last = now
        of = "" if self.total is None else f" of {self.total}"
        line = f"{self.name}: step {progress.step}{of}, {live_numbers(progress.values)}"
        print(f"{line} ({progress.seconds:.1f} s)", file=self.out, flush=True)
