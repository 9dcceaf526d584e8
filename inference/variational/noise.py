"""Every random number of a program from outside: standard normals and uniforms, as tensors.

Torch's samplers draw from a hidden generator, which a traced graph cannot do. While a
:class:`Tape` is active each of them becomes a formula in standard noise - drawn from a given
generator, or read from tensors that a graph takes as inputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bayesgen.inference.programs.complaints import current_line

__all__ = ["Branches", "Drawn", "Fed", "Hidden", "NoiseSize", "Read", "Tape"]

_aten = torch.ops.aten
# Proposals of the Gamma sampler, each accepted with probability 0.95 or more: all fail once in
# 4e10.
_PROPOSALS = 8


class Hidden(NotImplementedError):
    """A sampler that has no formula in standard noise."""


class NoiseSize(NamedTuple):
    """Standard normals and uniforms that one run of a program takes."""

    num_normals: int
    num_uniforms: int


Read = tuple[str, bool | int | float]
"""A line of a program, and the number that it read."""


class _Source(ABC):
    """Where standard noise comes from; counts what it gave."""

    def __init__(self) -> None:
        self.num_normals = self.num_uniforms = 0

    @property
    def size(self) -> NoiseSize:
        """What was given so far."""
        return NoiseSize(self.num_normals, self.num_uniforms)

    def empty(self, size: Sequence[int], options: dict[str, Any]) -> Tensor:
        """Memory that a sampler may fill."""
        return torch.empty(tuple(size), **options)

    @abstractmethod
    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal variates of ``shape``, dtype and device of ``like``."""

    @abstractmethod
    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uniform variates in ``[0, 1)``."""


@final
class Drawn(_Source):
    """Noise drawn from a generator as it is asked for."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        self.num_normals += math.prod(shape)
        return torch.randn(
            tuple(shape), generator=self.generator, dtype=like.dtype, device=self.generator.device
        )

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        self.num_uniforms += math.prod(shape)
        return torch.rand(
            tuple(shape), generator=self.generator, dtype=like.dtype, device=self.generator.device
        )


@final
class Fed(_Source):
    """Noise read from two vectors, front to back."""

    def __init__(self, normals: Tensor, uniforms: Tensor) -> None:
        super().__init__()
        self.normals, self.uniforms = normals, uniforms

    def empty(self, size: Sequence[int], options: dict[str, Any]) -> Tensor:
        # As an operation on an input, so that what is written into it is followed.
        kept = {k: v for k, v in options.items() if k in ("dtype", "device")}
        return self.normals.new_empty(tuple(size), **kept)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        start, self.num_normals = self.num_normals, self.num_normals + math.prod(shape)
        return self.normals[start : self.num_normals].reshape(tuple(shape)).to(like.dtype)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        start, self.num_uniforms = self.num_uniforms, self.num_uniforms + math.prod(shape)
        return self.uniforms[start : self.num_uniforms].reshape(tuple(shape)).to(like.dtype)


