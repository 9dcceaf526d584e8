"""From the traced graph of one vector to C++ that computes it for several chains side by side."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from bayesgen.inference.compiled.emit import Emitter, Unsupported, Value, contiguous
from bayesgen.inference.compiled.graph import simplify
from bayesgen.inference.compiled.index_rules import INDICES
from bayesgen.inference.compiled.matrix_rules import MATRICES
from bayesgen.inference.compiled.pointwise_rules import POINTWISE
from bayesgen.inference.compiled.shape_rules import SHAPES
from bayesgen.inference.compiled.sum_rules import SUMS, softmax_beside
from bayesgen.inference.programs.record import Aliased, record

__all__ = ["Translation", "translate"]

_RULES = {**POINTWISE, **SHAPES, **INDICES, **SUMS, **MATRICES}
_INLINED = 60  # operations that one expression may hold
_INDEXED = ("index", "index_put")


@dataclass(frozen=True, eq=False)
class Translation:
    """C++ of ``(D,) -> ((), (D,))`` over vectors of chains, and what it is called with.

    Args:
        text: The function ``density(x, lp, g, w, C, J)``; without the data, so that fits of one
        program to several data sets share it.
        numbers: Constants ``C``.
        integers: Constants ``J``.
        workspace: Vectors of memory that ``w`` must point to.
        statements: Lines, a measure of what compiling costs.
    """

    text: str
    numbers: Tensor
    integers: Tensor
    workspace: int
    statements: int

    def fingerprint(self) -> str:
        """A hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def translate(graph: fx.GraphModule, example: Tensor) -> Translation:
    """Write a graph of one vector out as C++.

    Raises:
        Unsupported: The graph holds an operator without a rule.
    """
    if example.dtype != torch.float64:
        raise Unsupported(f"numbers of {example.dtype}")
    graph = _decomposed(graph, example)
    values: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Keep(graph).run(example)
    return _Translator(graph, values).run(example.shape[0])


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _rule_name(node: fx.Node) -> str:
    """The operator's name; an in-place one whose target nothing else reads is like any other."""
    packet = getattr(node.target, "overloadpacket", None)
    name = str(getattr(packet, "__name__", _name(node)))
    if name.endswith("_") and not name.startswith("__"):
        first = node.args[0]
        later = [u for u in first.users if u is not node] if isinstance(first, fx.Node) else [1]
        if later or (isinstance(first, fx.Node) and first.op != "call_function"):
            raise Unsupported(f"{name}, which writes into a tensor")
        return name[:-1]
    return name


_SKIPPED = ("_linalg_check_errors", "_assert_async", "_assert_tensor_metadata")


