"""Large products in single precision by oneDNN: which ones, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from bayesgen.inference.compiled.graph import capture, compile_graph
from bayesgen.inference.compiled.onednn import by_onednn

__all__: list[str] = []

_aten = torch.ops.aten


def layers(x: Tensor, first: Tensor, bias: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """A product with a bias, one with transposed factors, and a small one."""
    hidden = _aten.addmm(bias, x, first.t())
    return hidden, _aten.mm(hidden.t(), x), _aten.mm(hidden, second)


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 80), (96, 80), (96,), (96, 3)]
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "function" in node.op]


def values_of(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[fx.Node, object]:
    found: dict[fx.Node, object] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n] = super().run_node(n)
            return found[n]

    Keep(graph).run(*example)
    return found


@pytest.mark.parametrize(
    ("capability", "dtype", "count"),
    [
        ("AVX512", torch.float32, 2),
        ("AVX512", torch.float64, 0),
        ("AVX2", torch.float32, 0),
    ],
)
def test_large_single_products_are_replaced(monkeypatch, capability, dtype, count):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    example = inputs(dtype)
    graph = capture(layers, *example)
    by_onednn(graph, values_of(graph, example))
    assert sum("bayesgen.product" in name for name in targets(graph)) == count
    assert targets(graph).count("aten.mm.default") == (1 if count else 2)
    for found, wanted in zip(graph(*example), layers(*example), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.slow
def test_compiled_graph_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    example = inputs(torch.float32)
    compiled = compile_graph(capture(layers, *example), *example, cpp_wrapper=True)
    for found, wanted in zip(compiled(*example), layers(*example), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-4)
