"""Threads of torch's own operations, kept from waiting for each other over nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["in_one_thread", "one_thread"]


@contextmanager
def one_thread(is_small: bool = True) -> Iterator[None]:
    """Within, torch's operations on the CPU use one thread, if they are small.

    OpenMP's threads wait for each other busily after each operation. On a core that another
    process has, hundreds of small ones then take ten times as long as in one thread.
    """
    before = torch.get_num_threads()
    if not is_small or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_one_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``(engine, task, work, ...)`` in :func:`one_thread` where ``work.is_small``."""

    @functools.wraps(method)
    def within(engine: Any, task: Any, work: Any, *rest: Any) -> Any:
        with one_thread(work.is_small):
            return method(engine, task, work, *rest)

    return within
