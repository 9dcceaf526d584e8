"""C++ for operators that work entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bayesgen.inference.compiled.emit import Emitter, Index, Unsupported, Value, literal

__all__ = ["POINTWISE", "broadcast", "common_still", "number_at", "pointwise_rule", "truth_at"]

_HEAVY = 12  # operations that one call of a special function counts for


def broadcast(value: Value, shape: tuple[int, ...]) -> Callable[[Index], str]:
    """Read ``value`` at an index of a larger shape that it broadcasts to."""
    gap = len(shape) - len(value.shape)

    def at(index: Index) -> str:
        inner = index[gap:]
        return value.at(tuple(0 if n == 1 else i for i, n in zip(inner, value.shape, strict=True)))

    return at


def common_still(shape: tuple[int, ...], operands: Sequence[Any]) -> frozenset[int]:
    """Dimensions of the result along which no operand changes."""
    found = {k for k, n in enumerate(shape) if n > 1}
    for value in operands:
        if isinstance(value, Value):
            gap = len(shape) - len(value.shape)
            found -= {k + gap for k, n in enumerate(value.shape) if n > 1 and k not in value.still}
    return frozenset(found)


def number_at(value: Any, shape: tuple[int, ...]) -> Callable[[Index], str]:
    """Read as numbers by chain, whatever it is."""
    if not isinstance(value, Value):
        text = f"all({literal(value)})"
        return lambda index: text
    read = broadcast(value, shape)
    if value.kind == "M":
        return lambda index: f"number({read(index)})"
    if value.kind == "I":
        return lambda index: f"all((double){read(index)})"
    return read


def truth_at(value: Any, shape: tuple[int, ...]) -> Callable[[Index], str]:
    """Read as truths by chain."""
    if not isinstance(value, Value):
        return lambda index: f"truth((I){int(bool(value))})"
    read = broadcast(value, shape)
    return read if value.kind == "M" else (lambda index: f"truth({read(index)})")


def pointwise_rule(
    template: Callable[..., str],
    *,
    out: str = "V",
    cost: int = 1,
    truths: tuple[int, ...] = (),
    count: int,
) -> Callable[..., Value]:
    """A rule for an operator of ``count`` operands, which ``template`` writes out."""

    def rule(e: Emitter, meta: Any, *args: Any, **kwargs: Any) -> Value:
        shape = tuple(meta.shape)
        reads = [
            truth_at(a, shape) if k in truths else number_at(a, shape)
            for k, a in enumerate(args[:count])
        ]
        rest = args[count:]
        total = cost + sum(a.cost for a in args[:count] if isinstance(a, Value))
        return Value(
            shape,
            out,
            lambda index: template(*(read(index) for read in reads), *rest, **kwargs),
            cost=total,
            still=common_still(shape, args[:count]),
        )

    return rule


def _call(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"({a} {sign} {b})"


def _plus(sign: str) -> Callable[..., str]:
    def write(a: str, b: str, alpha: float = 1) -> str:
        return f"({a} {sign} {b})" if alpha == 1 else f"({a} {sign} {literal(alpha)} * {b})"

    return write


def _rsub(a: str, b: str, alpha: float = 1) -> str:
    return f"({b} - {a})" if alpha == 1 else f"({b} - {literal(alpha)} * {a})"


def _div(a: str, b: str, rounding_mode: str | None = None) -> str:
    if rounding_mode not in (None, "floor", "trunc"):
        raise Unsupported(f"division with rounding {rounding_mode}")
    quotient = f"({a} / {b})"
    return {None: "{}", "floor": "vfloor({})", "trunc": "vtrunc({})"}[rounding_mode].format(
        quotient
    )


_POWERS = {
    0.5: "vsqrt({})",
    1.0: "({})",
    2.0: "vsquare({})",
    -0.5: "(1.0 / vsqrt({}))",
    -1.0: "(1.0 / ({}))",
    -2.0: "(1.0 / vsquare({}))",
}


def _pow(e: Emitter, meta: Any, base: Any, exponent: Any) -> Value:
    if isinstance(exponent, int | float):
        special = _POWERS.get(float(exponent))
        if special is not None:
            return pointwise_rule(special.format, count=1)(e, meta, base)
        if float(exponent) == 3.0 and isinstance(base, Value):
            cube = pointwise_rule(lambda a: f"(vsquare({a}) * {a})", count=1, cost=2)
            return cube(e, meta, e.settle(base))
    return pointwise_rule(_call("vpow"), count=2, cost=2 * _HEAVY)(e, meta, base, exponent)


def _clamp(e: Emitter, meta: Any, x: Value, low: Any = None, high: Any = None) -> Value:
    if low is not None:
        x = pointwise_rule(_call("vmax"), count=2)(e, meta, x, low)
    if high is not None:
        x = pointwise_rule(_call("vmin"), count=2)(e, meta, x, high)
    return x


def _softplus(e: Emitter, meta: Any, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    b, t = literal(beta), literal(threshold)
    rule = pointwise_rule(
        lambda a: f"pick({a} * {b} > {t}, {a}, vlog1p(vexp({a} * {b})) / {b})",
        count=1,
        cost=2 * _HEAVY,
    )
    return rule(e, meta, e.settle(x))


def _softplus_backward(
    e: Emitter, meta: Any, grad: Value, x: Value, beta: float, threshold: float
) -> Value:
    b, t = literal(beta), literal(threshold)
    rule = pointwise_rule(
        lambda g, a: f"pick({a} * {b} > {t}, {g}, {g} / (1.0 + vexp(-({a} * {b}))))",
        count=2,
        cost=_HEAVY,
    )
    return rule(e, meta, e.settle(grad), e.settle(x))


def _polygamma(e: Emitter, meta: Any, order: int, x: Value) -> Value:
    if order not in (0, 1):
        raise Unsupported(f"polygamma of order {order}")
    name = "vtrigamma" if order else "vdigamma"
    return pointwise_rule(_call(name), count=1, cost=4 * _HEAVY)(e, meta, x)


def _logical(sign: str) -> Callable[..., Value]:
    return pointwise_rule(_infix(sign), out="M", truths=(0, 1), count=2)


def _bitwise(sign: str) -> Callable[..., Value]:
    def rule(e: Emitter, meta: Any, *args: Any) -> Value:
        if meta.dtype != torch.bool:
            raise Unsupported("bits of integers")
        return _logical(sign)(e, meta, *args)

    return rule


def _where(e: Emitter, meta: Any, mask: Value, a: Any, b: Any) -> Value:
    if meta.dtype == torch.bool:
        return pointwise_rule(_call("both"), out="M", truths=(0, 1, 2), count=3)(
            e, meta, mask, a, b
        )
    return pointwise_rule(_call("pick"), truths=(0,), count=3)(e, meta, mask, a, b)


def _masked_fill(e: Emitter, meta: Any, x: Value, mask: Value, value: Any) -> Value:
    return _where(e, meta, mask, value, x)


def _cast(e: Emitter, meta: Any, x: Value, *_: Any, **__: Any) -> Value:
    if meta.dtype == torch.float64:
        return x if x.kind == "V" else pointwise_rule(lambda a: a, count=1)(e, meta, x)
    if meta.dtype == torch.bool:
        return pointwise_rule(lambda a: a, out="M", truths=(0,), count=1)(e, meta, x)
    if x.kind == "I":
        return x
    raise Unsupported(f"numbers of {meta.dtype}")


_NOT = pointwise_rule(lambda a: f"(~{a})", out="M", truths=(0,), count=1)


def _bitwise_not(e: Emitter, meta: Any, x: Value) -> Value:
    if meta.dtype != torch.bool:
        raise Unsupported("bits of integers")
    return _NOT(e, meta, x)


def _full(e: Emitter, meta: Any, value: float) -> Value:
    return Value(tuple(meta.shape), "V", lambda index: f"all({literal(value)})")


POINTWISE: dict[str, Callable[..., Value]] = {
    "add": pointwise_rule(_plus("+"), count=2),
    "sub": pointwise_rule(_plus("-"), count=2),
    "rsub": pointwise_rule(_rsub, count=2),
    "mul": pointwise_rule(_infix("*"), count=2),
    "div": pointwise_rule(_div, count=2, cost=2),
    "true_divide": pointwise_rule(_infix("/"), count=2, cost=2),
    "neg": pointwise_rule(lambda a: f"(-{a})", count=1),
    "square": pointwise_rule(_call("vsquare"), count=1),
    "reciprocal": pointwise_rule(lambda a: f"(1.0 / {a})", count=1, cost=2),
    "rsqrt": pointwise_rule(lambda a: f"(1.0 / vsqrt({a}))", count=1, cost=4),
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": lambda e, meta, x, low: _clamp(e, meta, x, low),
    "clamp_max": lambda e, meta, x, high: _clamp(e, meta, x, None, high),
    "relu": lambda e, meta, x: _clamp(e, meta, x, 0.0),
    "maximum": pointwise_rule(_call("vmax"), count=2),
    "minimum": pointwise_rule(_call("vmin"), count=2),
    "threshold_backward": pointwise_rule(
        lambda g, x, t: f"pick({x} <= {t}, zero(), {g})", count=3
    ),
    "sign": pointwise_rule(_call("vsign"), count=1, cost=3),
    "sgn": pointwise_rule(_call("vsign"), count=1, cost=3),
    "where": _where,
    "masked_fill": _masked_fill,
    "_to_copy": _cast,
    "isnan": pointwise_rule(_call("visnan"), out="M", count=1),
    "isinf": pointwise_rule(_call("visinf"), out="M", count=1),
    "isfinite": pointwise_rule(_call("visfinite"), out="M", count=1),
    "logical_and": _logical("&"),
    "logical_or": _logical("|"),
    "logical_xor": _logical("^"),
    "logical_not": _NOT,
    "bitwise_and": _bitwise("&"),
    "bitwise_or": _bitwise("|"),
    "bitwise_not": _bitwise_not,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "sigmoid_backward": pointwise_rule(
        lambda g, y: f"({g} * ({y} * (1.0 - {y})))", count=2, cost=3
    ),
    "tanh_backward": pointwise_rule(lambda g, y: f"({g} * (1.0 - vsquare({y})))", count=2, cost=3),
    "polygamma": _polygamma,
    "fill": lambda e, meta, x, value: _full(e, meta, value),
    "full": lambda e, meta, shape, value, **k: _full(e, meta, value),
    "empty_like": lambda e, meta, x, **k: _full(e, meta, 0.0),
    "zeros_like": lambda e, meta, x, **k: _full(e, meta, 0.0),
    "ones_like": lambda e, meta, x, **k: _full(e, meta, 1.0),
    "full_like": lambda e, meta, x, value, **k: _full(e, meta, value),
    "new_zeros": lambda e, meta, x, *a, **k: _full(e, meta, 0.0),
    "new_ones": lambda e, meta, x, *a, **k: _full(e, meta, 1.0),
    "zeros": lambda e, meta, *a, **k: _full(e, meta, 0.0),
}
"""Rule of each operator by its name in ATen, overloads alike."""

for _name, _sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    POINTWISE[_name] = pointwise_rule(_infix(_sign), out="M", count=2)
for _name in ("abs", "floor", "ceil", "trunc"):
    POINTWISE[_name] = pointwise_rule(_call(f"v{_name}"), count=1)
POINTWISE["round"] = pointwise_rule(_call("vrint"), count=1)
POINTWISE["sqrt"] = pointwise_rule(_call("vsqrt"), count=1, cost=3)
for _name in (
    "exp log log1p expm1 sin cos tan tanh sinh cosh asin acos atan asinh acosh atanh "
    "erf erfc log2 log10 exp2 sigmoid lgamma digamma"
).split():
    POINTWISE[_name] = pointwise_rule(_call(f"v{_name}"), count=1, cost=_HEAVY)
_LOG_ADD = pointwise_rule(_call("vlogaddexp"), count=2, cost=2 * _HEAVY)


def _logaddexp(e: Emitter, meta: Any, a: Value, b: Value) -> Value:
    for one, other in ((a, b), (b, a)):
        if isinstance(other, Value) and other.is_zero:
            return pointwise_rule(_call("vsoftplus"), count=1, cost=2 * _HEAVY)(
                e, meta, e.settle(one)
            )
    return _LOG_ADD(e, meta, a, b)


POINTWISE["logaddexp"] = _logaddexp
for _name in ("atan2", "xlogy"):
    POINTWISE[_name] = pointwise_rule(_call(f"v{_name}"), count=2, cost=2 * _HEAVY)
