"""Paths of many chains in generated C++, a thread for each core."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bayesgen.inference.compiled.native import NativeDensity, aligned_zeros, pointer

__all__ = ["NativePaths", "kick_of"]

Ends = tuple[Tensor, Tensor, Tensor, Tensor]

_WORTH_A_THREAD = 2**17  # numbers of paths a call; fewer are moved sooner than a thread is woken
_ROOM = 9  # vectors of the length of a point that a path needs
_POINTERS = ("q", "r", "g", "kick", "drift", "square", "q_end", "r_end", "lp_end", "g_end")
_LONG = ctypes.c_longlong


class _Paths(ctypes.Structure):
    """``struct Paths`` of paths.cpp."""

    _fields_ = [
        *((name, _LONG) for name in ("chains", "size", "steps", "dense")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


_MOVED = ("steps", "kick", "drift", "square", "q", "g", "lp", "draws", "statistics")


class _Moves(ctypes.Structure):
    """``struct Moves`` of paths.cpp."""

    _fields_ = [
        *((n, _LONG) for n in ("chains", "size", "count", "dense", "seed", "samples", "first")),
        *((name, ctypes.c_void_p) for name in _MOVED),
        ("step_size", ctypes.c_double),
    ]


class NativePaths:
    """Paths in generated C++, several chains in a vector register and a thread for each core.

    What a chain does is the same whichever thread moves it.
    """

    def __init__(self, density: NativeDensity) -> None:
        self.density = density
        self.num_threads = torch.get_num_threads()
        self._rooms: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        q: Tensor,
        r: Tensor,
        g: Tensor,
        factor: Tensor,
        step_size: float | Tensor,
        steps: int,
    ) -> Ends:
        """As :meth:`bayesgen.inference.hamiltonian.leapfrog.TorchPaths.__call__`."""
        held = (q.contiguous(), r.contiguous(), g.contiguous(), *_metric(q, factor, step_size))
        ends = torch.empty_like(q), torch.empty_like(q), q.new_empty(len(q)), torch.empty_like(q)
        arguments = _Paths(len(q), q.shape[1], steps, int(factor.ndim == 2))
        for name, value in zip(_POINTERS, (*held, *ends), strict=True):
            setattr(arguments, name, value.data_ptr())
        self._call(self.density.library.paths, arguments, steps, 0)
        return ends

    def move(
        self,
        points: Tensor,
        lp: Tensor,
        factor: Tensor,
        step_size: float,
        steps: Sequence[int],
        seed: int,
        draws: Tensor,
        statistics: Tensor,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        """Whole transitions of all chains, one after the other.

        Args:
            points: Positions and gradients ``(2, c, D)``.
            lp: Log densities ``(c,)``.
            factor: Of the metric, ``(D,)`` or ``(D, D)``.
            step_size: Of all chains.
            steps: Leapfrogs of each transition.
            seed: Of the random numbers.
            draws: ``(c, num_samples, D)``, written into.
            statistics: ``(c, num_samples, 6)``, written into.
            first: Where in both.

        Returns:
            New points and log densities.
        """
        points, lp, numbers = points.clone(), lp.clone(), torch.tensor(steps)
        metric = _metric(points[0], factor, step_size)
        arguments = _Moves(
            *(lp.shape[0], points.shape[-1], len(steps), int(factor.ndim == 2), seed),
            *(draws.shape[1], first),
            step_size=step_size,
        )
        held = (numbers, *metric, points[0], points[1], lp, draws, statistics)
        for name, value in zip(_MOVED, held, strict=True):
            setattr(arguments, name, pointer(value))
        self._call(self.density.library.moves, arguments, sum(steps), len(steps))
        return points, lp

    def noise(self, seed: int, first: int, rows: int) -> Tensor:
        """The random numbers ``(rows, D + 1, width)`` of the chains from ``first`` on."""
        size, width = self.density.size, self.density.width
        tape = aligned_zeros(rows * (size + 1) * width)
        numbers = (_LONG(seed), *(ctypes.c_long(v) for v in (first, rows, size)))
        self.density.library.noise(pointer(tape), *numbers)
        return tape.reshape(rows, size + 1, width)

    def _call(self, function: Any, arguments: Any, steps: int, rows: int) -> None:
        """All blocks, in as many threads as there is work for."""
        blocks = -(-arguments.chains // self.density.width)
        work = arguments.chains * steps * (arguments.size + self.density.translation.statements)
        count = min(self.num_threads, blocks, max(1, work // _WORTH_A_THREAD))
        cuts = [blocks * k // count for k in range(count + 1)]

        def run(job: tuple[int, int, Tensor, Tensor]) -> None:
            first, last, room, space = job
            function(
                ctypes.byref(arguments),
                *(ctypes.c_long(first), ctypes.c_long(last)),
                *(pointer(room), pointer(space)),
                *self.density.constants[1:],
            )

        jobs = [
            (first, last, *self._room(k, rows))
            for k, (first, last) in enumerate(itertools.pairwise(cuts))
        ]
        if count == 1:
            run(jobs[0])
        else:
            list(_pool(count).map(run, jobs))

    def _room(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        density = self.density
        size = (_ROOM * density.size + rows * (density.size + 1)) * density.width
        while len(self._rooms) <= index:
            space = aligned_zeros(max(1, density.translation.workspace) * density.width)
            self._rooms.append((aligned_zeros(1), space))
        room, space = self._rooms[index]
        if room.numel() < size:
            self._rooms[index] = room, space = aligned_zeros(size), space
        return room, space


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="paths")


def kick_of(q: Tensor, factor: Tensor, step_size: float | Tensor) -> Tensor:
    """Step size times factor, ``(c, D)`` for ``(D,)`` scales and else ``(D, D)``."""
    return step_size * factor if factor.ndim == 2 else (step_size * factor).expand_as(q)


def _metric(q: Tensor, factor: Tensor, step_size: float | Tensor) -> tuple[Tensor, ...]:
    kick = kick_of(q, factor, step_size).contiguous()
    if factor.ndim == 1:
        return kick, kick, kick
    return kick, kick.T.contiguous(), kick @ kick.T
