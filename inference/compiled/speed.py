"""Whether to compile, and with what: the cost of the eager graph against that of each compiler.

The decision is a model of costs and not a stop watch: the same program, settings and machine give
the same choice, and so the same draws, however busy the machine is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgen.inference.compiled.cost import Cost, cost_of
from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.graph import capture, compile_graph, simplify
from bayesgen.inference.compiled.native import MACHINE, NativeDensity, compiler, load, translated
from bayesgen.inference.compiled.translate import Translation
from bayesgen.inference.hamiltonian.machines import Machine, NativeMachine, TorchMachine
from bayesgen.inference.hamiltonian.trajectory import Metric, launch, machine
from bayesgen.inference.programs.trace import Density

__all__ = ["Speed", "choose", "native_density"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Seconds on one core of a 2024 server to compile generated C++, at all and for each statement.
_NATIVE, _NATIVE_STATEMENT = 0.25, 1e-3
_MACHINE_OPERATIONS = 130
_MAX_OPERATIONS = 4000  # unrolled loops: minutes in Inductor


class Speed(NamedTuple):
    """How leapfrog steps are computed, and why so."""

    machine: Machine
    gradient_of: Gradient
    is_compiled: bool
    reason: str
    seconds: float | None = None


def choose(
    density: Density,
    table: Tensor,
    *,
    num_chains: int,
    max_depth: int,
    compile: str | bool,
    num_steps: int,
) -> Speed:
    """How to move all chains: by generated C++, by Inductor, or eagerly.

    Args:
        density: The traced program.
        table: From :func:`bayesgen.inference.hamiltonian.trajectory.tables`.
        num_chains: Chains in one call.
        max_depth: Doublings of a trajectory.
        compile: True, False or ``"auto"``.
        num_steps: Leapfrog steps expected of the whole run.
    """
    if density.single is None:
        why = "Pyro's own Python: the program is not traced"
        return _eager(density, table, num_chains, why)
    if compile is False:
        return _eager(density, table, num_chains, "eager: compile=False")
    cost = cost_of(
        density.single, density._points(1)[0], copies=num_chains, operations=_MACHINE_OPERATIONS
    )
    native = _native(density, num_chains, cost, num_steps, compile)
    if isinstance(native, Speed):
        return native
    if density.layout.device.type == "cpu" and compiler() is None:
        why = "eager: there is no C++ compiler (install g++ or clang, or set CXX)"
        return _eager(density, table, num_chains, why)
    pays, why = _pays(cost, num_steps)
    if not native.startswith("eager"):
        why = f"{why}; no C++ of its own: {native}"
    if compile == "auto" and (not pays or native.startswith("eager")):
        return _eager(density, table, num_chains, native if native.startswith("eager") else why)
    return _inductor(density, table, num_chains, max_depth, why)


def _eager(density: Density, table: Tensor, num_chains: int, why: str) -> Speed:
    gradient_of = density.batched(num_chains)
    return Speed(TorchMachine(machine(gradient_of, table)), gradient_of, False, why)


def _native(
    density: Density, num_chains: int, cost: Cost, num_steps: int, compile: str | bool
) -> Speed | str:
    """Generated C++; or why not, starting with "eager" where that is faster."""
    start = time.perf_counter()
    try:
        found, why = native_density(
            translated(density), density, num_chains, cost, num_steps, compile, MACHINE
        )
    except Unsupported as error:
        return str(error)
    if found is None:
        return why
    machine = NativeMachine(found, num_chains)
    return Speed(machine, found, True, why, time.perf_counter() - start)


def native_density(
    translation: Translation,
    density: Density,
    num_chains: int,
    cost: Cost,
    num_steps: int,
    compile: str | bool,
    parts: tuple[str, ...],
) -> tuple[NativeDensity | None, str]:
    """The density in generated C++ with ``parts`` that use it, where it pays, and why.

    Raises:
        Unsupported: The compiler failed.
    """
    build = _NATIVE + _NATIVE_STATEMENT * translation.statements
    eager, native = cost.eager(num_steps), cost.native(num_steps)
    why = (
        f"{num_steps} steps of {cost.operations} operations would take about {eager:.1f} s "
        f"eagerly and {native:.1f} s in C++, after {build:.1f} s of compiling"
    )
    if compile == "auto" and build + native > eager:
        return None, f"eager: {why}"
    return load(translation, num_chains, density.num_params, *parts), f"compiled to C++: {why}"


def _inductor(density: Density, table: Tensor, num_chains: int, max_depth: int, why: str) -> Speed:
    gradient_of = density.batched(num_chains)
    eager = machine(gradient_of, table)
    example = _example(density, gradient_of, num_chains, max_depth)
    start = time.perf_counter()
    try:
        graph = simplify(capture(eager, *example), *example)
        compiled = compile_graph(graph, *example)
    except Exception as error:
        text = str(error).strip().splitlines()
        why = f"eager: compiling failed with {type(error).__name__}: {text[0] if text else ''}"
        return Speed(TorchMachine(eager), gradient_of, False, why)
    seconds = time.perf_counter() - start

    def advance(*state: Tensor) -> tuple[Tensor, ...]:
        # Compiled for a diagonal metric; a basis has a size of its own.
        is_diagonal = state[_BASIS].shape[1] == 0
        found: tuple[Tensor, ...] = compiled(*state) if is_diagonal else eager(*state)
        return found

    return Speed(TorchMachine(advance), gradient_of, True, f"compiled by Inductor: {why}", seconds)


_BASIS = 7  # place of the basis among the arguments of the machine


def _example(
    density: Density, gradient_of: Gradient, num_chains: int, max_depth: int
) -> tuple[Tensor, ...]:
    """Arguments of the machine, every tensor a memory of its own."""
    points = density._points(num_chains)
    one, d = points.new_ones(()), points.shape[-1]
    metric = Metric(
        0.1 * one,
        torch.ones_like(points[0]),
        points.new_zeros(d, 0),
        points.new_zeros(2, 0),
        max_depth * one,
    )
    uniform = points.new_full((num_chains, 3), 0.5)
    with torch.no_grad():
        lp, gradient = gradient_of(points)
        chains = launch(points, lp, gradient, metric, points.clone(), uniform[:, 0], max_depth)
    return tuple(v.clone() for v in (*chains, *metric, points, uniform))


def _pays(cost: Cost, num_steps: int) -> tuple[bool, str]:
    """Whether compiling by Inductor does."""
    eager, compiled = cost.eager(num_steps), cost.compiled(num_steps)
    build = cost.build()
    why = (
        f"{num_steps} steps of {cost.operations} operations would take about {eager:.1f} s "
        f"eagerly and {compiled:.1f} s compiled, after {build:.0f} s of compiling"
    )
    if cost.operations > _MAX_OPERATIONS:
        return False, f"eager: {cost.operations} operations would take minutes to compile"
    pays = compiled + build < 0.8 * eager
    return pays, why if pays else f"eager: {why}"
