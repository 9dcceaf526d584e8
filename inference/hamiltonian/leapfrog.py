r"""Trajectories of many chains at once: one leapfrog path of the same number of steps for all.

The metric enters by a factor :math:`A` with :math:`M^{-1} = A A^\top`, so that momenta are
standard normal. Inside a path only the gradient is needed; the density itself at its end alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from bayesgen.inference.compiled.cost import cost_of
from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.graph import gradient_alone
from bayesgen.inference.compiled.native import PATHS, with_slope
from bayesgen.inference.compiled.speed import native_density
from bayesgen.inference.hamiltonian.paths import NativePaths, kick_of
from bayesgen.inference.programs.trace import Density

__all__ = ["Leapfrog", "Paths", "TorchPaths", "leapfrog", "width_of"]

Ends = tuple[Tensor, Tensor, Tensor, Tensor]

_CACHE_ELEMENTS = 2**16  # of the largest value in the graph: 512 KB in float64


class Paths(nn.Module):
    """The integrator, written so that torch can also run it without Python."""

    def __init__(self, gradient: nn.Module, both: nn.Module) -> None:
        super().__init__()
        self.gradient, self.both = gradient, both

    def forward(
        self,
        q: Tensor,
        r: Tensor,
        g: Tensor,
        drift: Tensor,
        kick: Tensor,
        is_dense: bool,
        steps: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``steps`` leapfrogs: position, momentum, log density and gradient at the end.

        Args:
            q: Positions ``(c, D)``.
            r: Momenta.
            g: Gradients at ``q``.
            drift: The step size times the metric's factor: ``(c, D)``, or ``(D, D)`` transposed.
            kick: The same, not transposed.
            is_dense: Which of the two.
            steps: At least one.
        """
        if is_dense:
            r = torch.addmm(r, g, kick, alpha=0.5)
        else:
            r = torch.addcmul(r, g, kick, value=0.5)
        for _ in range(steps - 1):
            if is_dense:
                q = torch.addmm(q, r, drift)
                r = torch.addmm(r, self.gradient(q), kick)
            else:
                q = torch.addcmul(q, r, drift)
                r = torch.addcmul(r, self.gradient(q), kick)
        q = torch.addmm(q, r, drift) if is_dense else torch.addcmul(q, r, drift)
        lp, g = self.both(q)
        if is_dense:
            r = torch.addmm(r, g, kick, alpha=0.5)
        else:
            r = torch.addcmul(r, g, kick, value=0.5)
        return q, r, lp, g


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor) -> Any:
        return self.function(q)


