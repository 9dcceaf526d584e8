"""C++ for operators that move entries: views, joins, gathers and scatters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from bayesgen.inference.emit import (
    Emitter,
    Index,
    Term,
    Unsupported,
    Value,
    add,
    contiguous,
    linear_index,
    literal,
    mul,
)
from bayesgen.inference.pointwise_rules import broadcast, number_at, truth_at

__all__ = ["SHAPES"]

Rule = Callable[..., Any]


# ---------------------------------------------------------------- views
def _affine(value: Value, shape: Sequence[int], where: Callable[[Index], Index]) -> Value:
    """A view whose entry at an index is the source's at an affine function of it."""
    shape = tuple(shape)
    place = None
    if value.place is not None:
        source = value.place

        def place() -> tuple[str, tuple[int, ...]]:
            pointer, strides = source()
            zeros = (0,) * len(shape)
            offset = linear_index(where(zeros), strides)
            assert isinstance(offset, int)
            steps = []
            for k in range(len(shape)):
                one = tuple(int(j == k) for j in range(len(shape)))
                moved = linear_index(where(one), strides)
                assert isinstance(moved, int)
                steps.append(moved - offset)
            return (f"({pointer}+{offset})" if offset else pointer), tuple(steps)

    return Value(
        shape,
        value.kind,
        lambda index: value.at(where(index)),
        cost=value.cost,
        place=place,
        shared=value.shared,
        still=_still(value, shape, where),
    )


def _still(
    value: Value, shape: tuple[int, ...], where: Callable[[Index], Index]
) -> frozenset[int]:
    """Dimensions along which a view moves only where its source stays the same."""
    base, found = where((0,) * len(shape)), set()
    for k in range(len(shape)):
        moved = where(tuple(int(j == k) for j in range(len(shape))))
        if all(
            a == b or d in value.still for d, (a, b) in enumerate(zip(base, moved, strict=True))
        ):
            found.add(k)
    return frozenset(found)


def _reshape(e: Emitter, value: Value, shape: Sequence[int]) -> Value:
    """The same entries in row-major order."""
    shape = tuple(shape)
    if value.shape == shape:
        return value
    if [n for n in value.shape if n != 1] == [n for n in shape if n != 1]:
        kept = [k for k, n in enumerate(shape) if n != 1]

        def where(index: Index) -> Index:
            terms = iter([index[k] for k in kept])
            return tuple(0 if n == 1 else next(terms) for n in value.shape)

        same = _affine(value, shape, where)
        return dataclasses.replace(same, linear=value.linear)
    if value.linear is None:
        if value.kind == "I":
            raise Unsupported("reshaped integers")
        value = _written_out(e, value)
    strides, source, linear = contiguous(shape), value, value.linear
    assert linear is not None

    def place() -> tuple[str, tuple[int, ...]]:
        assert source.place is not None
        return source.place()[0], strides

    return Value(
        shape,
        value.kind,
        lambda index: linear(linear_index(index, strides)),
        linear,
        place=place if source.place is not None else None,
        shared=source.shared,
    )


def _written_out(e: Emitter, value: Value) -> Value:
    return e.realise(value.shape, value.kind, lambda index, body: value.at(index))


def _view(e: Emitter, meta: Any, value: Value, *_: Any, **__: Any) -> Value:
    return _reshape(e, value, meta.shape)


def _same(e: Emitter, meta: Any, value: Value, *_: Any, **__: Any) -> Value:
    return value


def _expand(e: Emitter, meta: Any, value: Value, *_: Any, **__: Any) -> Value:
    shape = tuple(meta.shape)
    if math.prod(shape) > value.size:
        value = e.settle(value)
    gap = len(shape) - len(value.shape)

    def where(index: Index) -> Index:
        return tuple(0 if n == 1 else i for i, n in zip(index[gap:], value.shape, strict=True))

    return _affine(value, shape, where)


