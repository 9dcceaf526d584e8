"""Randomness: explicit generators, and the samplers that torch lacks a generator argument for.

This is the only module that touches the global generators of torch, numpy and Python, and only
inside :func:`fork`, which puts them back. Seeds are integers below ``2**32``: torch's CPU
generator reads no more bits than that, so that ``manual_seed(1)`` and ``manual_seed(1 + 2**32)``
are the same stream.
"""

from __future__ import annotations

import math
import operator
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "beta",
    "categorical",
    "chi2",
    "draw_and_normaliser",
    "fork",
    "gamma",
    "get_state",
    "log_beta_sample",
    "log_dirichlet",
    "log_gamma_sample",
    "make_generator",
    "set_state",
    "spawn",
    "standard_normal",
]

_SEED_LIMIT = 2**32


# ------------------------------------------------------------------ seeds and generators
def check_seed(seed: SupportsIndex) -> int:
    """Return ``seed`` as an int in ``[0, 2**32)``, or raise an error that says what is allowed."""
    if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, SupportsIndex):
        raise TypeError(
            f"seed must be an int, a torch.Generator or None, but got {type(seed).__name__} "
            f"{seed!r}; pass for example seed=0."
        )
    value = operator.index(seed)
    if not 0 <= value < _SEED_LIMIT:
        raise ValueError(
            f"seed must be in [0, 2**32), but got {value}: torch's CPU generator ignores higher "
            f"bits. "
            f"Use for example seed={value % _SEED_LIMIT}."
        )
    return value


