"""C++ for operators that join tensors, and that gather and scatter by constant indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesgen.inference.compiled.emit import Emitter, Index, Term, Unsupported, Value, add, mul
from bayesgen.inference.compiled.pointwise_rules import broadcast, number_at, truth_at

__all__ = ["INDICES"]

Rule = Callable[..., Any]


def _copy_into(
    e: Emitter,
    entry: Callable[..., str],
    value: Value,
    where: Callable[[Index], Index],
    fixed: dict[int, Term] | None = None,
) -> list[Any]:
    return e.loops(
        value.shape, lambda index: [f"{entry(where(index))} = {value.at(index)};"], fixed
    )


def _shifted(dim: int, by: int) -> Callable[[Index], Index]:
    return lambda index: (*index[:dim], add(index[dim], by), *index[dim + 1 :])


def _inserted(dim: int, term: int) -> Callable[[Index], Index]:
    return lambda index: (*index[:dim], term, *index[dim:])


def _cat(e: Emitter, meta: Any, values: Sequence[Value], dim: int = 0) -> Value:
    values = [v for v in values if v.shape != (0,)]
    dim = dim % len(meta.shape)

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines: list[Any] = []
        start = 0
        for value in values:
            lines += _copy_into(e, entry, value, _shifted(dim, start), fixed)
            start += value.shape[dim]
        return lines

    others = [k for k in range(len(meta.shape)) if k != dim]
    return e.written(tuple(meta.shape), values[0].kind, write, others)


def _stack(e: Emitter, meta: Any, values: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % len(meta.shape)

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines: list[Any] = []
        for number, value in enumerate(values):
            moved = {k if k < dim else k - 1: term for k, term in fixed.items()}
            lines += _copy_into(e, entry, value, _inserted(dim, number), moved)
        return lines

    others = [k for k in range(len(meta.shape)) if k != dim]
    return e.written(tuple(meta.shape), values[0].kind, write, others)


def _repeat(e: Emitter, meta: Any, value: Value, repeats: Sequence[int]) -> Value:
    value = e.settle(value)
    gap = len(meta.shape) - len(value.shape)

    def at(index: Index) -> str:
        return value.at(
            tuple(
                i if isinstance(i, int) and i < n else (f"(({i}) % {n})" if n > 1 else 0)
                for i, n in zip(index[gap:], value.shape, strict=True)
            )
        )

    return Value(tuple(meta.shape), value.kind, at)


# ---------------------------------------------------------------- by constant indices
def _index_shape(indices: Sequence[Value | None]) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for value in indices:
        if value is not None:
            wide, narrow = sorted((found, value.shape), key=len, reverse=True)
            narrow = (1,) * (len(wide) - len(narrow)) + narrow
            found = tuple(b if a == 1 else a for a, b in zip(wide, narrow, strict=True))
    return found


def _located(
    value: Value, indices: Sequence[Value | None], joint: tuple[int, ...]
) -> tuple[Callable[[Index], Index], int]:
    """Where entries of ``value[indices]`` come from, and where its joint dimensions start."""
    if any(v is not None and v.kind != "I" for v in indices):
        raise Unsupported("an index that depends on the parameters")
    given = [k for k, v in enumerate(indices) if v is not None]
    together = given == list(range(given[0], given[-1] + 1))
    start = given[0] if together else 0
    reads = {k: broadcast(indices[k], joint) for k in given}  # type: ignore[arg-type]

    def where(index: Index) -> Index:
        inner = index[start : start + len(joint)]
        rest = iter((*index[:start], *index[start + len(joint) :]))
        return tuple(
            reads[k](inner) if k in reads else next(rest) for k in range(len(value.shape))
        )

    return where, start


def _index(e: Emitter, meta: Any, value: Value, indices: Sequence[Value | None]) -> Value:
    joint = _index_shape(indices)
    where, _ = _located(value, indices, joint)
    value = e.settle(value)
    return Value(tuple(meta.shape), value.kind, lambda index: value.at(where(index)))


def _index_select(e: Emitter, meta: Any, value: Value, dim: int, index: Value) -> Value:
    dim = dim % len(value.shape)
    return _index(e, meta, value, [None] * dim + [index])


def _index_put(
    e: Emitter,
    meta: Any,
    value: Value,
    indices: Sequence[Value | None],
    new: Value,
    accumulate: bool = False,
) -> Value:
    joint = _index_shape(indices)
    where, start = _located(value, indices, joint)
    rest = [n for k, n in enumerate(value.shape) if k >= len(indices) or indices[k] is None]
    shape = (*rest[:start], *joint, *rest[start:])
    new = e.settle(new)
    read = number_at(new, shape) if value.kind == "V" else truth_at(new, shape)
    only = indices[0] if len(indices) == 1 else None
    if accumulate and only is not None and only.known is not None and len(joint) == 1:
        return _segments(e, value, only.known, read)
    sign = "+=" if accumulate else "="

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines = _copy_into(e, entry, value, lambda i: i)
        return lines + e.loops(shape, lambda i: [f"{entry(where(i))} {sign} {read(i)};"])

    return e.written(value.shape, value.kind, write)


def _segments(e: Emitter, value: Value, known: Tensor, read: Callable[[Index], str]) -> Value:
    """Rows added up by their index, one sum after the other.

    In the order of the rows each addition would wait for the one before it to reach memory.
    """
    order, counts = known.argsort(stable=True), known.bincount(minlength=value.shape[0])
    start = e.constant(torch.cat((counts.new_zeros(1), counts.cumsum(0))))
    rows = None if bool((order.diff() == 1).all()) else e.constant(order)

    def one(entry: Callable[..., str], i: Index) -> list[Any]:
        total, row = e.name("r"), e.name("i")
        place: Term = row if rows is None else rows.at((row,))
        first, last = start.at((i[0],)), start.at((add(i[0], 1),))
        return [
            f"V {total} = {value.at(i)};",
            f"for (long {row} = {first}; {row} < {last}; {row}++)",
            f"{total} += {read((place, *i[1:]))};",
            f"{entry(i)} = {total};",
        ]

    return e.written(
        value.shape, value.kind, lambda entry, _: e.loops(value.shape, lambda i: one(entry, i))
    )


def _gather(e: Emitter, meta: Any, value: Value, dim: int, index: Value, **_: Any) -> Value:
    if index.kind != "I":
        raise Unsupported("an index that depends on the parameters")
    value = e.settle(value)
    if not value.shape:
        return value
    dim = dim % len(value.shape)
    return Value(
        tuple(meta.shape),
        value.kind,
        lambda i: value.at((*i[:dim], index.at(i), *i[dim + 1 :])),
    )


def _scatter(sign: str) -> Rule:
    def rule(e: Emitter, meta: Any, value: Value, dim: int, index: Value, new: Any) -> Value:
        if index.kind != "I":
            raise Unsupported("an index that depends on the parameters")
        dim = dim % len(value.shape)
        read = number_at(new, index.shape) if not isinstance(new, Value) else new.at

        def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
            lines = _copy_into(e, entry, value, lambda i: i)
            return lines + e.loops(
                index.shape,
                lambda i: [f"{entry((*i[:dim], index.at(i), *i[dim + 1 :]))} {sign} {read(i)};"],
            )

        return e.written(value.shape, value.kind, write)

    return rule


def _index_add(
    e: Emitter, meta: Any, value: Value, dim: int, index: Value, new: Value, alpha: float = 1
) -> Value:
    if alpha != 1:
        raise Unsupported("index_add with a factor")
    dim = dim % len(value.shape)
    return _index_put(e, meta, value, [None] * dim + [index], new, True)


def _slice_scatter(
    e: Emitter,
    meta: Any,
    value: Value,
    new: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    dim = dim % len(value.shape)
    first = slice(start, end, step).indices(value.shape[dim])[0]

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines = _copy_into(e, entry, value, lambda i: i)
        return lines + _copy_into(
            e, entry, new, lambda i: (*i[:dim], add(mul(i[dim], step), first), *i[dim + 1 :])
        )

    return e.written(value.shape, value.kind, write)


def _select_scatter(
    e: Emitter, meta: Any, value: Value, new: Value, dim: int, index: int
) -> Value:
    dim = dim % len(value.shape)
    index = index % value.shape[dim]

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines = _copy_into(e, entry, value, lambda i: i)
        return lines + _copy_into(e, entry, new, _inserted(dim, index))

    return e.written(value.shape, value.kind, write)


INDICES: dict[str, Rule] = {
    "repeat": _repeat,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    "index_select": _index_select,
    "index_put": _index_put,
    "index_add": _index_add,
    "gather": _gather,
    "scatter": _scatter("="),
    "scatter_add": _scatter("+="),
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
}
"""Rule of each operator by its name in ATen, overloads alike."""
