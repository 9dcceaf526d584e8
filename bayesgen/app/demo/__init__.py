"""``bayesgen demo``: the main job on real data, drawn and explained on one page."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import bayesgen
from bayesgen.app.demo.faithful import Faithful
from bayesgen.app.demo.wine import Wine
from bayesgen.app.page import Page
from bayesgen.app.progress import say

__all__ = ["make"]

_TITLE = "bayesgen demo: from raw data to guaranteed outliers"
_LEAD = (
    "Two real data sets, each fitted by variational Bayes and by Gibbs sampling from 10 "
    "components: how many clusters there are, whether the engines agree, which rows do not "
    "belong, and what stood in the holes. `bayesgen demo` wrote this page; the code under each "
    "picture draws it again."
)


def make(out: str, *, force: bool = False, quiet: bool = False) -> int:
    """Fit, judge, draw, and write a page.

    Args:
        out: A new folder.
        force: Write into a folder that is not empty.
        quiet: Say nothing.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: The folder exists and is not empty.
    """
    import torch

    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(f"--out {out} is not empty; add --force to write into it.")
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tables this small only lose by sharing
    before = time.perf_counter()
    try:
        page = Page(folder, _TITLE, _LEAD)
        faithful, wine = Faithful(folder), Wine(folder)
        wine.begin()
        try:
            _run([*faithful.steps(page), *wine.steps(page)], quiet)
        finally:
            wine.sampling.stop()
    finally:
        torch.set_num_threads(threads)
    page.verdict(("", "Old Faithful", "wine"), _join(faithful.verdict(), wine.verdict()))
    seconds = time.perf_counter() - before
    path = page.write(
        f"bayesgen {bayesgen.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; everything on this page took {seconds:.0f} s. "
        "All of its code stands in reproduce.py."
    )
    say(f"open {path}  ({seconds:.0f} s)", quiet=quiet)
    return 0


Step = tuple[str, Callable[[], None]]


def _run(steps: list[Step], quiet: bool) -> None:
    for number, (name, step) in enumerate(steps, 1):
        before = time.perf_counter()
        say(f"[{number}/{len(steps)}] {name} ...", quiet=quiet, end=" ")
        step()
        say(f"{time.perf_counter() - before:.1f} s", quiet=quiet)


def _join(left: dict[str, str], right: dict[str, str]) -> list[tuple[str, str, str]]:
    """Two columns of one table, rows in the order of their first appearance."""
    return [(name, left.get(name, ""), right.get(name, "")) for name in {**left, **right}]