@final
class Tape(TorchDispatchMode):
    """Replace torch's samplers by formulas in noise from ``source``.

    Below autograd: the derivatives of implicit reparametrisation (Gamma, Beta, Dirichlet, Student)
    are torch's own.

    Raises:
        Hidden: A sampler without a formula (Poisson, binomial, ...).

    Example:
        >>> source = Fed(torch.tensor([0.5, -2.0]), torch.empty(0))
        >>> with Tape(source):
        ...     torch.distributions.Normal(torch.tensor([1.0, 0.0]), 2.0).rsample()
        tensor([ 2., -4.])
    """

    def __init__(self, source: _Source) -> None:
        super().__init__()
        self.source = source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.empty.memory_format:
            return self.source.empty(args[0], kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:  # noise that comes from outside already
            return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is None:
            raise Hidden(f"{func} has no formula in standard noise")
        return rule(self.source, *args, **kwargs)


@final
class Branches(TorchDispatchMode):
    """While a graph is traced, let code read a number and branch on it - and watch the branch.

    The branch that is taken becomes part of the graph. :attr:`violated` is computed by the graph
    itself, and says whether other inputs would have read other numbers.

    Args:
        seen: Where lines of the user's program that read a number, and the number, are added.
    """

    def __init__(self, seen: list[Read] | None = None) -> None:
        super().__init__()
        self._changed: list[Tensor] = []
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not _aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            value = func(*args)
        if self._seen is not None:
            self._seen.append((current_line(), value))
        self._changed.append((args[0] != value).reshape(()))
        return value

    def violated(self, like: Tensor) -> Tensor:
        """One where a number that was read has changed, else zero; a scalar as ``like``."""
        if not self._changed:
            return torch.zeros((), dtype=like.dtype, device=like.device)
        return torch.stack(self._changed).any().to(like.dtype)


# ---------------------------------------------------------------- formulas
def _filled(target: Tensor, value: Tensor) -> Tensor:
    return target.copy_(value)


def _fresh(size: Sequence[int], options: dict[str, Any]) -> Tensor:
    kept = {k: v for k, v in options.items() if k in ("dtype", "device") and v is not None}
    return torch.empty(tuple(size), **kept)


def _normal_(s: _Source, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return _filled(x, _affine(s.normal(x.shape, x), mean, std))


def _affine(z: Tensor, mean: Any, std: Any) -> Tensor:
    if isinstance(std, Tensor) or std != 1.0:
        z = z * std
    return z + mean if isinstance(mean, Tensor) or mean != 0.0 else z


def _normal(s: _Source, mean: Any, std: Any = 1.0, size: Any = None, **options: Any) -> Tensor:
    if size is not None:
        like = _fresh(size, options)
    else:
        parts = [v for v in (mean, std) if isinstance(v, Tensor)]
        like = torch.empty(
            torch.broadcast_shapes(*(p.shape for p in parts)),
            dtype=parts[0].dtype,
            device=parts[0].device,
        )
    return _affine(s.normal(like.shape, like), mean, std)


def _randn(s: _Source, size: Sequence[int], *_: Any, **options: Any) -> Tensor:
    like = _fresh(size, options)
    return s.normal(like.shape, like)


def _rand(s: _Source, size: Sequence[int], *_: Any, **options: Any) -> Tensor:
    like = _fresh(size, options)
    return s.uniform(like.shape, like)


def _randn_like(s: _Source, x: Tensor, **options: Any) -> Tensor:
    return s.normal(x.shape, x.to(options.get("dtype") or x.dtype))


def _rand_like(s: _Source, x: Tensor, **options: Any) -> Tensor:
    return s.uniform(x.shape, x.to(options.get("dtype") or x.dtype))


def _uniform_(s: _Source, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    u = s.uniform(x.shape, x)
    return _filled(x, u if (low, high) == (0.0, 1.0) else low + (high - low) * u)


def _exponential_(s: _Source, x: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    return _filled(x, -torch.log1p(-s.uniform(x.shape, x)) / rate)


def _cauchy_(s: _Source, x: Tensor, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Tensor:
    return _filled(x, median + sigma * torch.tan(math.pi * (s.uniform(x.shape, x) - 0.5)))


def _bernoulli(s: _Source, probs: Tensor, *p: Any, **_: Any) -> Tensor:
    threshold = p[0] if p else probs
    return (s.uniform(probs.shape, probs) < threshold).to(probs.dtype)


def _bernoulli_(s: _Source, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    like = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return _filled(x, (s.uniform(x.shape, like) < p).to(x.dtype))


def _dropout(s: _Source, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = s.uniform(x.shape, x) >= p
    return x * kept / (1.0 - p), kept


def _multinomial(
    s: _Source, probs: Tensor, num: int, replacement: bool = False, **_: Any
) -> Tensor:
    if num > 1 and not replacement:
        raise Hidden("multinomial without replacement has no formula in standard noise")
    u = s.uniform((*probs.shape[:-1], num), probs)
    total = probs.cumsum(-1)
    below = total.unsqueeze(-2) <= (u * total[..., -1:]).unsqueeze(-1)
    return below.sum(-1).clamp(max=probs.shape[-1] - 1)


def _gamma(s: _Source, concentration: Tensor, **_: Any) -> Tensor:
    """Marsaglia & Tsang (2000): the first of several proposals that is accepted."""
    shape = (_PROPOSALS, *concentration.shape)
    z, u = s.normal(shape, concentration), s.uniform(shape, concentration)
    boost = s.uniform(concentration.shape, concentration)
    small = concentration < 1
    d = torch.where(small, concentration + 1, concentration) - 1.0 / 3.0
    v = (1 + z / (9 * d).sqrt()) ** 3
    safe = v.clamp(min=torch.finfo(v.dtype).tiny)
    accepted = (v > 0) & (torch.log1p(-u) < 0.5 * z**2 + d - d * v + d * safe.log())
    first = (accepted.cumsum(0) == 1) & accepted
    kept = torch.where(first, safe, 0.0).sum(0)
    value = d * torch.where(kept > 0, kept, safe[-1])
    factor = (torch.log1p(-boost) / concentration).exp()
    result = torch.where(small, value * factor, value)
    return result.clamp(min=torch.finfo(result.dtype).tiny)


def _dirichlet(s: _Source, concentration: Tensor, **_: Any) -> Tensor:
    parts = _gamma(s, concentration)
    return parts / parts.sum(-1, keepdim=True)


def _randint(s: _Source, low: int, high: int, size: Sequence[int], **options: Any) -> Tensor:
    like = torch.empty(tuple(size), device=options.get("device"))
    u = s.uniform(like.shape, like)
    return (low + (u * (high - low)).floor()).to(options.get("dtype") or torch.int64)


def _randint_high(s: _Source, high: int, size: Sequence[int], **options: Any) -> Tensor:
    return _randint(s, 0, high, size, **options)


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.normal_.default: _normal_,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.normal.float_float: _normal,
    _aten.randn.default: _randn,
    _aten.rand.default: _rand,
    _aten.randn_like.default: _randn_like,
    _aten.rand_like.default: _rand_like,
    _aten.uniform_.default: _uniform_,
    _aten.exponential_.default: _exponential_,
    _aten.cauchy_.default: _cauchy_,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli.p: _bernoulli,
    _aten.bernoulli_.float: _bernoulli_,
    _aten.bernoulli_.Tensor: _bernoulli_,
    _aten.native_dropout.default: _dropout,
    _aten.multinomial.default: _multinomial,
    _aten._standard_gamma.default: _gamma,
    _aten._sample_dirichlet.default: _dirichlet,
    _aten.randint.default: _randint_high,
    _aten.randint.low: _randint,
}
