"""Whether to compile: the cost of the eager graph over the run against that of the compiler.

The decision is a model of costs and not a stop watch: the same program, settings and machine give
the same choice, and so the same draws, however busy the machine is.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx

from bayesgen.inference.graph import capture, compile_graph, simplify
from bayesgen.inference.trace import Density
from bayesgen.inference.trajectory import Metric, launch, machine

__all__ = ["Speed", "choose"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Seconds on one core of a 2024 server: an eager operation, one of its elements, a multiplication
# in
# a matrix product; and to compile, at all and for each operation.
_OPERATION, _ELEMENT, _PRODUCT = 2.5e-6, 0.5e-9, 0.3e-9
_COMPILE, _COMPILE_OPERATION = 8.0, 0.02
_MACHINE_OPERATIONS = 120
_MAX_OPERATIONS = 4000  # unrolled loops: minutes in a C++ compiler


class Speed(NamedTuple):
    """How leapfrog steps are computed, and why so."""

    advance: Callable[..., tuple[Tensor, ...]]
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
    """Compile the step of all chains, or not.

    Args:
        density: The traced program.
        table: From :func:`bayesgen.inference.trajectory.tables`.
        num_chains: Chains in one call.
        max_depth: Doublings of a trajectory.
        compile: True, False or ``"auto"``.
        num_steps: Leapfrog steps expected of the whole run.
    """
    gradient_of = density.batched(num_chains)
    eager = machine(gradient_of, table)
    if not density.is_traced:
        return Speed(eager, gradient_of, False, "Pyro's own Python: the program is not traced")
    if compile is False:
        return Speed(eager, gradient_of, False, "eager: compile=False")
    assert isinstance(gradient_of, fx.GraphModule)
    pays, why = _pays(gradient_of, density, num_chains, num_steps)
    if compile == "auto" and not pays:
        return Speed(eager, gradient_of, False, why)
    if not _has_compiler(table.device):
        why = "eager: there is no C++ compiler (install g++ or clang, or set CXX)"
        return Speed(eager, gradient_of, False, why)
    example = _example(density, gradient_of, num_chains, max_depth)
    start = time.perf_counter()
    try:
        graph = simplify(capture(eager, *example), *example)
        compiled = compile_graph(graph, *example)
    except Exception as error:
        text = str(error).strip().splitlines()
        why = f"eager: compiling failed with {type(error).__name__}: {text[0] if text else ''}"
        return Speed(eager, gradient_of, False, why)
    seconds = time.perf_counter() - start
    return Speed(compiled, gradient_of, True, why if pays else "compiled: compile=True", seconds)


def _example(
    density: Density, gradient_of: Gradient, num_chains: int, max_depth: int
) -> tuple[Tensor, ...]:
    """Arguments of the machine, every tensor a memory of its own."""
    points = density._points(num_chains)
    one = points.new_ones(())
    metric = Metric(0.1 * one, torch.ones_like(points[0]), max_depth * one)
    uniform = points.new_full((num_chains, 3), 0.5)
    with torch.no_grad():
        lp, gradient = gradient_of(points)
        chains = launch(points, lp, gradient, metric, points.clone(), uniform[:, 0], max_depth)
    return tuple(v.clone() for v in (*chains, *metric, points, uniform))


def _pays(
    graph: fx.GraphModule, density: Density, num_chains: int, num_steps: int
) -> tuple[bool, str]:
    operations, work = _MACHINE_OPERATIONS, 0.0
    values: dict[fx.Node, object] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Sizes(graph).run(density._points(num_chains))
    products = 0.0
    for node in graph.graph.nodes:
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        operations += 1
        if node.target in _PRODUCTS:
            inner = values[node.all_input_nodes[-1]]
            shared = inner.shape[-2] if isinstance(inner, Tensor) and inner.ndim > 1 else 1
            products += _PRODUCT * value.numel() * shared
        else:
            work += _ELEMENT * value.numel()
    eager = num_steps * (_OPERATION * operations + work + products)
    compiled = num_steps * (0.15 * _OPERATION * operations + 0.5 * work + products)
    cost = _COMPILE + _COMPILE_OPERATION * operations
    why = (
        f"{num_steps} steps of {operations} operations would take about {eager:.1f} s eagerly and "
        f"{compiled:.1f} s compiled, after {cost:.0f} s of compiling"
    )
    if operations > _MAX_OPERATIONS:
        return False, f"eager: {operations} operations would take minutes to compile"
    pays = compiled + cost < 0.8 * eager
    return pays, f"{'compiled' if pays else 'eager'}: {why}"


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mv.default,
}


def _has_compiler(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
