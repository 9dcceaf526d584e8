"""A tensor graph made small: constants folded, no-ops dropped, equal nodes shared."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayesgen.inference.compiled.onednn import by_onednn
from bayesgen.inference.programs.record import Aliased, RandomNumbers, record, sources_forgotten

__all__ = ["capture", "compile_graph", "gradient_alone", "never_raising", "simplify"]

_aten = torch.ops.aten
_SHAPE_ONLY = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}
_SAME = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.clone.default,
    _aten.contiguous.default,
}
_RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.expand.default,
    _aten._to_copy.default,
    _aten.slice.Tensor,
}
_STRIDED = {_aten.as_strided.default, _aten.as_strided_scatter.default}
_MAX_FOLDED = 2**22  # elements: larger constants are cheaper to compute than to hold


class _DataApart(TorchDispatchMode):
    """While tracing, compute what depends on data alone at once, so that code may branch on it.

    Only operations on existing tensors without side effects: a fresh tensor may yet be written
    into.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        mode = get_proxy_mode()
        if mode is None or func._schema.is_mutable:
            return func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        known = [get_proxy_slot(v, mode.tracer, None) is not None for v in tensors]
        if not tensors or any(known):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)


@sources_forgotten()
def capture(
    function: Callable[..., Any], *example: Tensor, data_apart: bool = False
) -> fx.GraphModule:
    """Trace ``function`` at ``example`` into a graph of tensor operations without side effects.

    Args:
        function: Of tensors, to tensors.
        example: Its arguments.
        data_apart: Whether what depends on no argument is computed at once; code may then branch
        on
            it. Check the result: a tensor of data that is written into later is not followed.
    """
    with torch.no_grad(), contextlib.suppress(Aliased, RandomNumbers):
        return record(function, *example)
    if data_apart:
        inner = function

        def function(*values: Tensor) -> Any:
            with _DataApart():
                return inner(*values)

    # One fake mode for all: without it each node's shape would be noted in one of its own, which
    # takes most of the time.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with torch.no_grad(), tracing(context):
        # Twice: gradients taken by torch.autograd.grad cannot be functionalised in the same pass.
        graph = make_fx(function)(*example)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return make_fx(torch.func.functionalize(graph))(*example)


