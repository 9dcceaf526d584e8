"""Special functions that PyTorch lacks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["student_t_cdf"]

_MAX_STEPS = 400
_MANY_DEGREES = 30.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def _continued_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Continued fraction of the incomplete beta function by Lentz's method (DLMF 8.17.22)."""
    eps = torch.finfo(x.dtype).eps
    d = 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    c = torch.ones_like(d)
    h = d
    for m in range(1, _MAX_STEPS):
        even = m * (b - m) * x / ((a + (2 * m - 1)) * (a + 2 * m))
        d = 1.0 / (1.0 + even * d)
        c = 1.0 + even / c
        h = h * d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + (2 * m + 1)))
        d = 1.0 / (1.0 + odd * d)
        c = 1.0 + odd / c
        h = h * d * c
        if m % 8 == 0 and not bool(((d * c - 1.0).abs() > 4.0 * eps).any()):
            break
    return h


def _tail_by_fraction(distance: Tensor, df: Tensor) -> Tensor:
    """``P(T > distance)`` at few degrees of freedom, by the incomplete beta function."""
    a = 0.5 * df
    b = torch.full_like(a, 0.5)
    square = distance.square()
    # Both x and 1 - x by division: a difference would lose the smaller one.
    x, y = df / (df + square), square / (df + square)
    direct = x < (a + 1.0) / (a + b + 2.0)
    fraction = _continued_fraction(
        torch.where(direct, a, b), torch.where(direct, b, a), torch.where(direct, x, y)
    )
    log_front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    front = torch.exp(log_front - a * torch.log1p(square / df)) * distance
    part = front / (df + square).sqrt() * fraction * torch.where(direct, 1.0 / a, 2.0)
    return 0.5 * torch.where(direct, part, 1.0 - part)


def _normal_like_integral(start: Tensor, degrees: Tensor) -> Tensor:
    r""":math:`\int_s^\infty e^{(s^2-u^2)/2} g(u^2/\kappa)du`, :math:`g^2(y) = y/2/\sinh(y/2)`."""
    nodes = torch.as_tensor(0.5 * (_NODES + 1.0), dtype=start.dtype, device=start.device)
    weights = torch.as_tensor(0.5 * _WEIGHTS, dtype=start.dtype, device=start.device)
    # Beyond this length the integrand has fallen by exp(-40).
    length = 80.0 / (start + (start.square() + 80.0).sqrt())
    step = length.unsqueeze(-1) * nodes
    u = start.unsqueeze(-1) + step
    y = (u.square() / degrees.unsqueeze(-1)).clamp(min=torch.finfo(start.dtype).tiny)
    smooth = torch.exp(-0.25 * y) * (y / -torch.expm1(-y)).sqrt()
    fall = torch.exp(-step * (start.unsqueeze(-1) + 0.5 * step))
    return length * (weights * fall * smooth).sum(-1)


def _tail_by_quadrature(distance: Tensor, df: Tensor) -> Tensor:
    """``P(T > distance)`` at many degrees of freedom, where it is nearly a normal's.

    With ``u ** 2 = (df - 1/2) log1p(t ** 2 / df)`` the density is ``exp(-u ** 2 / 2)`` times a
    factor close to 1, so quadrature needs no gamma functions, whose difference would lose digits.
    """
    degrees = df - 0.5
    ratio = (distance.square() / df).clamp(min=torch.finfo(df.dtype).tiny)
    start = distance * (degrees / df * torch.log1p(ratio) / ratio).sqrt()
    whole = _normal_like_integral(torch.zeros_like(start), degrees)
    part = _normal_like_integral(start, degrees)
    return 0.5 * torch.exp(-0.5 * start.square()) * part / whole


def student_t_cdf(z: Tensor, df: Tensor) -> Tensor:
    r"""Distribution function of the standard Student-t, accurate in both tails and differentiable.

    .. math::
        F(z) = \tfrac12 I_{\nu/(\nu+z^2)}(\tfrac\nu2, \tfrac12) \quad (z \le 0),

    with :math:`I` the regularised incomplete beta function, taken from whichever of its two
    continued fractions converges fast; above 30 degrees of freedom by quadrature of an integrand
    that is nearly normal.

    References:
        Olver et al. NIST Digital Library of Mathematical Functions, section 8.17.
        Wallace (1959). Bounds on normal approximations to Student's and the chi-square.

    Args:
        z: Standardised value, ``(...)``.
        df: Degrees of freedom, broadcastable with ``z``.

    Example:
        >>> student_t_cdf(torch.tensor([0.0, 1.0]), torch.tensor(1.0))
        tensor([0.5000, 0.7500])
    """
    z, df = torch.broadcast_tensors(z, df)
    infinite = torch.isinf(z)
    # Not abs(): its gradient at 0 is 0, ours is the density.
    distance = torch.where(infinite, 1.0, torch.where(z <= 0, -z, z))
    few = df <= _MANY_DEGREES
    tail = torch.where(
        few,
        _tail_by_fraction(distance, torch.where(few, df, 1.0)),
        _tail_by_quadrature(distance, torch.where(few, 2.0 * _MANY_DEGREES, df)),
    )
    tail = torch.where(infinite, 0.0, tail)
    return torch.where(z <= 0, tail, 1.0 - tail)
