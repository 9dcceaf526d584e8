"""C++ for views, and for operators that read an entry where an index decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from bayesgen.inference.compiled.emit import (
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
}
"""Rule of each operator by its name in ATen, overloads alike."""
