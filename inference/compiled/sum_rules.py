"""C++ for operators that add up: reductions, running sums, softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bayesgen.inference.compiled.emit import (
    Emitter,
    Index,
    Term,
    Value,
    add,
)
from bayesgen.inference.compiled.pointwise_rules import number_at

__all__ = ["SUMS", "softmax_beside", "sum_of"]

Combine = Callable[[str, str], str]


def _dims(value: Value, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(len(value.shape)))
    given = [dims] if isinstance(dims, int) else dims
    return sorted(d % len(value.shape) for d in given) if value.shape else []


def _placed(value: Value, dims: Sequence[int], keep: bool, outer: Index, inner: Index) -> Index:
    """The full index of a reduced one and the indices summed over."""
    rest, summed = iter(outer), iter(inner)
    found: list[Term] = []
    for k in range(len(value.shape)):
        if k in dims:
            found.append(next(summed))
            if keep:
                next(rest)
        else:
            found.append(next(rest))
    return tuple(found)


def _reduced(value: Value, dims: Sequence[int], keep: bool) -> tuple[int, ...]:
    if keep:
        return tuple(1 if k in dims else n for k, n in enumerate(value.shape))
    return tuple(n for k, n in enumerate(value.shape) if k not in dims)


def _fold(
    e: Emitter,
    value: Value,
    dims: Sequence[int],
    keep: bool,
    outer: Index,
    body: list[Any],
    start: str,
    combine: Combine,
    element: Callable[[str], str] = lambda text: text,
) -> str:
    """Statements that fold ``value`` over ``dims`` into a new variable, whose name is returned."""
    name = e.name("r")
    shape = [value.shape[d] for d in dims]
    body.append(f"V {name} = {start};")
    if combine is _plus and shape and shape[-1] >= 16:
        body += _four_sums(e, value, dims, keep, outer, name, element)
        return name

    def step(inner: Index) -> list[Any]:
        entry = element(value.at(_placed(value, dims, keep, outer, inner)))
        return [f"{name} = {combine(name, entry)};"]

    body += e.loops(shape, step)
    return name


def _four_sums(
    e: Emitter,
    value: Value,
    dims: Sequence[int],
    keep: bool,
    outer: Index,
    name: str,
    element: Callable[[str], str],
) -> list[Any]:
    """A long sum by four that do not wait for each other."""
    *rest, size = [value.shape[d] for d in dims]
    k = e.name("i")

    def at(inner: Index, shift: int) -> str:
        return element(value.at(_placed(value, dims, keep, outer, (*inner, add(k, shift)))))

    def body(inner: Index) -> list[Any]:
        lines = [f"{name}_{j} += {at(inner, j)};" for j in range(4)]
        left = [f"{name} += {at(inner, 0)};"]
        return [
            f"V {', '.join(f'{name}_{j} = zero()' for j in range(4))};",
            f"for (long {k} = 0; {k} < {size - size % 4}; {k} += 4) {{",
            *lines,
            "}",
            *(
                [f"for (long {k} = {size - size % 4}; {k} < {size}; {k}++) {{", *left, "}"]
                if size % 4
                else []
            ),
            f"{name} += ({name}_0 + {name}_1) + ({name}_2 + {name}_3);",
        ]

    return e.loops(rest, body)


def _as_numbers(value: Value) -> Value:
    if value.kind == "V":
        return value
    return Value(value.shape, "V", number_at(value, value.shape), cost=value.cost + 1)


def _rest(value: Value, dims: Sequence[int], keep: bool) -> frozenset[int]:
    """Dimensions of a reduction along which it stays the same."""
    left = [k for k in range(len(value.shape)) if keep or k not in dims]
    return frozenset(j for j, k in enumerate(left) if k in value.still and k not in dims)


def _plus(a: str, b: str) -> str:
    return f"{a} + {b}"


def sum_of(
    e: Emitter, meta: Any, value: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    """The sum over some dimensions, or all."""
    value = _as_numbers(value)
    axes = _dims(value, dims)
    shape = _reduced(value, axes, keepdim)
    if all(value.shape[k] == 1 for k in axes):
        whole = value
        return Value(
            shape,
            "V",
            lambda index: whole.at(_placed(whole, axes, keepdim, index, (0,) * len(axes))),
            cost=value.cost,
            still=_rest(value, axes, keepdim),
        )
    at = e.total(value, axes)
    if at is not None:
        kept = [k for k in range(len(value.shape)) if keepdim and k not in axes]
        taken = at
        return Value(shape, "V", lambda i: taken(tuple(i[k] for k in kept) if keepdim else i))
    return e.realise(
        shape,
        "V",
        lambda index, body: _fold(e, value, axes, keepdim, index, body, "zero()", _plus),
        _rest(value, axes, keepdim),
    )


def _mean(
    e: Emitter, meta: Any, value: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    total = sum_of(e, meta, value, dims, keepdim)
    count = value.size / max(1, total.size)
    return Value(
        total.shape, "V", lambda index: f"({total.at(index)} / {count!r})", cost=2 + total.cost
    )


def _extreme(name: str, start: str) -> Callable[..., Value]:
    def rule(
        e: Emitter, meta: Any, value: Value, dims: Any = None, keepdim: bool = False
    ) -> Value:
        value = _as_numbers(value)
        axes = _dims(value, dims)
        return e.realise(
            _reduced(value, axes, keepdim),
            "V",
            lambda index, body: _fold(
                e,
                value,
                axes,
                keepdim,
                index,
                body,
                f"all({start})",
                lambda a, b: f"{name}({a}, {b})",
            ),
            _rest(value, axes, keepdim),
        )

    return rule


_most = _extreme("vmax", "-__builtin_inf()")


def _prod(
    e: Emitter, meta: Any, value: Value, dims: Any = None, keepdim: bool = False, **_: Any
) -> Value:
    axes = _dims(value, dims)
    return e.realise(
        _reduced(value, axes, keepdim),
        "V",
        lambda index, body: _fold(
            e, value, axes, keepdim, index, body, "all(1.0)", lambda a, b: f"{a} * {b}"
        ),
    )


def _any(e: Emitter, meta: Any, value: Value, dims: Any = None, keepdim: bool = False) -> Value:
    total = sum_of(e, meta, value, dims, keepdim)
    return Value(
        total.shape, "M", lambda index: f"({total.at(index)} != 0.0)", cost=total.cost + 1
    )


# ---------------------------------------------------------------- softmax and its kin
def _logsumexp(e: Emitter, meta: Any, value: Value, dims: Any, keepdim: bool = False) -> Value:
    value = e.settle(value)
    axes = _dims(value, dims)
    shape = _reduced(value, axes, True)
    most = _most(e, meta, value, axes, True)

    def safe(index: Index) -> str:
        return f"pick(visinf({most.at(index)}), zero(), {most.at(index)})"

    shift = e.settle(Value(shape, "V", safe, cost=3, still=most.still))

    def term(index: Index) -> str:
        inner = tuple(0 if k in axes else i for k, i in enumerate(index))
        return f"vexp({value.at(index)} - {shift.at(inner)})"

    terms = e.settle(Value(value.shape, "V", term, cost=13, still=value.still & shift.still))
    total = sum_of(e, meta, terms, axes, True)

    def log(index: Index) -> str:
        return f"(vlog({total.at(index)}) + {shift.at(index)})"

    whole = e.settle(Value(shape, "V", log, cost=13, still=shift.still))
    found = whole
    if not keepdim:

        def at(index: Index) -> str:
            return whole.at(_placed(whole, axes, False, index, (0,) * len(axes)))

        found = Value(
            _reduced(value, axes, False), "V", at, whole.linear, still=_rest(whole, axes, False)
        )
    e.softmax[id(found)] = found, terms, total, tuple(axes)
    return found


def softmax_beside(e: Emitter, lse: Value) -> Value | None:
    """``exp(x - logsumexp(x))``, from the exponentials that the sum was taken of."""
    held = e.softmax.get(id(lse))
    if held is None:
        return None
    _, terms, total, axes = held
    inverse = e.settle(
        Value(total.shape, "V", lambda i: f"(1.0 / {total.at(i)})", cost=3, still=total.still)
    )

    def at(index: Index) -> str:
        inner = tuple(0 if k in axes else i for k, i in enumerate(index))
        return f"({terms.at(index)} * {inverse.at(inner)})"

    return Value(terms.shape, "V", at, cost=1, still=terms.still & inverse.still)


def _spread(value: Value, reduced: Value, dim: int, template: str, cost: int) -> Value:
    """Entry by entry from a value and its reduction that kept the dimension."""

    def at(index: Index) -> str:
        inner = tuple(0 if k == dim else i for k, i in enumerate(index))
        return template.format(value.at(index), reduced.at(inner))

    return Value(value.shape, "V", at, cost=cost, still=value.still & reduced.still)


def _log_softmax(e: Emitter, meta: Any, value: Value, dim: int, half: bool = False) -> Value:
    value = e.settle(value)
    if not value.shape:
        return Value((), "V", lambda index: "zero()")
    dim = dim % len(value.shape)
    return _spread(value, _logsumexp(e, meta, value, dim, True), dim, "({} - {})", 1)


def _softmax(e: Emitter, meta: Any, value: Value, dim: int, half: bool = False) -> Value:
    log = _log_softmax(e, meta, value, dim)
    return Value(
        value.shape, "V", lambda index: f"vexp({log.at(index)})", cost=13, still=log.still
    )


def _log_softmax_backward(
    e: Emitter, meta: Any, grad: Value, out: Value, dim: int, _: Any
) -> Value:
    grad, out = e.settle(grad), e.settle(out)
    dim = dim % len(grad.shape)
    total = sum_of(e, None, grad, dim, True)
    both = Value(out.shape, "V", lambda index: f"vexp({out.at(index)})", cost=12, still=out.still)
    both = e.settle(both) if both.still else both
    scaled = _spread(both, total, dim, "({} * {})", 13)
    return Value(
        grad.shape, "V", lambda index: f"({grad.at(index)} - {scaled.at(index)})", cost=14
    )


def _softmax_backward(e: Emitter, meta: Any, grad: Value, out: Value, dim: int, _: Any) -> Value:
    grad, out = e.settle(grad), e.settle(out)
    dim = dim % len(grad.shape)
    product = Value(grad.shape, "V", lambda i: f"({grad.at(i)} * {out.at(i)})", cost=1)
    total = sum_of(e, None, product, dim, True)
    scaled = _spread(out, total, dim, "({} * {})", 1)
    return Value(grad.shape, "V", lambda i: f"({product.at(i)} - {scaled.at(i)})", cost=3)


def _all_but(dim: int, value: Value) -> list[int]:
    return [k for k in range(len(value.shape)) if k != dim]


def _running(start: str, combine: str) -> Callable[..., Value]:
    def rule(e: Emitter, meta: Any, value: Value, dim: int, **_: Any) -> Value:
        if not value.shape:
            return value
        value = _as_numbers(value)
        dim = dim % len(value.shape)
        outer = (*value.shape[:dim], *value.shape[dim + 1 :])

        def write(entry: Callable[..., str], fixed: dict[int, Term]) -> list[Any]:
            def body(index: Index) -> list[Any]:
                name = e.name("r")

                def step(inner: Index) -> list[Any]:
                    at = (*index[:dim], inner[0], *index[dim:])
                    return [
                        f"{name} = {combine.format(name, value.at(at))};",
                        f"{entry(at)} = {name};",
                    ]

                return [f"V {name} = {start};", *e.loops([value.shape[dim]], step)]

            moved = {k if k < dim else k - 1: term for k, term in fixed.items()}
            return e.loops(outer, body, moved)

        return e.written(value.shape, "V", write, _all_but(dim, value))

    return rule


SUMS: dict[str, Callable[..., Any]] = {
    "sum": sum_of,
    "mean": _mean,
    "amax": _most,
    "amin": _extreme("vmin", "__builtin_inf()"),
    "prod": _prod,
    "any": _any,
    "logsumexp": _logsumexp,
    "_log_softmax": _log_softmax,
    "_softmax": _softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "_softmax_backward_data": _softmax_backward,
    "cumsum": _running("zero()", "{} + {}"),
    "cumprod": _running("all(1.0)", "{} * {}"),
    "logcumsumexp": _running("all(-__builtin_inf())", "vlogaddexp({}, {})"),
}
"""Rule of each operator by its name in ATen, overloads alike."""