def _known(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    return _rule_name(node) in _RULES or _rule_name(node) in _SKIPPED


def _decomposed(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    """Operators without a rule, written by simpler ones where torch knows how."""
    for _ in range(3):
        unknown = {n.target for n in graph.graph.nodes if not _known(n)}
        if not unknown:
            return graph
        from torch._decomp import get_decompositions

        table: Any = get_decompositions(list(unknown))
        if not table:
            break
        try:
            with torch.no_grad():
                graph = simplify(record(_Written(graph, table).run, example), example)
        except (Aliased, RuntimeError) as error:
            raise Unsupported(f"operators that cannot be written by others: {error}") from None
    unknown = {str(n.target) for n in graph.graph.nodes if not _known(n)}
    if unknown:
        raise Unsupported(f"no rule for {', '.join(sorted(unknown))}")
    return graph


class _Written(fx.Interpreter):
    """Runs a graph with some operators written by others.

    Under :func:`~bayesgen.inference.programs.record.record` that makes a graph of these, without
    importing Dynamo, which takes ``make_fx`` a second.
    """

    def __init__(self, graph: fx.GraphModule, table: dict[Any, Any]) -> None:
        super().__init__(graph)
        self.table = table

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self.table.get(target, target), args, kwargs)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and _rule_name(node) in ("unsqueeze", "view", "expand")


class _Translator:
    def __init__(self, graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        self.graph, self.values = graph, values
        self.emitter = Emitter()
        self.made: dict[fx.Node, Any] = {}
        self.uses: Counter[fx.Node] = Counter()
        for node in graph.graph.nodes:
            for leaf in tree_flatten((node.args, node.kwargs))[0]:
                if isinstance(leaf, fx.Node):
                    self.uses[leaf] += 1

    def run(self, size: int) -> Translation:
        lp: Any = None
        gradient: Any = None
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = _argument(size)
            elif node.op == "get_attr":
                self.made[node] = self.emitter.constant(self._shortened(node))
            elif node.op == "call_function":
                self.made[node] = self._call(node)
            elif node.op == "output":
                lp, gradient = (self.made[n] for n in node.args[0])
        self.emitter.lines.append("")
        e = self.emitter
        g = e.settle(gradient)
        e.flush()
        text = lp.at((0,) * len(lp.shape))
        e.lines.append(f"*lp = {text};")
        e.lines += e.loops(g.shape, lambda i: [f"g[{i[0]}] = {g.at(i)};"])
        body, workspace = e.text()
        numbers, integers = e.blobs()
        text = (
            "static NOINLINE void density(const V* x, V* lp, V* g, V* w, const double* C, "
            "const I* J) {\n"
            f"{body}\n}}\n"
        )
        return Translation(text, numbers, integers, workspace, body.count("\n"))

    def _shortened(self, node: fx.Node) -> Tensor:
        """A constant; one that folding has filled with one number, as that number."""
        held: Tensor = self.values[node]
        if not str(node.target).startswith("_folded") or held.numel() < 2:
            return held
        first = held.flatten()[0]
        return first.expand(held.shape) if bool((held == first).all()) else held

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.made[node.args[0]][node.args[1]]  # type: ignore[index]
        meta = self.values[node]
        name = _rule_name(node)
        if name in _SKIPPED:
            return None
        if isinstance(meta, Tensor):
            self._check(meta)
        args = list(tree_map(self._operand, node.args))
        kwargs = {k: tree_map(self._operand, v) for k, v in node.kwargs.items()}
        if name == "exp":
            beside = self._softmax(node)
            if beside is not None:
                return self._kept(node, beside)
        if name in _INDEXED:
            args[1] = self._indices(node, args[0].shape)
        made = _RULES[name](self.emitter, meta, *args, **kwargs)
        if isinstance(made, Value):
            return self._kept(node, made)
        return made

    def _softmax(self, node: fx.Node) -> Value | None:
        """``exp(x - lse)`` of the log-sum-exp of ``x``: its exponentials are there."""
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not torch.ops.aten.sub.Tensor:
            return None
        x, lse = inner.args[:2]
        while isinstance(lse, fx.Node) and _is_view(lse):
            lse = lse.args[0]
        if not isinstance(lse, fx.Node) or lse.target is not torch.ops.aten.logsumexp.default:
            return None
        if lse.args[0] is not x or len(inner.args) > 2 or inner.kwargs:
            return None
        found = softmax_beside(self.emitter, self.made[lse])
        return (
            found if found is not None and found.shape == tuple(self.values[node].shape) else None
        )

    def _kept(self, node: fx.Node, made: Value) -> Value:
        assert made.shape == tuple(self.values[node].shape), (node, made.shape)
        if made.kind == "I" or made.cost == 0:
            return made
        again = self.uses[node] > 1 or (made.still and made.cost > 2)
        if again or made.cost > _INLINED:
            return self.emitter.settle(made)
        return made

    def _check(self, meta: Tensor) -> None:
        if meta.is_complex() or (meta.is_floating_point() and meta.dtype != torch.float64):
            raise Unsupported(f"numbers of {meta.dtype}")

    def _operand(self, value: Any) -> Any:
        return self.made[value] if isinstance(value, fx.Node) else value

    def _indices(self, node: fx.Node, shape: tuple[int, ...]) -> list[Value | None]:
        """Constant indices, none negative, masks written out."""
        found: list[Value | None] = []
        for index in node.args[1]:  # type: ignore[union-attr]
            if index is None:
                found.append(None)
                continue
            assert isinstance(index, fx.Node)
            if index.op != "get_attr":
                raise Unsupported("an index that depends on the parameters")
            tensor = self.values[index]
            if tensor.dtype == torch.bool:
                found += [self.emitter.constant(v) for v in tensor.nonzero(as_tuple=True)]
            else:
                size = shape[len(found)]
                fixed = torch.where(tensor < 0, tensor + size, tensor)
                found.append(self.emitter.constant(fixed))
        return found


def _argument(size: int) -> Value:
    return Value(
        (size,),
        "V",
        lambda index: f"x[{index[0]}]",
        lambda term: f"x[{term}]",
        place=lambda: ("x", contiguous((size,))),
    )
