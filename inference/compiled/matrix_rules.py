"""C++ for products of matrices, triangular systems and Cholesky factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bayesgen.inference.compiled.emit import Emitter, Index, Term, Unsupported, Value, linear_index
from bayesgen.inference.compiled.pointwise_rules import number_at
from bayesgen.inference.compiled.sum_rules import sum_of

__all__ = ["MATRICES"]

_SHORT, _FEW = 8, 32  # terms of a sum written in place, sums taken while their rows are computed
_LARGEST_FACTOR = 256  # rows of a matrix that BLAS factors faster than plain loops


def _matrices(e: Emitter, value: Value) -> tuple[Value, str, tuple[int, ...]]:
    pointer, strides = e.pointer(value)
    return value, pointer, strides


def _offset(pointer: str, index: Index, strides: Sequence[int]) -> str:
    where = linear_index(index, strides)
    return pointer if where == 0 else f"{pointer}+{where}"


def _product(e: Emitter, left: Value, right: Value) -> Value:
    """``(..., n, k) @ (..., k, m)`` of equal leading dimensions."""
    if left.shared and right.shared:
        raise Unsupported("a product of two large constants")
    lead, n, k, m = left.shape[:-2], left.shape[-2], left.shape[-1], right.shape[-1]
    by_columns = k > 4 and ((left.shared and n > 3) or (right.shared and m > 3))
    if not by_columns and (k <= _SHORT or math.prod((*lead, n, m)) <= _FEW):
        return _sum_of_products(e, left, right)
    left, right = _in_memory(e, left), _in_memory(e, right)
    (pa, sa), (pb, sb) = e.pointer(left), e.pointer(right)
    if by_columns and left.shared and n > 3:
        return _by_columns(e, (pa, sa), (pb, sb), lead, n, k, m)
    if by_columns:
        turned = (pb, _turned(sb)), (pa, _turned(sa))
        return _by_columns(e, *turned, lead, m, k, n, turned=True)

    def generate(index: Index, body: list[Any]) -> str:
        head, i, j = index[:-2], index[-2], index[-1]
        a = _offset(pa, (*head, i), sa[:-1])
        b = _offset(pb, (*head, j), (*sb[:-2], sb[-1]))
        return f"dot({a}, {sa[-1]}, {b}, {sb[-2]}, {k})"

    return e.realise((*lead, n, m), "V", generate)


def _sum_of_products(e: Emitter, left: Value, right: Value) -> Value:
    """A small product, or a sum over many rows: in the loop that computes the factors."""
    left, right = e.settle(left), e.settle(right)
    shape = (*left.shape[:-1], right.shape[-1], left.shape[-1])

    def at(index: Index) -> str:
        *head, i, j, k = index
        return f"({left.at((*head, i, k))} * {right.at((*head, k, j))})"

    return sum_of(e, None, Value(shape, "V", at, cost=1), -1)


def _in_memory(e: Emitter, value: Value) -> Value:
    if value.place is not None and value.cost == 0:
        return value
    return e.realise(value.shape, "V", lambda index, body: value.at(index))


def _turned(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (*strides[:-2], strides[-1], strides[-2])


Placed = tuple[str, tuple[int, ...]]


def _by_columns(
    e: Emitter,
    left: Placed,
    right: Placed,
    lead: tuple[int, ...],
    n: int,
    k: int,
    m: int,
    turned: bool = False,
) -> Value:
    """Eight outputs at a time, so that each number of the other factor is read once for them."""
    (pa, sa), (pb, sb) = left, right

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        def body(index: Index) -> list[Any]:
            head, j = index[:-1], index[-1]
            a, b = _offset(pa, head, sa[:-2]), _offset(pb, (*head, j), (*sb[:-2], sb[-1]))
            to, row, column = entry((*head, j, 0)), sa[-1], sa[-2]
            return [f"columns(&{to}, {a}, {k}, {row}, {n}, {column}, {b}, {sb[-2]});"]

        return e.loops((*lead, m), body)

    found = e.written((*lead, m, n), "V", write)
    return found if turned else _swapped(found)


def _swapped(value: Value) -> Value:
    """The last two dimensions exchanged."""
    shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
    place = value.place

    def moved() -> Placed:
        assert place is not None
        pointer, strides = place()
        return pointer, _turned(strides)

    return Value(
        shape,
        value.kind,
        lambda index: value.at((*index[:-2], index[-1], index[-2])),
        value.linear if 1 in shape[-2:] else None,
        cost=value.cost,
        place=moved if place else None,
        shared=value.shared,
    )


def _with_shape(value: Value, shape: tuple[int, ...]) -> Value:
    """The same with dimensions of size one put in or left out at the end."""
    extra = len(shape) - len(value.shape)
    place = value.place

    def moved() -> Placed:
        assert place is not None
        pointer, strides = place()
        return pointer, (*strides, 0) if extra > 0 else strides[:extra]

    def at(index: Index) -> str:
        return value.at(index[:-extra] if extra > 0 else (*index, 0))

    return Value(
        shape, value.kind, at, value.linear, value.cost, moved if place else None, value.shared
    )


def _mm(e: Emitter, meta: Any, left: Value, right: Value) -> Value:
    return _product(e, left, right)


def _mv(e: Emitter, meta: Any, left: Value, right: Value) -> Value:
    right = _in_memory(e, right)
    product = _product(e, left, _with_shape(right, (*right.shape, 1)))
    return _with_shape(product, product.shape[:-1])


def _dot(e: Emitter, meta: Any, left: Value, right: Value) -> Value:
    product = Value(left.shape, "V", lambda i: f"({left.at(i)} * {right.at(i)})", cost=1)
    return sum_of(e, meta, product)


def _plus_product(kind: Callable[..., Value]) -> Callable[..., Value]:
    def rule(
        e: Emitter,
        meta: Any,
        first: Value,
        left: Value,
        right: Value,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> Value:
        product = kind(e, meta, left, right)
        read = number_at(first, product.shape)
        return Value(
            product.shape,
            "V",
            lambda i: f"({float(beta)!r} * {read(i)} + {float(alpha)!r} * {product.at(i)})",
            cost=3 + first.cost + product.cost,
        )

    return rule


# ---------------------------------------------------------------- triangular matrices
def _check_size(value: Value) -> None:
    if value.shape[-1] > _LARGEST_FACTOR:
        raise Unsupported(f"a factor of {value.shape[-1]} rows: BLAS is faster")


def _solve_triangular(
    e: Emitter,
    meta: Any,
    matrix: Value,
    right: Value,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Value:
    _check_size(matrix)
    if not left:  # X A = B is A' X' = B'
        turned = _solve_triangular(
            e,
            None,
            _swapped(matrix),
            _swapped(right),
            upper=not upper,
            unitriangular=unitriangular,
        )
        return _swapped(turned)
    matrix, right = e.settle(matrix), e.settle(right)
    n, columns = right.shape[-2:]
    lead = tuple(meta.shape[:-2]) if meta is not None else _lead(matrix, right)
    shape = (*lead, n, columns)
    a_at, b_at = number_at(matrix, (*lead, n, n)), number_at(right, shape)

    def pivot(index: Index) -> str:
        return f"(1.0 / {matrix.at((*index, index[-1]))})"

    pivots = Value((*matrix.shape[:-2], n), "V", pivot, cost=3)
    pivot_at = number_at(e.settle(pivots), (*lead, n))

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        def body(index: Index) -> list[Any]:
            head, j = index[:-1], index[-1]
            i, k, r = e.name("i"), e.name("i"), e.name("r")
            rows = f"{i} = {n - 1}; {i} >= 0; {i}--" if upper else f"{i} = 0; {i} < {n}; {i}++"
            before = f"{k} = {i} + 1; {k} < {n}" if upper else f"{k} = 0; {k} < {i}"
            known = f"{a_at((*head, i, k))} * {entry((*head, k, j))}"
            over = "" if unitriangular else f" * {pivot_at((*head, i))}"
            unrolled = [f"#pragma GCC unroll {n}"] if n <= 4 else []
            return [
                *unrolled,
                f"for (long {rows}) {{",
                f"V {r} = {b_at((*head, i, j))};",
                *unrolled,
                f"for (long {before}; {k}++) {r} -= {known};",
                f"{entry((*head, i, j))} = {r}{over};",
                "}",
            ]

        outer = {k if k < len(lead) else len(lead): term for k, term in fixed.items()}
        return e.loops((*lead, columns), body, outer)

    parallel = [*range(len(lead)), len(lead) + 1]
    return e.written(shape, "V", write, parallel)


def _lead(left: Value, right: Value) -> tuple[int, ...]:
    a, b = left.shape[:-2], right.shape[:-2]
    size = max(len(a), len(b))
    a, b = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    return tuple(max(x, y) for x, y in zip(a, b, strict=True))


def _cholesky(e: Emitter, meta: Any, matrix: Value, upper: bool = False, **_: Any) -> Value:
    _check_size(matrix)
    matrix = e.settle(matrix)
    lead, n = matrix.shape[:-2], matrix.shape[-1]

    def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
        def body(index: Index) -> list[Any]:
            i, j, k, r = e.name("i"), e.name("i"), e.name("i"), e.name("r")
            return [
                f"for (long {j} = 0; {j} < {n}; {j}++) {{",
                f"V {r} = {matrix.at((*index, j, j))};",
                f"for (long {k} = 0; {k} < {j}; {k}++) {r} -= vsquare({entry((*index, j, k))});",
                f"{r} = vsqrt({r});",
                f"{entry((*index, j, j))} = {r};",
                f"{r} = 1.0 / {r};",
                f"for (long {i} = 0; {i} < {j}; {i}++) {entry((*index, i, j))} = zero();",
                f"for (long {i} = {j} + 1; {i} < {n}; {i}++) {{",
                f"V q{r} = {matrix.at((*index, i, j))};",
                f"for (long {k} = 0; {k} < {j}; {k}++) "
                f"q{r} -= {entry((*index, i, k))} * {entry((*index, j, k))};",
                f"{entry((*index, i, j))} = q{r} * {r};",
                "}",
                "}",
            ]

        return e.loops(lead, body)

    factor = e.written(matrix.shape, "V", write)
    return _swapped(factor) if upper else factor


def _cholesky_ex(
    e: Emitter, meta: Any, matrix: Value, *, upper: bool = False, **_: Any
) -> list[Value]:
    factor = _cholesky(e, meta, matrix, upper)
    return [factor, Value(matrix.shape[:-2], "I", lambda index: "0")]


def _identity(lead: tuple[int, ...], n: int) -> Value:
    def at(index: Index) -> str:
        i, j = index[-2:]
        if isinstance(i, int) and isinstance(j, int):
            return f"all({float(i == j)!r})"
        return f"all(({i}) == ({j}) ? 1.0 : 0.0)"

    return Value((*lead, n, n), "V", at)


def _cholesky_inverse(e: Emitter, meta: Any, factor: Value, upper: bool = False) -> Value:
    """``(L L')^-1``, from the columns of ``L^-1``."""
    lower = _swapped(factor) if upper else factor
    one = _identity(factor.shape[:-2], factor.shape[-1])
    inverse = _solve_triangular(e, None, lower, one, upper=False)
    return _product(e, _swapped(inverse), inverse)


def _cholesky_solve(
    e: Emitter, meta: Any, right: Value, factor: Value, upper: bool = False
) -> Value:
    lower = _swapped(factor) if upper else factor
    half = _solve_triangular(e, None, lower, right, upper=False)
    return _solve_triangular(e, None, _swapped(lower), half, upper=True)


MATRICES: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "bmm": _mm,
    "mv": _mv,
    "dot": _dot,
    "addmm": _plus_product(_mm),
    "baddbmm": _plus_product(_mm),
    "addmv": _plus_product(_mv),
    "linalg_solve_triangular": _solve_triangular,
    "linalg_cholesky_ex": _cholesky_ex,
    "cholesky": _cholesky,
    "cholesky_inverse": _cholesky_inverse,
    "cholesky_solve": _cholesky_solve,
    "linalg_cholesky": _cholesky,
}
"""Rule of each operator by its name in ATen, overloads alike."""
