"""Trace a function by watching its tensor operations: ``make_fx`` at a tenth of its cost."""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph_module import _loader
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Aliased", "DataDependent", "RandomNumbers", "record", "sources_forgotten"]

_aten = torch.ops.aten
_READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "item",
    "nonzero",
    "_unique2",
    "unique_dim",
}


class Aliased(Exception):
    """A tensor that others look into was written into; the slower way keeps track of that."""


class DataDependent(RuntimeError):
    """The program looks at a value, so that its operations depend on it."""


class RandomNumbers(RuntimeError):
    """The function draws random numbers."""


class _Recorder(TorchDispatchMode):
    """Writes down each operation that depends on the arguments; runs the others at once."""

    def __init__(self, graph: fx.Graph, root: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph, self.root = graph, root
        self.known: Any = WeakIdKeyDictionary()
        self.constants: dict[int, tuple[Tensor, int, fx.Node]] = {}
        # Held, or a later tensor could lie where a freed one did.
        self.viewed: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled by Dynamo, whose import alone takes most of a second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        known = [isinstance(v, Tensor) and v in self.known for v in flat]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RandomNumbers(str(func))
        if not any(known):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _READS:
            raise DataDependent(
                "the value of a latent site, or of what is computed from it, decides what runs"
            )
        target = args[0] if func._schema.is_mutable and args else None
        before = self._node(target) if isinstance(target, Tensor) else None
        nodes = [self._node(v) if isinstance(v, Tensor) else v for v in flat]
        if func._schema.is_mutable and not self._is_own(func, name, args):
            raise Aliased(name)
        result = func(*args, **kwargs)
        operands, options = tree_unflatten(nodes, spec)
        if before is not None:
            if name == "copy_" and isinstance(target, Tensor):
                self.known[target] = self._copy(target, operands[1])
            else:
                self.known[target] = self._functional(func, before, operands, options)
            return result
        node = self.graph.call_function(func, operands, options)
        self._bind(result, node)
        if func.is_view:
            storage = args[0].untyped_storage()
            self.viewed[storage._cdata] = storage
        return result

    def _functional(
        self, func: Any, before: fx.Node, operands: tuple[Any, ...], options: dict[str, Any]
    ) -> fx.Node:
        packet = getattr(torch.ops.aten, func.overloadpacket.__name__[:-1])
        # The overload itself, which rules know; a few have another name.
        function = getattr(packet, func._overloadname, packet)
        return self.graph.call_function(function, (before, *operands[1:]), options)

    def _copy(self, target: Tensor, source: fx.Node) -> fx.Node:
        """What ``target.copy_(source)`` leaves there; ``aten.copy`` has no rule under vmap."""
        call = self.graph.call_function
        node = call(_aten.expand.default, (source, list(target.shape)))
        node = call(_aten._to_copy.default, (node,), {"dtype": target.dtype})
        return call(_aten.clone.default, (node,), {"memory_format": torch.contiguous_format})

    def _is_own(self, func: Any, name: str, args: tuple[Any, ...]) -> bool:
        """Whether an operation writes into its first argument alone, which nothing looks into."""
        target = args[0]
        mutable = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        return (
            len(mutable) == 1
            and mutable[0] is not None
            and func._schema.arguments[0].alias_info is not None
            and name.endswith("_")
            and isinstance(target, Tensor)
            and target._base is None
            and target.untyped_storage()._cdata not in self.viewed
        )

    def _node(self, tensor: Tensor) -> fx.Node:
        node = self.known.get(tensor)
        if node is not None:
            return node
        held = self.constants.get(id(tensor))
        if held is None:
            name = f"_tensor_constant{len(self.root)}"
            self.root[name] = tensor
            held = tensor, tensor._version, self.graph.get_attr(name)
            self.constants[id(tensor)] = held
        return held[2]

    def _bind(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.known[result] = node
        elif isinstance(result, list | tuple):
            for k, value in enumerate(result):
                if isinstance(value, Tensor):
                    self.known[value] = self.graph.call_function(operator.getitem, (node, k))

    def unchanged(self) -> bool:
        """Whether no constant has been written into since it was met."""
        return all(tensor._version == version for tensor, version, _ in self.constants.values())


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Drop the texts of graphs that torch keeps for tracebacks: they would grow with every fit."""
    before = set(_loader.eval_cache)
    try:
        yield
    finally:
        for key in set(_loader.eval_cache) - before:
            del _loader.eval_cache[key]
            linecache.cache.pop(key, None)


@sources_forgotten()
def record(function: Callable[..., Any], *example: Tensor) -> fx.GraphModule:
    """The graph of ``function`` at ``example``; what depends on no argument is computed at once.

    Raises:
        Aliased: It writes into tensors in a way that is not followed here.
        DataDependent: It looks at a value.
        RandomNumbers: It draws some.
    """
    graph, root = fx.Graph(), dict[str, Tensor]()
    recorder = _Recorder(graph, root)
    inputs = tuple(value.detach().clone() for value in example)
    for k, value in enumerate(inputs):
        recorder.known[value] = graph.placeholder(f"arg{k}_1")
    with recorder:
        result = function(*inputs)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    nodes = tuple(recorder._node(value) for value in outputs)
    if not recorder.unchanged():
        raise Aliased("a constant")
    graph.output(nodes[0] if isinstance(result, Tensor) else nodes)
    module = torch.nn.Module()
    for name, tensor in root.items():
        module.register_buffer(name, tensor.detach())
    return fx.GraphModule(module, graph)