class Leapfrog(NamedTuple):
    """How trajectories are computed, and why so."""

    integrate: Callable[..., Ends]
    """``(q, r, g, factor, step_size, steps)``, see :meth:`TorchPaths.__call__`."""
    gradient_of: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Of any number of points."""
    is_compiled: bool
    reason: str
    overhead: float
    """Cost of a transition beside its leapfrogs, in leapfrogs."""
    seconds: float | None = None
    move: Callable[..., tuple[Tensor, Tensor]] | None = None
    """Whole transitions, where they are compiled: :meth:`NativePaths.move`."""


class TorchPaths:
    """Paths by tensor operations, in blocks of chains whose values fit a cache.

    Args:
        paths: A :class:`Paths`, or the same without Python.
        width: Chains in a block.
    """

    def __init__(self, paths: nn.Module, width: int) -> None:
        self.paths, self.width = paths, width

    def __call__(
        self,
        q: Tensor,
        r: Tensor,
        g: Tensor,
        factor: Tensor,
        step_size: float | Tensor,
        steps: int,
    ) -> Ends:
        """Paths of all chains.

        Args:
            q: Positions ``(c, D)``.
            r: Momenta.
            g: Gradients at the positions.
            factor: Of the metric, ``(D,)`` or ``(D, D)``.
            step_size: Of all chains; with ``(D,)`` scales also ``(c, 1)``.
            steps: Leapfrogs.

        Returns:
            Position, momentum, log density and gradient at the end.
        """
        is_dense, kick = factor.ndim == 2, kick_of(q, factor, step_size)
        if is_dense:
            shared = (kick.T.contiguous(), kick)
            blocks = [(*b, *shared) for b in self._split(q, r, g)]
        else:
            blocks = [(*b, b[-1]) for b in self._split(q, r, g, kick)]
        parts = [self.paths(*block, is_dense, steps) for block in blocks]
        if len(parts) == 1:
            only: Ends = parts[0]
            return only
        q, r, lp, g = (torch.cat(part) for part in zip(*parts, strict=True))
        return q, r, lp, g

    def _split(self, *values: Tensor) -> Iterable[tuple[Tensor, ...]]:
        return zip(*(v.split(self.width) for v in values), strict=True)


def width_of(num_chains: int, largest: int) -> int:
    """Chains of equal blocks in which the largest value (``largest`` a chain) fits a cache."""
    count = 1
    while num_chains % (2 * count) == 0 and num_chains // count * largest > _CACHE_ELEMENTS:
        if num_chains // (2 * count) < _NARROWEST:
            break
        count *= 2
    return num_chains // count


_NARROWEST = 16  # chains: narrower blocks waste matrix products and vector units
_OVERHEAD = 1.5  # leapfrogs


def leapfrog(
    density: Density, num_chains: int, *, compile: str | bool, num_steps: int
) -> Leapfrog:
    """Prepare the integrator of ``num_chains`` chains: in generated C++, or by tensor operations.

    Args:
        density: The traced program.
        num_chains: Chains that move together.
        compile: True, False or ``"auto"``.
        num_steps: Leapfrogs of a chain expected of the whole run.
    """
    if density.single is None:
        both = density.batched(num_chains)
        paths = Paths(_Call(lambda q: both(q)[1]), _Call(both))
        why = "Pyro's own Python: the program is not traced"
        return Leapfrog(TorchPaths(paths, num_chains), both, False, why, 1.0)
    cost, why = (
        cost_of(
            density.single, density._points(1)[0], copies=num_chains, operations=_STEP_OPERATIONS
        ),
        "compile=False",
    )
    if compile is not False:
        start = time.perf_counter()
        try:
            translation = with_slope(density)
            found, why = native_density(
                translation, density, num_chains, cost, num_steps, compile, PATHS
            )
            if found is not None:
                seconds = time.perf_counter() - start
                native = NativePaths(found)
                return Leapfrog(native, found, True, why, _OVERHEAD, seconds, native.move)
        except Unsupported as error:
            why = str(error)
    why = why if why.startswith("eager") else f"eager: {why}"
    eager = _eager(density, num_chains, cost.largest)
    return Leapfrog(eager, density.value_and_grad, False, why, _OVERHEAD)


_STEP_OPERATIONS = 2


def _eager(density: Density, num_chains: int, largest: int) -> TorchPaths:
    on_cpu = density.layout.device.type == "cpu"
    width = width_of(num_chains, largest) if on_cpu else num_chains
    both, example = density.batched(width), density._points(width)
    assert isinstance(both, fx.GraphModule)
    paths = Paths(_Second(gradient_alone(both)), both)
    if on_cpu:
        return TorchPaths(paths, width)
    return TorchPaths(Paths(*(_captured(m, example) for m in (paths.gradient, both))), width)


class _Second(nn.Module):
    """The second of a module's outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q: Tensor) -> Tensor:
        second: Tensor = self.inner(q)[1]
        return second


def _captured(graph: nn.Module, example: Tensor) -> nn.Module:
    """The graph as one launch on CUDA: recorded once, replayed on a fixed input."""
    held, side = example.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):  # libraries set themselves up in the first calls
            graph(held)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(recorded):
        output = graph(held)

    def replay(q: Tensor) -> Any:
        held.copy_(q)
        recorded.replay()
        if isinstance(output, Tensor):
            return output.clone()
        return tuple(value.clone() for value in output)

    return _Call(replay)