@sources_forgotten()
def simplify(graph: fx.GraphModule, *example: Tensor) -> fx.GraphModule:
    """Fold what does not depend on the input, drop operations that change nothing, share equals.

    Nothing is reordered, so the result differs from the original by rounding at most: additions of
    exact zeros and products with exact ones are all that is left out. Single precision constants
    of a graph in double precision are widened, so that nothing computed from them is rounded to
    single precision, as torch does where a scalar in double meets a vector in single precision.
    """
    graph.graph.eliminate_dead_code()
    _widen(graph, example[0].dtype)
    values = _evaluate(graph, example)
    _fold(graph, values)
    _values_of_max(graph, values)
    _plain_copy(graph, values)
    _plain_view(graph, values)
    _plain_scatter(graph, values)
    _masked_write(graph, values)
    _masked_scatter(graph, values)
    _counted_from_the_start(graph, values)
    _log_sigmoid(graph, values)
    _drop(graph, values)
    _share(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _widen(graph: fx.GraphModule, dtype: torch.dtype) -> None:
    """Constants that a program brings in single precision, exactly, in the dtype of the graph.

    So are conversions to it: of a scalar in double times such a vector, torch's own gradient is
    one.
    """
    if dtype != torch.float64:
        return
    for name, value in list(graph.named_buffers()):
        if value.dtype == torch.float32:
            graph.register_buffer(name, value.double())
    for node in graph.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": dtype}


def _evaluate(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            kept[n] = super().run_node(n)
            return kept[n]

    kept: dict[fx.Node, Any] = {}
    with torch.no_grad():
        Keep(graph).run(*example)
    return kept


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _fold(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Replace every node that no input reaches by its value."""
    fixed: set[fx.Node] = set()
    mutated = {a for n in graph.graph.nodes if _is_mutable(n) for a in n.all_input_nodes}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            if node not in mutated:
                fixed.add(node)
        elif node.op == "call_function" and not _is_mutable(node) and node not in mutated:
            if node.target in _SHAPE_ONLY or all(a in fixed for a in node.all_input_nodes):
                fixed.add(node)
    for index, node in enumerate(list(graph.graph.nodes)):
        value = values.get(node)
        if node.op != "call_function" or node not in fixed or not isinstance(value, Tensor):
            continue
        if all(user in fixed for user in node.users) or value.numel() > _MAX_FOLDED:
            continue
        name = f"_folded_{index}"
        graph.register_buffer(name, _copied(value))
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        values[constant] = value
        node.replace_all_uses_with(constant)


def _copied(value: Tensor) -> Tensor:
    """A copy of the same strides: ``clone`` would fill in what ``expand`` had repeated."""
    value = value.detach()
    repeated = [k for k in range(value.ndim) if value.stride(k) == 0 and value.shape[k] > 1]
    small = value
    for k in repeated:
        small = small.narrow(k, 0, 1)
    return small.clone().expand(value.shape)


def _drop(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Remove copies, reshapes to the same shape, additions of zero and products with one."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(values.get(node), Tensor):
            continue
        same = _equivalent(node, values)
        if same is not None:
            node.replace_all_uses_with(same)
    graph.graph.eliminate_dead_code()


def _equivalent(node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node | None:
    args = node.args
    first = args[0] if args and isinstance(args[0], fx.Node) else None
    if first is not None and node.target in _SAME and _alike(values, node, first):
        return first
    if first is not None and node.target in _RESHAPES and _alike(values, node, first):
        return first
    if first is not None and node.target is _aten.sum.dim_IntList:
        # sum over a dimension of size one, put there by an unsqueeze
        if first.target is _aten.unsqueeze.default and isinstance(first.args[0], fx.Node):
            inner, axes = first.args[0], tuple(args[1] or ())  # type: ignore[arg-type]
            size, axis = values[first].ndim, first.args[1]
            # Of one size: both are the dimension that the unsqueeze put there.
            if _alike(values, node, inner) and len(axes) == 1 and len(args) == 2:
                if axes[0] % size == axis % size:
                    return inner
    if node.target in (_aten.add.Tensor, _aten.sub.Tensor) and len(args) == 2 and not node.kwargs:
        return _neutral(node, values, 0.0, node.target is _aten.add.Tensor)
    if node.target is _aten.copy.default and isinstance(args[1], fx.Node):
        return args[1] if _alike(values, node, args[1]) else None
    if node.target is _aten.pow.Tensor_Scalar and args[1] == 1:
        return first
    if node.target is _aten.mul.Tensor:
        return _neutral(node, values, 1.0, True)
    if node.target is _aten.div.Tensor and len(args) == 2 and not node.kwargs:
        return _neutral(node, values, 1.0, False)
    return None


def _neutral(
    node: fx.Node, values: dict[fx.Node, Any], neutral: float, commutes: bool
) -> fx.Node | None:
    left, right = node.args
    for kept, other in ((left, right), (right, left)) if commutes else ((left, right),):
        if isinstance(kept, fx.Node) and _is_constant(other, values, neutral):
            if _alike(values, node, kept):
                return kept
    return None


def _is_constant(argument: Any, values: dict[fx.Node, Any], number: float) -> bool:
    if isinstance(argument, int | float):
        return argument == number
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        value = values.get(argument)
        return isinstance(value, Tensor) and bool((value == number).all())
    return False


def _alike(values: dict[fx.Node, Any], one: fx.Node, other: fx.Node) -> bool:
    left, right = values.get(one), values.get(other)
    return (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.shape == right.shape
        and left.dtype == right.dtype
        and left.device == right.device
        and left.stride() == right.stride()  # a view further down may depend on it
    )


def _values_of_max(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """``max(x, dim)`` of which no index is used becomes ``amax``, which vmap has a rule for."""
    for node in list(graph.graph.nodes):
        if node.target is not _aten.max.dim or any(u.args[1] != 0 for u in node.users):
            continue
        with graph.graph.inserting_before(node):
            rest = node.args[2:]
            new = graph.graph.call_function(
                _aten.amax.default, (node.args[0], [node.args[1]], *rest)
            )
        values[new] = values[node][0]
        for user in list(node.users):
            user.replace_all_uses_with(new)


def _places(graph: fx.GraphModule, node: fx.Node, whole: Tensor) -> Tensor | None:
    """Flat positions that a strided view takes; None where they are not those of ``whole``."""
    if not whole.is_contiguous() or whole.storage_offset():
        return None
    geometry: Any = node.args[1:] if node.target is _aten.as_strided.default else node.args[2:]
    places = torch.arange(whole.numel(), device=whole.device).as_strided(*geometry).reshape(-1)
    graph.register_buffer(f"_places_{node.name}", places)
    return places


def _plain_view(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write ``as_strided`` by ``index_select``, which has rules for batches and for C++."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.as_strided.default):
        base = node.args[0]
        whole, wanted = values[base], values[node]
        # A strided view of this one would count by strides that are gone then.
        if any(user.target in _STRIDED for user in node.users):
            continue
        if (places := _places(graph, node, whole)) is None:
            continue
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            index = graph.graph.get_attr(f"_places_{node.name}")
            flat = call(_aten.reshape.default, (base, [-1]))
            found = call(_aten.index_select.default, (flat, 0, index))
            shaped = call(_aten.reshape.default, (found, list(wanted.shape)))
        values |= {index: places, flat: whole.reshape(-1)}
        values |= {found: wanted.reshape(-1), shaped: wanted.contiguous()}
        node.replace_all_uses_with(shaped)
        graph.graph.erase_node(node)


def _plain_scatter(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write ``as_strided_scatter`` by ``scatter``: there is no batching rule for the former."""
    for node in graph.graph.find_nodes(
        op="call_function", target=_aten.as_strided_scatter.default
    ):
        base, source = node.args[:2]
        whole = values[base]
        if (places := _places(graph, node, whole)) is None:
            continue
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            index = graph.graph.get_attr(f"_places_{node.name}")
            flat = call(_aten.reshape.default, (base, [-1]))
            new = call(_aten.reshape.default, (source, [-1]))
            found = call(_aten.scatter.src, (flat, 0, index, new))
            shaped = call(_aten.reshape.default, (found, list(whole.shape)))
        value = values[node].reshape(-1)
        values |= {index: places, flat: whole.reshape(-1), found: value, shaped: values[node]}
        values[new] = values[source].reshape(-1)
        node.replace_all_uses_with(shaped)
        graph.graph.erase_node(node)


def _masked_write(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write ``x[mask] = number`` by ``where``: vmap has no rule for a mask as an index."""
    for node in list(graph.graph.find_nodes(op="call_function", target=_aten.index_put.default)):
        base, places, number, *accumulate = node.args
        if len(places) != 1 or places[0] is None or any(accumulate):
            continue
        mask = values[places[0]]
        if (
            mask.dtype != torch.bool
            or mask.shape != values[base].shape
            or values[number].numel() != 1
        ):
            continue
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            one = call(_aten.reshape.default, (number, []))
            new = call(_aten.where.self, (places[0], one, base))
        values |= {one: values[number].reshape(()), new: values[node]}
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _masked_scatter(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write ``masked_scatter`` by positions where the mask is data: vmap and C++ lack a rule.

    A mask that depends on the input has no fixed positions, and stays.
    """
    for target in (_aten.masked_scatter.default, _aten.masked_scatter_backward.default):
        for node in list(graph.graph.find_nodes(op="call_function", target=target)):
            first, mask, last = node.args
            if mask.op != "get_attr":
                continue
            places = values[mask].expand(values[first].shape).reshape(-1).nonzero()[:, 0]
            graph.register_buffer(f"_places_{node.name}", places)
            with graph.graph.inserting_before(node):
                call = graph.graph.call_function
                index = graph.graph.get_attr(f"_places_{node.name}")
                flat = call(_aten.reshape.default, (first, [-1]))
                if target is _aten.masked_scatter.default:
                    source = call(_aten.reshape.default, (last, [-1]))
                    source = call(_aten.slice.Tensor, (source, 0, 0, len(places)))
                    found = call(_aten.scatter.src, (flat, 0, index, source))
                else:  # entries of the source beyond those that the mask takes have no gradient
                    found = call(_aten.index_select.default, (flat, 0, index))
                    rest = values[node].numel() - len(places)
                    found = call(_aten.constant_pad_nd.default, (found, [0, rest], 0.0))
                new = call(_aten.reshape.default, (found, list(values[node].shape)))
            values |= {index: places, new: values[node]}
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)


def _counted_from_the_start(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Bounds of ``slice_scatter`` as positions: vmap's rule does not know what -1 stands for."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.slice_scatter.default):
        base, source, axis, start, end, step = node.args + (0, None, None, 1)[len(node.args) - 2 :]
        bounds = slice(start, end, step).indices(values[base].shape[axis])
        node.args = (base, source, axis, *bounds)


def _plain_copy(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write ``copy`` by what it copies: vmap has no rule for it, and warns at every call."""
    for node in list(graph.graph.find_nodes(op="call_function", target=_aten.copy.default)):
        base, source = node.args[:2]
        whole, given = values[base], values[source]
        if (whole.dtype, whole.device) != (given.dtype, given.device):
            continue
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(_aten.expand.default, (source, list(whole.shape)))
        values[new] = given.expand(whole.shape)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _log_sigmoid(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Write log-sigmoid by ``logaddexp``: torch's own resizes a buffer under vmap, and warns."""
    for node in list(graph.graph.nodes):
        if node.target is _aten.log_sigmoid_forward.default:
            value = values[node][0]
            graph.register_buffer(f"_zero_{node.name}", value.new_zeros(()))
            with graph.graph.inserting_before(node):
                negative = graph.graph.call_function(_aten.neg.default, (node.args[0],))
                zero = graph.graph.get_attr(f"_zero_{node.name}")
                both = graph.graph.call_function(_aten.logaddexp.default, (negative, zero))
                new = graph.graph.call_function(_aten.neg.default, (both,))
            values |= {negative: value, both: value, new: value, zero: value.new_zeros(())}
            for user in list(node.users):
                if user.args[1] == 0:
                    user.replace_all_uses_with(new)
        elif node.target is _aten.log_sigmoid_backward.default:
            with graph.graph.inserting_before(node):
                negative = graph.graph.call_function(_aten.neg.default, (node.args[1],))
                slope = graph.graph.call_function(_aten.sigmoid.default, (negative,))
                new = graph.graph.call_function(_aten.mul.Tensor, (node.args[0], slope))
            values |= {negative: values[node], slope: values[node], new: values[node]}
            node.replace_all_uses_with(new)


def never_raising(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph, giving numbers that are not finite where a matrix is singular.

    In place, and to be simplified, which compiles it. Of many chains in one call some may be far
    out; torch would raise for all.
    """
    for node in list(graph.graph.nodes):
        if node.target is _aten._linalg_check_errors.default:
            graph.graph.erase_node(node)
        elif node.target is _aten.cholesky_inverse.default:
            with graph.graph.inserting_before(node):
                factor, *upper = node.args
                zero = graph.graph.call_function(_aten.zeros_like.default, (factor,))
                one = graph.graph.call_function(_aten.diagonal.default, (zero, 0, -2, -1))
                one = graph.graph.call_function(_aten.add.Scalar, (one, 1.0))
                eye = graph.graph.call_function(_aten.diag_embed.default, (one,))
                new = graph.graph.call_function(
                    _aten.cholesky_solve.default, (eye, factor, *upper)
                )
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    return graph


def _share(graph: fx.GraphModule) -> None:
    """Compute equal nodes once."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or _is_mutable(node) or node.target is operator.getitem:
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    # 1, 1.0 and True are equal to Python but not to torch
    return value if isinstance(value, fx.Node) else (type(value).__name__, repr(value))


@sources_forgotten()
def gradient_alone(both: fx.GraphModule) -> fx.GraphModule:
    """A graph of a value and its gradient without what only the value needs: the value is zero."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(both.graph, copied)
    assert isinstance(outputs, tuple | list)
    zero = graph.call_function(_aten.zeros.default, ([],), {"dtype": torch.float64})
    graph.output((zero, outputs[1]))
    graph.eliminate_dead_code()
    return fx.GraphModule(both, graph)


def compile_graph(
    graph: fx.GraphModule, *example: Tensor, cpp_wrapper: bool = False
) -> Callable[..., Any]:
    """Compile by Inductor, without Dynamo's guards; needs a C++ compiler on CPU.

    Args:
        graph: To compile.
        example: Arguments of the shapes and strides that it will be called with.
        cpp_wrapper: Whether the calls between kernels are C++ as well: no Python is left, and
            compiling takes longer.

    Raises:
        RuntimeError: No compiler, or one that fails; the eager graph then does the work.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates parts of itself as it imports them
        from torch._inductor import compile as inductor

        by_onednn(graph, _evaluate(graph, example))
        for node in graph.graph.nodes:
            node.meta.clear()  # what tracing left there makes the C++ wrapper fail
        options = {"cpp_wrapper": True} if cpp_wrapper else {}
        compiled: Callable[..., Any] = inductor(graph, list(example), options=options)
        compiled(*example)
    return compiled