def _permute(e: Emitter, meta: Any, value: Value, dims: Sequence[int]) -> Value:
    dims = [d % len(value.shape) for d in dims]

    def where(index: Index) -> Index:
        found: list[Term] = [0] * len(dims)
        for k, d in enumerate(dims):
            found[d] = index[k]
        return tuple(found)

    return _affine(value, meta.shape, where)


def _transpose(e: Emitter, meta: Any, value: Value, first: int = 0, second: int = 1) -> Value:
    if len(value.shape) < 2:
        return value
    dims = list(range(len(value.shape)))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(e, meta, value, dims)


def _select(e: Emitter, meta: Any, value: Value, dim: int, index: int) -> Value:
    dim, index = dim % len(value.shape), index % value.shape[dim]
    return _affine(value, meta.shape, lambda i: (*i[:dim], index, *i[dim:]))


def _slice(
    e: Emitter,
    meta: Any,
    value: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    dim = dim % len(value.shape)
    first = slice(start, end, step).indices(value.shape[dim])[0]
    return _affine(
        value, meta.shape, lambda i: (*i[:dim], add(mul(i[dim], step), first), *i[dim + 1 :])
    )


def _diagonal(
    e: Emitter, meta: Any, value: Value, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Value:
    n = len(value.shape)
    dim1, dim2 = dim1 % n, dim2 % n

    def where(index: Index) -> Index:
        rest = iter(index[:-1])
        last = index[-1]
        return tuple(
            add(last, max(-offset, 0))
            if k == dim1
            else add(last, max(offset, 0))
            if k == dim2
            else next(rest)
            for k in range(n)
        )

    return _affine(value, meta.shape, where)


def _flip(e: Emitter, meta: Any, value: Value, dims: Sequence[int]) -> Value:
    turned = {d % len(value.shape) for d in dims}

    def where(index: Index) -> Index:
        return tuple(
            add(mul(i, -1), n - 1) if k in turned else i
            for k, (i, n) in enumerate(zip(index, value.shape, strict=True))
        )

    return _affine(value, meta.shape, where)


def _pieces(e: Emitter, meta: Any, value: Value, sizes: Any, dim: int = 0) -> list[Value]:
    dim, start, found = dim % len(value.shape), 0, []
    for part in meta:
        size = part.shape[dim]
        found.append(_slice(e, part, value, dim, start, start + size))
        start += size
    return found


def _unbind(e: Emitter, meta: Any, value: Value, dim: int = 0) -> list[Value]:
    return [_select(e, part, value, dim, k) for k, part in enumerate(meta)]


# ---------------------------------------------------------------- where an index decides
def _inside(
    meta: Any, value: Value, test: Callable[[Index], tuple[list[str], Index | None]], outside: str
) -> Value:
    """``value`` at a shifted index where conditions on the index hold, a constant elsewhere."""

    def at(index: Index) -> str:
        conditions, inner = test(index)
        if inner is None:
            return outside
        if not conditions:
            return value.at(inner)
        return f"(({' && '.join(conditions)}) ? {value.at(inner)} : {outside})"

    return Value(tuple(meta.shape), value.kind, at, cost=value.cost + 1)


def _between(term: Term, low: int, high: int) -> list[str] | None:
    """Conditions for ``low <= term < high``; None if it never holds."""
    if isinstance(term, int):
        return [] if low <= term < high else None
    return [f"{term} >= {low}", f"{term} < {high}"]


def _outside(value: Value, number: float = 0.0) -> str:
    return f"all({literal(number)})" if value.kind == "V" else f"truth((I){int(number)})"


def _pad(e: Emitter, meta: Any, value: Value, pad: Sequence[int], number: float = 0.0) -> Value:
    low = [0] * len(value.shape)
    for k in range(len(pad) // 2):
        low[-1 - k] = pad[2 * k]

    def test(index: Index) -> tuple[list[str], Index | None]:
        conditions: list[str] = []
        for i, shift, n in zip(index, low, value.shape, strict=True):
            found = _between(i, shift, shift + n)
            if found is None:
                return [], None
            conditions += found
        return conditions, tuple(add(i, -s) for i, s in zip(index, low, strict=True))

    return _inside(meta, value, test, _outside(value, number))


def _slice_backward(
    e: Emitter,
    meta: Any,
    grad: Value,
    sizes: Sequence[int],
    dim: int,
    start: int,
    end: int,
    step: int,
) -> Value:
    dim = dim % len(sizes)
    first = slice(start, end, step).indices(sizes[dim])[0]
    count = grad.shape[dim]

    def test(index: Index) -> tuple[list[str], Index | None]:
        i = index[dim]
        conditions = _between(i, first, first + step * (count - 1) + 1)
        if conditions is None or (isinstance(i, int) and (i - first) % step):
            return [], None
        shifted = add(i, -first)
        if step != 1:
            if isinstance(shifted, str):
                conditions = [*conditions, f"({shifted}) % {step} == 0"]
                shifted = f"(({shifted})/{step})"
            else:
                shifted //= step
        return conditions, (*index[:dim], shifted, *index[dim + 1 :])

    return _inside(meta, grad, test, _outside(grad))


def _select_backward(
    e: Emitter, meta: Any, grad: Value, sizes: Sequence[int], dim: int, chosen: int
) -> Value:
    dim = dim % len(sizes)
    chosen = chosen % sizes[dim]

    def test(index: Index) -> tuple[list[str], Index | None]:
        conditions = _between(index[dim], chosen, chosen + 1)
        rest = (*index[:dim], *index[dim + 1 :])
        return (conditions, rest) if conditions is not None else ([], None)

    return _inside(meta, grad, test, _outside(grad))


def _equal(left: Term, right: Term, sign: str = "==") -> str:
    return f"({left}) {sign} ({right})"


def _diagonal_backward(
    e: Emitter, meta: Any, grad: Value, sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Value:
    dim1, dim2 = dim1 % len(sizes), dim2 % len(sizes)
    down, right = max(-offset, 0), max(offset, 0)

    def test(index: Index) -> tuple[list[str], Index | None]:
        last = add(index[dim1], -down)
        rest = tuple(i for k, i in enumerate(index) if k not in (dim1, dim2))
        conditions = [
            _equal(last, add(index[dim2], -right)),
            f"({last}) >= 0",
            f"({last}) < {grad.shape[-1]}",
        ]
        return conditions, (*rest, last)

    return _inside(meta, grad, test, _outside(grad))


def _diag_embed(
    e: Emitter, meta: Any, value: Value, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Value:
    return _diagonal_backward(e, meta, value, tuple(meta.shape), offset, dim1, dim2)


def _triangle(sign: str) -> Rule:
    def rule(e: Emitter, meta: Any, value: Value, diagonal: int = 0) -> Value:
        def test(index: Index) -> tuple[list[str], Index | None]:
            return [_equal(index[-1], add(index[-2], diagonal), sign)], index

        return _inside(meta, value, test, _outside(value))

    return rule


# ---------------------------------------------------------------- joins
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
    read = number_at(new, shape) if value.kind == "V" else truth_at(new, shape)
    new = e.settle(new)
    sign = "+=" if accumulate else "="

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        lines = _copy_into(e, entry, value, lambda i: i)
        return lines + e.loops(shape, lambda i: [f"{entry(where(i))} {sign} {read(i)};"])

    return e.written(value.shape, value.kind, write)


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


SHAPES: dict[str, Rule] = {
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "expand": _expand,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _view,
    "squeeze": _view,
    "select": _select,
    "slice": _slice,
    "diagonal": _diagonal,
    "flip": _flip,
    "split_with_sizes": _pieces,
    "split": _pieces,
    "unbind": _unbind,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "contiguous": _same,
    "lift_fresh_copy": _same,
    "constant_pad_nd": _pad,
    "slice_backward": _slice_backward,
    "select_backward": _select_backward,
    "diagonal_backward": _diagonal_backward,
    "diag_embed": _diag_embed,
    "tril": _triangle("<="),
    "triu": _triangle(">="),
    "cat": _cat,
    "stack": _stack,
    "repeat": _repeat,
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
