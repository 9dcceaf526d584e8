"""What moves chains: the state machine as tensor operations, or as compiled C++."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.inference.compiled.native import NativeDensity, aligned_zeros
from bayesgen.inference.hamiltonian.trajectory import STATISTICS, Metric, Trajectories

__all__ = ["Machine", "NativeMachine", "TorchMachine"]

_STEPS, _MOMENTA = 256, 64  # of a tape of random numbers
_TAPE = 2**18  # numbers of a tape, at most

Noise = dict[str, Tensor]


class Machine(ABC):
    """Moves every chain by leapfrog steps until enough trajectories have ended."""

    @abstractmethod
    def noise(self, chains: Trajectories) -> Noise:
        """Random numbers drawn ahead, a part of the state; none yet."""

    @abstractmethod
    def run(
        self,
        chains: Trajectories,
        metric: Metric,
        noise: Noise,
        enough: int,
        generator: torch.Generator,
    ) -> tuple[Trajectories, Tensor]:
        """Move on for a while; ``chains`` and ``noise`` may be written into.

        Returns:
            Where the chains stand, and a row ``(1 + 2 D + len(STATISTICS))`` for each trajectory
            that ended, in the order of their ends: chain, position, gradient, statistics.
        """


class TorchMachine(Machine):
    """One call of ``advance`` for each leapfrog step, on any device.

    Args:
        advance: From :func:`~bayesgen.inference.hamiltonian.trajectory.machine`, or it
            compiled.
        count: Steps before the host looks at what has ended.
    """

    def __init__(self, advance: Callable[..., tuple[Tensor, ...]], count: int = 8) -> None:
        self.advance, self.count = advance, count

    def noise(self, chains: Trajectories) -> Noise:
        return {}

    def run(
        self,
        chains: Trajectories,
        metric: Metric,
        noise: Noise,
        enough: int,
        generator: torch.Generator,
    ) -> tuple[Trajectories, Tensor]:
        like = chains.numbers
        c, d = like.shape[0], chains.ends.shape[-1]
        normal = rng.standard_normal((self.count, c, d), generator, like.dtype)
        uniform = torch.rand(
            (self.count, c, 3), generator=generator, dtype=like.dtype, device=like.device
        )
        records = []
        for k in range(self.count):
            *new, record = self.advance(*chains, *metric, normal[k], uniform[k])
            chains = Trajectories(*new)
            records.append(record)
        every = torch.stack(records)
        ended = every[..., 0] > 0
        every[..., 0] = torch.arange(c, dtype=like.dtype, device=like.device)
        return chains, every[ended]


class _Block(ctypes.Structure):
    """``struct Block`` of trajectory.cpp."""

    _fields_ = [
        *((name, ctypes.c_longlong) for name in ("chains", "size", "slots", "rank")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "ends points sums checks numbers mass root basis stretch normal uniform"
            ).split()
        ),
        ("rows", ctypes.c_longlong),
        ("used", ctypes.c_void_p),
        ("at", ctypes.c_void_p),
        ("steps", ctypes.c_longlong),
        ("enough", ctypes.c_longlong),
        ("records", ctypes.c_void_p),
        ("ended", ctypes.c_longlong),
        ("stale", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in "x g lp w C J scratch".split()),
        ("step_size", ctypes.c_double),
        ("max_depth", ctypes.c_double),
    ]


class NativeMachine(Machine):
    """The whole loop in C++, many leapfrog steps a call, on the CPU in double precision."""

    def __init__(self, density: NativeDensity, num_chains: int) -> None:
        self.density = density
        blocks = -(-num_chains // density.width)
        d = density.size
        self._lanes = aligned_zeros(blocks * density.width * (2 * d + 1))
        self._scratch = aligned_zeros(2 * d)
        self._records = torch.zeros(0)
        self._held: dict[str, Tensor] = {}
        self._now: tuple[object, ...] = ()
        block = _Block(chains=num_chains, size=d)
        size = 8 * blocks * density.width
        start = self._lanes.data_ptr()
        block.x, block.g, block.lp = start, start + size * d, start + 2 * size * d
        block.w = density.workspace.data_ptr()
        block.C = density.translation.numbers.data_ptr()
        block.J = density.translation.integers.data_ptr()
        block.scratch = self._scratch.data_ptr()
        self._block, self._reference = block, ctypes.byref(block)
        # Lanes beyond the last chain stay at the origin, whatever the density says there.
        self.call: Any = density.library.advance
        self.call.restype = None

    def noise(self, chains: Trajectories) -> Noise:
        c, d = chains.numbers.shape[0], chains.ends.shape[-1]
        rows = max(8, min(_MOMENTA, _TAPE // (c * d)))
        steps = _STEPS * rows // _MOMENTA
        return {
            "normal": torch.zeros(rows, c, d, dtype=torch.float64),
            "uniform": torch.zeros(steps, c, 3, dtype=torch.float64),
            "used": torch.full((c,), rows, dtype=torch.int64),
            "at": torch.full((1,), steps, dtype=torch.int64),
        }

    def run(
        self,
        chains: Trajectories,
        metric: Metric,
        noise: Noise,
        enough: int,
        generator: torch.Generator,
    ) -> tuple[Trajectories, Tensor]:
        block = self._block
        self._point(chains, metric, noise)
        block.enough = enough
        block.step_size, block.max_depth = metric.step_size.item(), metric.max_depth.item()
        self.call(self._reference)
        if block.stale:
            _refill(noise, generator)
            self.call(self._reference)
        return chains, self._records[: block.ended].clone()

    def _point(self, chains: Trajectories, metric: Metric, noise: Noise) -> None:
        """Tell the block where everything lies, if that has changed."""
        now = (chains, metric.inverse_mass, metric.basis, metric.stretch, noise)
        if len(self._now) == len(now) and all(a is b for a, b in zip(self._now, now, strict=True)):
            return
        held = {
            **chains._asdict(),
            "mass": metric.inverse_mass,
            "root": metric.inverse_mass.sqrt(),
            "basis": metric.basis.T.contiguous(),
            "stretch": metric.stretch,
            "normal": noise["normal"],
            "uniform": noise["uniform"],
            "used": noise["used"],
            "at": noise["at"],
        }
        block = self._block
        for name, value in held.items():
            assert value.is_contiguous(), name
            setattr(block, name, value.data_ptr())
        block.slots, block.rank = chains.checks.shape[2], metric.basis.shape[1]
        block.rows, block.steps = len(held["normal"]), len(held["uniform"])
        width = 1 + 2 * block.size + len(STATISTICS)
        if self._records.shape != (block.rows * block.chains, width):
            self._records = torch.zeros(block.rows * block.chains, width, dtype=torch.float64)
            block.records = self._records.data_ptr()
        self._held, self._now = held, now


def _refill(noise: Noise, generator: torch.Generator) -> None:
    normal, uniform = noise["normal"], noise["uniform"]
    torch.randn(normal.shape, generator=generator, dtype=normal.dtype, out=normal)
    torch.rand(uniform.shape, generator=generator, dtype=uniform.dtype, out=uniform)
    noise["used"].zero_()
    noise["at"].zero_()
