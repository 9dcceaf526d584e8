r"""How a traced density bends at a point: its Hessian, Newton's step, and the normal law there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesgen.inference.programs.trace import Density

__all__ = ["Bend", "Peak", "bend", "hessian", "peak_of", "sites_along"]

_NUMBERS = 2**24  # held at once while a Hessian is taken
_SHARE = 0.1  # of a direction, from which a site is named
_NAMED = 3
_FLOOR = 1e-10  # of the curvature that Newton's step divides by, on the scale of the diagonal


class Bend(NamedTuple):
    """The curvature at a point, on the scale on which its diagonal is one."""

    scale: Tensor
    """``(D,)``: the root of one over the diagonal of minus the Hessian."""
    values: Tensor
    """Eigenvalues of minus the rescaled Hessian ``(D,)``, ascending."""
    vectors: Tensor
    """Its eigenvectors ``(D, D)``, in columns."""

    def newton(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's step uphill, saddles left behind, and the rise that it promises, in nats."""
        along = self.vectors.mT @ (self.scale * gradient)
        step = along / self.values.abs().clamp(min=_FLOOR)
        return self.scale * (self.vectors @ step), 0.5 * (along * step).sum()

    @property
    def is_peak(self) -> bool:
        """Whether the density falls in every direction, beyond rounding."""
        rounding = len(self.values) * torch.finfo(self.values.dtype).eps
        return bool(self.values[0] > rounding * self.values[-1])


class Peak(NamedTuple):
    """A mode, and the normal law of the same height and curvature there."""

    mean: Tensor
    """``(D,)``."""
    factor: Tensor
    """``(D, D)``, a root of the covariance: ``factor @ factor.T``."""
    log_density: float
    log_volume: float
    """Half the log determinant of the covariance."""

    @property
    def log_evidence(self) -> float:
        """Laplace's estimate: the integral of the normal law of the mode's height."""
        return self.log_density + self.log_volume + 0.5 * len(self.mean) * math.log(2 * math.pi)

    def draw(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``(n, D)`` of standard normal numbers, and their log densities ``(n,)``."""
        constant = self.log_volume + 0.5 * len(self.mean) * math.log(2 * math.pi)
        return self.mean + normal @ self.factor.mT, -0.5 * normal.square().sum(-1) - constant


def hessian(density: Density, point: Tensor) -> Tensor:
    """The Hessian ``(D, D)`` of the log density at ``(D,)``.

    From the traced graph; by central differences of its gradient where the graph has no second
    derivative, or one that its own gradient contradicts, and of a program that was not traced.
    """
    single = density.single
    if single is not None:
        rows = max(1, _NUMBERS // (len(point) * max(1, len(single.graph.nodes))))
        try:
            found = torch.func.jacrev(lambda vector: single(vector)[1], chunk_size=rows)(point)
        except (RuntimeError, NotImplementedError):  # no derivative of an operation's derivative
            return _by_differences(density, point)
        found = 0.5 * (found + found.mT).detach()
        if _agrees(density, point, found):
            return found
    return _by_differences(density, point)


def _step(point: Tensor) -> Tensor:
    return torch.finfo(point.dtype).eps ** (1 / 3) * point.abs().clamp(min=1.0)


def _by_differences(density: Density, point: Tensor) -> Tensor:
    step = _step(point)
    _, ahead = density.value_and_grad(point + step.diag())
    _, behind = density.value_and_grad(point - step.diag())
    found = (ahead - behind) / (2 * step[:, None])
    return 0.5 * (found + found.mT)


def _agrees(density: Density, point: Tensor, found: Tensor) -> bool:
    """Whether the Hessian is the slope of the gradient along one direction."""
    way = _step(point) * torch.where(torch.arange(len(point), device=point.device) % 2 == 0, 1, -1)
    _, gradients = density.value_and_grad(torch.stack((point + way, point - way)))
    change, wanted = 0.5 * (gradients[0] - gradients[1]), found @ way
    size = found.abs() @ way.abs()
    off = (change - wanted).abs() > 1e-2 * size + 1e-9 * gradients.abs().amax(0)
    return not bool((off & change.isfinite()).any())


def bend(curvature: Tensor) -> Bend:
    """Of the Hessian ``(D, D)``; where it is not finite, nothing is known but a scale of one."""
    if not bool(curvature.isfinite().all()):
        eye = torch.eye(len(curvature), dtype=curvature.dtype, device=curvature.device)
        return Bend(eye.diagonal(), torch.full_like(eye[0], -1.0), eye)
    diagonal = curvature.diagonal().abs()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 1.0)
    return Bend(scale, *torch.linalg.eigh(-scale * curvature * scale[:, None]))


def peak_of(point: Tensor, log_density: float, shape: Bend) -> Peak:
    """The normal law at a mode, where ``shape.is_peak``."""
    factor = shape.scale[:, None] * shape.vectors * shape.values.rsqrt()
    volume = shape.scale.log().sum() - 0.5 * shape.values.log().sum()
    return Peak(point, factor, log_density, float(volume))


def sites_along(density: Density, direction: Tensor) -> str:
    """Names of the sites that a direction ``(D,)`` moves most, in quotes."""
    total = float(direction.square().sum())
    shares = {
        site.name: float(direction[site.start : site.start + site.size].square().sum()) / total
        for site in density.layout.sites
    }
    ordered = sorted(shares, key=lambda name: -shares[name])[:_NAMED]
    return ", ".join(f"'{n}'" for k, n in enumerate(ordered) if not k or shares[n] > _SHARE)
