"""What a graph costs, eagerly or compiled, and what compiling it costs: a model, no stop watch.

The same program, settings and machine give the same choice, and so the same numbers, however busy
the machine is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

__all__ = ["Cost", "cost_of"]

# Seconds on one core of a 2024 server: an eager operation, one of its elements, a multiplication
# in a matrix product; and to compile by Inductor, at all and for each operation.
_OPERATION, _ELEMENT, _PRODUCT = 4e-6, 0.5e-9, 0.3e-9
_COMPILE, _COMPILE_OPERATION = 8.0, 0.02
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mv.default,
}


class Cost(NamedTuple):
    """What a step does: operations, elements computed, multiplications in matrix products."""

    operations: int
    elements: float
    products: float
    largest: int
    """Elements of the largest value of one copy."""

    def eager(self, steps: int) -> float:
        """Seconds of a run by eager operations."""
        one = _OPERATION * self.operations + _ELEMENT * self.elements + _PRODUCT * self.products
        return steps * one

    def compiled(self, steps: int) -> float:
        """Seconds of the same run after compiling by Inductor."""
        one = 0.15 * _OPERATION * self.operations + 0.5 * _ELEMENT * self.elements
        return steps * (one + _PRODUCT * self.products)

    def build(self, copies: int = 1) -> float:
        """Seconds to compile by Inductor a graph that holds this one several times."""
        return _COMPILE + _COMPILE_OPERATION * self.operations * copies

    def native(self, steps: int) -> float:
        """Seconds of the same run in generated C++."""
        one = 0.01 * _OPERATION * self.operations + 0.5 * _ELEMENT * self.elements
        return steps * (one + _PRODUCT * self.products)


def cost_of(graph: fx.GraphModule, *example: Tensor, copies: int = 1, operations: int = 0) -> Cost:
    """Of one step of several copies side by side, from the graph of one.

    Args:
        graph: Of one copy.
        example: Its arguments.
        copies: In one call, such as chains or particles.
        operations: Those of a step beside the graph's.
    """
    elements, products, largest = 0.0, 0.0, 0
    values: dict[fx.Node, object] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Sizes(graph).run(*example)
    for node in graph.graph.nodes:
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        operations += 1
        largest = max(largest, value.numel())
        if node.target in _PRODUCTS:
            inner = values[node.all_input_nodes[-1]]
            shared = inner.shape[-2 if inner.ndim > 1 else 0] if isinstance(inner, Tensor) else 1
            products += value.numel() * shared
        else:
            elements += value.numel()
    return Cost(operations, copies * elements, copies * products, largest)