def make_generator(
    seed: SupportsIndex | torch.Generator | None, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a generator on ``device``.

    Args:
        seed: An int in ``[0, 2**32)``; a generator, which is returned as it is; or None, which
        draws
            a seed from the operating system. ``generator.initial_seed()`` says which, and gives
            the same stream again.
        device: Where the generator draws.

    Raises:
        TypeError: If ``seed`` is of another type.
        ValueError: If it is out of range, or a generator of another kind of device.

    Example:
        >>> generator = make_generator(None)
        >>> again = make_generator(generator.initial_seed())
        >>> bool((standard_normal(3, generator) == standard_normal(3, again)).all())
        True
    """
    device = torch.device(device)
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(
                f"the generator lives on {seed.device} but the computation on {device}; "
                f"pass a seed, or torch.Generator(device={str(device)!r})."
            )
        return seed
    value = secrets.randbelow(_SEED_LIMIT) if seed is None else check_seed(seed)
    return torch.Generator(device=device).manual_seed(value)


def spawn(seed: SupportsIndex, num: int) -> list[int]:
    """Return ``num`` distinct seeds of statistically independent streams, children of ``seed``.

    The first ``m`` children do not depend on ``num``. They come from numpy's ``SeedSequence``; the
    few that collide in 32 bits are drawn again.

    Example:
        >>> spawn(0, 2) == spawn(0, 5)[:2]
        True
    """
    parent = np.random.SeedSequence(check_seed(seed))
    children: dict[int, None] = {}
    while len(children) < num:
        for child in parent.spawn(num - len(children)):
            children[int(child.generate_state(1, np.uint32)[0])] = None
    return list(children)


def get_state(generator: torch.Generator) -> Tensor:
    """Return the state of ``generator`` as a CPU ``uint8`` tensor, for a checkpoint."""
    return generator.get_state().clone()


def set_state(generator: torch.Generator, state: Tensor) -> None:
    """Put ``generator`` back into a state that :func:`get_state` returned."""
    generator.set_state(state.to("cpu", torch.uint8).contiguous())


@contextmanager
def fork(generator: torch.Generator) -> Iterator[None]:
    """Seed the global generators from ``generator`` inside the block, then restore them exactly.

    For code that takes no generator, such as ``.sample()`` of torch's and Pyro's distributions.
    Covers torch on CPU and on every CUDA device in use, numpy's legacy generator and Python's
    ``random``. Each use advances ``generator`` by one draw. The global generators are shared by
    all threads, so that the block is reproducible only while no other thread draws from them.

    Example:
        >>> generator, before = make_generator(0), torch.get_rng_state()
        >>> with fork(generator):
        ...     x = torch.distributions.Normal(0.0, 1.0).sample()
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    seed = int(torch.randint(_SEED_LIMIT, (), generator=generator, device=generator.device).item())
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if uses_cuda else []
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one is what must be saved
    python_state = random.getstate()
    try:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if uses_cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


# ------------------------------------------------------------------ samplers
def standard_normal(
    shape: int | Sequence[int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
) -> Tensor:
    """Independent standard normal variates of the given ``shape``, on the generator's device."""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    where = generator.device if device is None else torch.device(device)
    return torch.randn(size, generator=generator, dtype=dtype, device=where)


def gamma(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma variates of unit rate, one for each ``concentration > 0``.

    Differentiable in the concentration (implicit reparametrisation). Small concentrations
    underflow to zero: :func:`log_gamma_sample` does not.
    """
    return torch._standard_gamma(concentration, generator=generator)


def log_gamma_sample(concentration: Tensor, generator: torch.Generator) -> Tensor:
    r"""Logarithm of Gamma variates of unit rate, accurate for concentrations however small.

    .. math:: \log G_a = \log G_{a+1} + \frac{\log U}{a}, \qquad U \sim \mathrm{Uniform}(0, 1),

    applied where :math:`a < 1`; nothing underflows before the logarithm is taken.

    References:
        Marsaglia, Tsang 2000, A simple method for generating gamma variables.
        Liu, Martin, Syring 2017, Efficient simulation from a gamma distribution with small shape
        parameter.

    Args:
        concentration: Positive, any shape.
        generator: On the device of ``concentration``.
    """
    small = concentration < 1
    log_gamma = gamma(torch.where(small, concentration + 1, concentration), generator).log()
    exponential = torch.empty_like(log_gamma).exponential_(generator=generator)
    return log_gamma - torch.where(small, exponential / concentration, 0.0)


def log_dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Logarithm of Dirichlet variates ``(..., K)``: exact also where the weights underflow."""
    return torch.log_softmax(log_gamma_sample(concentration, generator), -1)


def log_beta_sample(
    concentration1: Tensor, concentration0: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``(log v, log(1 - v))`` of Beta variates ``v``: the sticks of a stick-breaking process."""
    a, b = torch.broadcast_tensors(concentration1, concentration0)
    pair = log_dirichlet(torch.stack((a, b), -1), generator)
    return pair[..., 0], pair[..., 1]


def beta(concentration1: Tensor, concentration0: Tensor, generator: torch.Generator) -> Tensor:
    """Beta variates with density proportional to ``v^(a - 1) (1 - v)^(b - 1)``, broadcast."""
    return log_beta_sample(concentration1, concentration0, generator)[0].exp()


def chi2(df: Tensor, generator: torch.Generator) -> Tensor:
    """Chi-squared variates with ``df > 0`` degrees of freedom."""
    return 2 * gamma(df / 2, generator)


def categorical(logits: Tensor, generator: torch.Generator, dim: int = -2) -> Tensor:
    """Draw one index along ``dim`` for every other position, by inversion.

    Costs one uniform a draw (the Gumbel trick costs ``K``). ``logits`` need not be normalised.
    Categories of ``-inf`` are never drawn; a slice that is not finite anywhere gives index 0, so
    check the normaliser where this can happen.

    Args:
        logits: ``(..., K, n)`` for the default ``dim``.
        generator: On the device of ``logits``.
        dim: The dimension of the categories.

    Returns:
        ``int64`` indices, the shape of ``logits`` without ``dim``: ``(..., n)``.

    Example:
        >>> logits = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
        >>> categorical(logits, make_generator(0)).tolist()
        [0, 1]
    """
    return draw_and_normaliser(logits, generator, dim)[0]


def draw_and_normaliser(
    logits: Tensor, generator: torch.Generator, dim: int = -2
) -> tuple[Tensor, Tensor]:
    """Indices as :func:`categorical`, and the log normalisers ``(..., n)``: one pass for both."""
    top = logits.amax(dim, keepdim=True)
    # To the base two: on a processor several times faster than exp.
    cumulative = (logits - top).mul_(math.log2(math.e)).exp2_().cumsum_(dim)
    total = cumulative.narrow(dim, -1, 1)
    uniform = torch.rand(
        total.shape, generator=generator, dtype=logits.dtype, device=logits.device
    )
    index = (cumulative <= uniform * total).sum(dim)
    normaliser = (top + total.log()).squeeze(dim)
    return index.clamp_(max=logits.shape[dim] - 1), normaliser
