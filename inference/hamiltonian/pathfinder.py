r"""Starts near the mass of a posterior, from quasi-Newton paths: Pathfinder.

From each starting point a limited-memory BFGS path climbs the log density. Its history gives at
every point of the path an inverse Hessian
:math:`H = \mathrm{diag}(\alpha) + \beta\gamma\beta^\top` and so a normal law
:math:`\mathrm{N}(q + H \nabla\ell, H)`. The one of highest evidence lower bound is kept, and
starts are drawn from all paths' laws together with weights :math:`p / q`, so that a path which
ended in a mode of no mass is left out.

References:
    Zhang, Carpenter, Gelman & Vehtari (2022). Pathfinder: parallel quasi-Newton variational
    inference.
    Byrd, Nocedal & Schnabel (1994). Representations of quasi-Newton matrices and their use in
    limited memory methods.
    Ionides (2008). Truncated importance sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgen import rng

__all__ = ["Law", "ascend", "laws_of", "pathfinder", "stride"]

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_HISTORY = 6
_STEPS = 200  # of a path
_HALVINGS = 20  # of a step that does not climb
_CLIMB = 1e-4  # share of the rise that the slope promises
_TOLERANCE = 1e-8  # of the log density, relative
_ELBO_DRAWS, _DRAWS = 8, 64  # of each law; of the best of each path
_ROWS, _NUMBERS = 2**14, 2**22  # points of one call; numbers held at once


class Path(NamedTuple):
    """What a quasi-Newton path has seen, ``t`` points of ``c`` paths."""

    points: Tensor
    """``(t, c, D)``."""
    gradients: Tensor
    lp: Tensor
    """``(t, c)``."""
    diagonal: Tensor
    """``(t, c, D)``: of the inverse Hessian that the history starts from."""
    moves: Tensor
    """``(t, c, J, D)``: the last moves of positions, zero where there are fewer."""
    slopes: Tensor
    """The same of the gradients of minus the log density."""


class Law(NamedTuple):
    """Normal laws ``(b,)`` of a low-rank plus diagonal covariance."""

    mean: Tensor
    """``(b, D)``."""
    scale: Tensor
    """``(b, D)``: the root of the diagonal."""
    basis: Tensor
    """``(b, D, r)``, orthonormal."""
    factor: Tensor
    """``(b, r, r)``: Cholesky factor of the covariance in the basis, after rescaling."""

    def draw(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``(k, b, D)`` of standard normal numbers, and log densities ``(k, b)``."""
        inside = torch.einsum("bdr,kbd->kbr", self.basis, normal)
        turned = torch.einsum("brs,kbs->kbr", self.factor, inside) - inside
        points = self.mean + self.scale * (
            normal + torch.einsum("bdr,kbr->kbd", self.basis, turned)
        )
        volume = self.scale.log().sum(-1) + self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        size = 0.5 * normal.square().sum(-1) + 0.5 * normal.shape[-1] * math.log(2 * math.pi)
        return points, -size - volume


def pathfinder(
    gradient_of: Gradient, points: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """``(count, D)`` starts for chains.

    Args:
        gradient_of: Log densities ``(c,)`` and gradients ``(c, D)`` of ``(c, D)``.
        points: Where paths start, ``(c, D)``.
        count: Starts wanted; no two are alike while there are draws enough.
        generator: Of the random numbers.

    Raises:
        ValueError: No path ends in a law that points can be drawn from.
    """
    path = ascend(gradient_of, points)
    t, c, d = path.points.shape
    law = laws_of(path)
    elbo = _elbo(gradient_of, law, generator).reshape(t, c)
    best = elbo.argmax(0) * c + torch.arange(c, device=elbo.device)
    usable = elbo.flatten()[best].isfinite()
    if not bool(usable.any()):
        raise ValueError(
            "start='pathfinder' found no point from which a normal law around it could be drawn; "
            "use start='uniform'."
        )
    law = Law(*(value[best[usable]] for value in law))
    found, weights = _weighted(gradient_of, law, max(_DRAWS, 4 * count), generator)
    uniform = torch.rand(
        weights.shape, generator=generator, dtype=weights.dtype, device=weights.device
    )
    order = (weights - (-uniform.log()).log()).topk(min(count, len(weights))).indices
    return found[order[torch.arange(count, device=order.device) % len(order)]]


def _weighted(
    gradient_of: Gradient, law: Law, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws ``(n, D)`` of all laws, and logarithms of truncated importance weights ``(n,)``."""
    b, d = law.mean.shape
    normal = rng.standard_normal((count, b, d), generator, law.mean.dtype)
    found, log_q = law.draw(normal)
    found, log_q = found.flatten(0, 1), log_q.flatten()
    log_p = _values(gradient_of, found)
    weights = log_p - log_q
    mean = weights.logsumexp(0) - math.log(len(weights))
    return found, weights.clamp(max=float(mean) + 0.5 * math.log(len(weights)))


def _values(gradient_of: Gradient, points: Tensor) -> Tensor:
    return _finite(torch.cat([gradient_of(part)[0] for part in points.split(_ROWS)]))


def _finite(values: Tensor) -> Tensor:
    """Minus infinity for what is no number, or too large to be one."""
    return torch.where(values.isfinite(), values, -torch.inf)


def _elbo(gradient_of: Gradient, law: Law, generator: torch.Generator) -> Tensor:
    """The evidence lower bound of every law, minus infinity where a draw has no density."""
    d, parts = law.mean.shape[1], []
    for part in zip(*(v.split(max(1, _NUMBERS // (_ELBO_DRAWS * d))) for v in law), strict=True):
        some = Law(*part)
        shape = (_ELBO_DRAWS, *some.mean.shape)
        points, log_q = some.draw(rng.standard_normal(shape, generator, some.mean.dtype))
        log_p = _values(gradient_of, points.flatten(0, 1)).reshape(log_q.shape)
        parts.append((log_p - log_q).mean(0))
    return _finite(torch.cat(parts))


# ---------------------------------------------------------------- the climb
def ascend(gradient_of: Gradient, points: Tensor, num_steps: int = _STEPS) -> Path:
    """Quasi-Newton paths ``(c, D)`` towards modes, all steps kept.

    Args:
        gradient_of: Log densities and gradients of many points.
        points: Where they start, of finite density.
        num_steps: Points of a path, at most.
    """
    lp, gradient = gradient_of(points)
    c, d = points.shape
    history = points.new_zeros(2, c, _HISTORY, d)
    diagonal = torch.ones_like(points)
    # Nothing is known of the curvature yet: the first step has length one.
    diagonal = diagonal / gradient.norm(dim=-1, keepdim=True).clamp(min=1.0)
    seen = [(points, gradient, lp, diagonal, history[0], history[1])]
    active = torch.ones_like(lp, dtype=torch.bool)
    for _ in range(num_steps - 1):
        ahead = _product(diagonal, history[0], history[1], gradient)
        rise = (ahead * gradient).sum(-1)
        uphill = (rise > 0) & ahead.isfinite().all(-1)
        ahead = torch.where(uphill[:, None], ahead, diagonal * gradient)
        rise = (ahead * gradient).sum(-1)
        new, new_lp, new_gradient, moved = stride(gradient_of, points, lp, ahead, rise)
        moved &= active
        active = moved & (new_lp - lp > _TOLERANCE * lp.abs().clamp(min=1.0))
        keep = moved[:, None]
        new, new_gradient = (
            torch.where(keep, new, points),
            torch.where(keep, new_gradient, gradient),
        )
        move, slope = new - points, gradient - new_gradient
        curved = (move * slope).sum(-1) > 1e-12 * slope.square().sum(-1)
        diagonal = torch.where(
            (curved & moved)[:, None], _updated(diagonal, move, slope), diagonal
        )
        rolled = torch.stack((move, slope)).unsqueeze(2)
        longer = torch.cat((history[:, :, 1:], rolled), 2)
        history = torch.where((curved & moved)[:, None, None], longer, history)
        points, gradient, lp = new, new_gradient, torch.where(moved, new_lp, lp)
        seen.append((points, gradient, lp, diagonal, history[0], history[1]))
        if not bool(active.any()):
            break
    return Path(*(torch.stack(part) for part in zip(*seen, strict=True)))


def stride(
    gradient_of: Gradient, points: Tensor, lp: Tensor, ahead: Tensor, rise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole step where it climbs enough, else the first of its halves that does."""
    new = points + ahead
    new_lp, gradient = gradient_of(new)
    fine = _climbs(new_lp, gradient, lp, rise)
    if bool(fine.all()):
        return new, new_lp, gradient, fine
    short = (~fine).nonzero().flatten()
    share = 0.5 ** torch.arange(1.0, _HALVINGS + 1, dtype=lp.dtype, device=lp.device)
    tried = points[short] + share[:, None, None] * ahead[short]
    tried_lp, tried_gradient = gradient_of(tried.flatten(0, 1))
    tried_lp = tried_lp.reshape(tried.shape[:2])
    tried_gradient = tried_gradient.reshape(tried.shape)
    climbs = _climbs(tried_lp, tried_gradient, lp[short], share[:, None] * rise[short])
    first, which = climbs.int().argmax(0), torch.arange(len(short), device=lp.device)
    new, new_lp, gradient = new.clone(), new_lp.clone(), gradient.clone()
    new[short], new_lp[short] = tried[first, which], tried_lp[first, which]
    gradient[short], fine[short] = tried_gradient[first, which], climbs[first, which]
    return new, new_lp, gradient, fine


def _climbs(new_lp: Tensor, gradient: Tensor, lp: Tensor, rise: Tensor) -> Tensor:
    finite = new_lp.isfinite() & gradient.isfinite().all(-1)
    return finite & (new_lp >= lp + _CLIMB * rise)


def _updated(diagonal: Tensor, move: Tensor, slope: Tensor) -> Tensor:
    """The diagonal after another pair, as in Zhang et al. (2022), algorithm 3."""
    a = (slope.square() * diagonal).sum(-1, keepdim=True)
    b = (slope * move).sum(-1, keepdim=True)
    c = (move.square() / diagonal).sum(-1, keepdim=True)
    inverse = a / (b * diagonal) + slope.square() / b - a * move.square() / (b * c * diagonal**2)
    return (1.0 / inverse).where((inverse > 0) & inverse.isfinite(), diagonal)


def _compact(diagonal: Tensor, moves: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """``beta`` ``(..., D, 2 J)`` and ``gamma`` ``(..., 2 J, 2 J)`` of the inverse Hessian."""
    products = moves @ slopes.mT
    missing = (moves == 0).all(-1)
    upper = products.triu() + torch.diag_embed(missing.to(moves.dtype))
    eye = torch.eye(moves.shape[-2], dtype=moves.dtype, device=moves.device)
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    middle = torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    middle = middle + (slopes * diagonal.unsqueeze(-2)) @ slopes.mT
    gamma = torch.cat(
        (
            torch.cat((torch.zeros_like(inverse), -inverse), -1),
            torch.cat((-inverse.mT, inverse.mT @ middle @ inverse), -1),
        ),
        -2,
    )
    return torch.cat((diagonal.unsqueeze(-1) * slopes.mT, moves.mT), -1), gamma


def _product(diagonal: Tensor, moves: Tensor, slopes: Tensor, vector: Tensor) -> Tensor:
    """The inverse Hessian times vectors ``(..., D)``."""
    beta, gamma = _compact(diagonal, moves, slopes)
    low = beta @ (gamma @ (beta.mT @ vector.unsqueeze(-1)))
    return diagonal * vector + low.squeeze(-1)


def laws_of(path: Path) -> Law:
    """The normal law at every point of the paths, ``(t * c,)``."""
    points, gradients, _, diagonal, moves, slopes = (v.flatten(0, 1) for v in path)
    beta, gamma = _compact(diagonal, moves, slopes)
    scale = diagonal.sqrt()
    basis, triangle = torch.linalg.qr(beta / scale.unsqueeze(-1))
    eye = torch.eye(triangle.shape[-2], dtype=scale.dtype, device=scale.device)
    inner = eye + triangle @ gamma @ triangle.mT
    factor, failed = torch.linalg.cholesky_ex(0.5 * (inner + inner.mT))
    factor = torch.where((failed == 0)[:, None, None], factor, torch.nan)
    mean = points + _product(diagonal, moves, slopes, gradients)
    return Law(mean, scale, basis, factor)
