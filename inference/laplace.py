"""Laplace's approximation of any Pyro program: a mode, and the normal law of its curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Conjugate
from bayesgen.inference.checks import check_settings
from bayesgen.inference.hamiltonian.pathfinder import ascend, stride
from bayesgen.inference.programs.curvature import (
    Peak,
    bend,
    hessian,
    peak_of,
    sites_along,
)
from bayesgen.inference.programs.flat import flat_sites, starting_in_the_support
from bayesgen.inference.programs.sites import quietly
from bayesgen.inference.programs.start import starting_points
from bayesgen.inference.programs.trace import Density
from bayesgen.inference.programs.traced import TracedEngine
from bayesgen.inference.run import Info, Task
from bayesgen.psis import k_hat, weight_efficiency

__all__ = ["Laplace"]

_CLIMBING, _SETTLED, _STUCK = 0, 1, 2
_ALIKE = 1e-5  # nats between the heights and volumes of modes that are called the same
_SHOWN = 1000  # entries of the mode, and modes, kept in the attributes
_K_HAT = 0.7
_NEAR = 0.25  # share of the promised rise that is left where polishing still helps


class LaplaceState(NamedTuple):
    """Where every start stands on its way to a mode."""

    points: Tensor
    """Unconstrained, ``(num_starts, D)``."""
    lp: Tensor
    gradient: Tensor
    rise: Tensor
    """Nats that Newton's last step promised, ``(num_starts,)``; infinite before the first."""
    status: Tensor
    """Zero while it climbs, one at a mode, two where it neither climbs nor is at one."""
    num_steps: int


class Work(NamedTuple):
    """What a run rebuilds on resume."""

    density: Density


class _Ends(NamedTuple):
    """What the starts have come to."""

    peaks: list[Peak]
    """Distinct modes, that of most mass first."""
    counts: list[int]
    """Starts that ended in each."""
    lost: list[str]
    """In words, where other starts ended."""


@dataclass(frozen=True, eq=False)
class Laplace(TracedEngine[LaplaceState]):
    r"""The normal law at the mode of the unconstrained density, with the curvature it has there.

    .. math::
        q(u) = \mathrm{N}\big(\hat u, (-\nabla^2 \ell(\hat u))^{-1}\big), \qquad
        \log p(y) \approx \ell(\hat u) + \tfrac{D}{2} \log 2\pi
        - \tfrac12 \log \lvert -\nabla^2 \ell(\hat u) \rvert

    with :math:`\ell` the log density with the log Jacobian of the transforms, as in Stan's
    ``laplace_sample`` with ``jacobian=true``: draws of :math:`q` go through the sites' transforms,
    so that scales stay positive and weights on the simplex. From several starts quasi-Newton
    paths, then Newton's steps with the Hessian of the traced graph, climb to modes; of modes that
    differ the one of most mass by its estimate is taken and the others are reported. Modes of the
    same height and shape, as those of exchanged labels, count as one.

    The fit holds one chain of independent draws. ``attrs["k_hat"]`` is the Pareto shape of their
    importance weights: above 0.7 the posterior is not near normal, and NUTS is for it.

    References:
        Tierney & Kadane (1986). Accurate approximations for posterior moments and marginal
        densities. MacKay (1998). Choice of basis for Laplace approximation. Yao, Vehtari, Simpson
        & Gelman (2018). Yes, but did it work? Evaluating variational inference.

    Args:
        num_starts: Points from which the climb begins, all climbing in one batch.
        num_samples: Draws that the fit holds.
        max_steps: Newton's steps at most.
        tolerance: Rise that another step promises, in nats, below which a start is at a mode.
        trace: False runs by Pyro's own Python, to compare with.
        dtype: Precision of everything.
        device: Where to compute.

    Raises:
        ValueError: No start ends at a mode: the density rises without end (the neck of a funnel,
            a scale that goes to zero) or is flat along some direction, whose sites are named.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> fit = Laplace(num_samples=100).run(model, torch.tensor([1.0, 3.0]))
        >>> fit.draws["loc"].shape, round(fit.attrs["log_evidence"], 6)
        (torch.Size([1, 100]), -5.50943)
    """

    num_starts: int = 8
    num_samples: int = 1000
    max_steps: int = 100
    tolerance: float = 1e-9
    trace: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_settings(
            "Laplace",
            num_starts=self.num_starts,
            num_samples=self.num_samples,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
        )

    @property
    def state_type(self) -> type[LaplaceState]:
        return LaplaceState

    def prepare(self, task: Task) -> Work:
        return Work(self.density_of(task))

    def init(self, task: Task, work: Work) -> LaplaceState:
        model = task.model if isinstance(task.model, Conjugate) else None
        points, lp, gradient = starting_points(
            work.density, self.num_starts, model, task.data, generator=task.generator
        )
        unknown = torch.full_like(lp, torch.inf)
        return LaplaceState(points, lp, gradient, unknown, torch.zeros_like(lp).long(), 0)

    # ------------------------------------------------------------ steps
    def step(self, task: Task, work: Work, state: LaplaceState) -> tuple[LaplaceState, Info]:
        """The first step is a quasi-Newton path, each other one a step of Newton's."""
        with torch.no_grad():
            move = self._newton if state.num_steps else self._path
            new = move(work.density, state)
        new = new._replace(num_steps=state.num_steps + 1)
        settled = new.status == _SETTLED
        values = {
            "log_density": float(new.lp.max()),
            "num_settled": float(settled.sum()),
            "num_climbing": float((new.status == _CLIMBING).sum()),
        }
        return new, Info(values, not bool((new.status == _CLIMBING).any()))

    def _path(self, density: Density, state: LaplaceState) -> LaplaceState:
        path = ascend(density.value_and_grad, state.points)
        return state._replace(points=path.points[-1], lp=path.lp[-1], gradient=path.gradients[-1])

    def _tolerance(self, lp: Tensor) -> Tensor:
        """No rise is seen that is lost in the rounding of the density."""
        return (4 * torch.finfo(lp.dtype).eps * lp.abs()).clamp(min=self.tolerance)

    def _newton(self, density: Density, state: LaplaceState) -> LaplaceState:
        rows = (state.status == _CLIMBING).nonzero()[:, 0]
        points, lp, gradient = state.points[rows], state.lp[rows], state.gradient[rows]
        bends = [bend(hessian(density, point)) for point in points]
        ahead, rise = map(
            torch.stack,
            zip(*(b.newton(g) for b, g in zip(bends, gradient, strict=True)), strict=True),
        )
        is_peak = torch.tensor([b.is_peak for b in bends], device=lp.device)
        level = rise <= self._tolerance(lp)
        near = is_peak & level
        slope = (ahead * gradient).sum(-1)
        new, new_lp, new_gradient, moved = stride(density.value_and_grad, points, lp, ahead, slope)
        # Where the rise is lost in rounding, a whole step is good if the gradient shrinks.
        whole_lp, whole_gradient = density.value_and_grad(points + ahead)
        left = torch.stack([b.newton(g)[1] for b, g in zip(bends, whole_gradient, strict=True)])
        better = near & (left < _NEAR * rise)
        moved &= ~level
        stuck = ~near & ~moved
        kept = torch.where(moved, 1, torch.where(better, 2, 0))[:, None]
        points = torch.where(kept == 1, new, torch.where(kept == 2, points + ahead, points))
        lp = torch.where(kept[:, 0] == 1, new_lp, torch.where(kept[:, 0] == 2, whole_lp, lp))
        gradient = torch.where(
            kept == 1, new_gradient, torch.where(kept == 2, whole_gradient, gradient)
        )
        status = torch.where(near & ~better, _SETTLED, torch.where(stuck, _STUCK, _CLIMBING))
        return LaplaceState(
            state.points.index_copy(0, rows, points),
            state.lp.index_copy(0, rows, lp),
            state.gradient.index_copy(0, rows, gradient),
            state.rise.index_copy(0, rows, rise),
            state.status.index_copy(0, rows, status),
            state.num_steps,
        )

    # ------------------------------------------------------------ the end
    def finish(self, task: Task, work: Work, state: LaplaceState) -> dict[str, Any]:
        density = work.density
        with torch.no_grad():
            ends = self._ends(density, state)
            peak = ends.peaks[0]
            shape = (self.num_samples, density.num_params)
            normal = rng.standard_normal(shape, task.generator, peak.mean.dtype)
            points, log_q = peak.draw(normal)
            log_p = torch.cat([density.value_and_grad(part)[0] for part in points.split(1000)])
        weights = torch.where(log_p.isfinite(), log_p, -torch.inf) - log_q
        found = k_hat(weights)
        if found > _K_HAT or math.isnan(found):
            self._check_neck(density, peak)
        sites = self.sites_of(task, density, points[None])
        return {
            "draws": sites,
            "sample_stats": {"log_weight": weights[None]},
            "attrs": {
                "k_hat": found,
                "weight_ess": self.num_samples * weight_efficiency(weights),
                "log_density": peak.log_density,
                "log_evidence": peak.log_evidence,
                "modes": [
                    {"log_density": p.log_density, "log_evidence": p.log_evidence, "starts": n}
                    for p, n in zip(ends.peaks[:_SHOWN], ends.counts[:_SHOWN], strict=True)
                ],
                "mode": {
                    name: value.tolist()
                    for name, value in density.constrain(peak.mean).items()
                    if value.numel() <= _SHOWN
                },
                "num_params": density.num_params,
                "is_traced": density.is_traced,
                "trace_seconds": density.notes.get("trace_seconds"),
                "messages": self._messages(density, ends, found),
            },
        }

    def _ends(self, density: Density, state: LaplaceState) -> _Ends:
        """Distinct modes; of a run that was cut short, the highest point if it bends like one."""
        settled = (state.status == _SETTLED).nonzero()[:, 0].tolist()
        cut = bool((state.status == _CLIMBING).any()) and state.num_steps < self.max_steps
        best = int(state.lp.argmax())
        rows = settled or ([best] if cut else [])
        bends = {k: bend(hessian(density, state.points[k])) for k in rows}
        found = [
            peak_of(state.points[k], float(state.lp[k]), b) for k, b in bends.items() if b.is_peak
        ]
        lost = [k for k in range(len(state.lp)) if k not in rows]
        if not found:
            raise ValueError(f"Laplace: {self._where(density, state, best)}")
        peaks, counts = _distinct(found)
        return _Ends(peaks, counts, [] if cut else [self._where(density, state, k) for k in lost])

    def _where(self, density: Density, state: LaplaceState, k: int) -> str:
        """Why a start's end is no mode, and along which sites."""
        point, shape = state.points[k], bend(hessian(density, state.points[k]))
        ahead, rise = shape.newton(state.gradient[k])
        values = {n: v.flatten() for n, v in density.constrain(point).items()}
        if rise <= self._tolerance(state.lp[k]):  # level, but no peak
            names = sites_along(density, shape.vectors[:, 0])
            what = (
                f"the log density is level at {float(state.lp[k]):.6g}, yet does not fall along "
                f"{names}, so its Hessian is not negative definite there: the data say nothing of "
                "a direction on which the prior is flat, or of a rotation as of loadings, or this "
                "is a saddle"
            )
            advice = "Give that direction a proper prior, or fix the rotation"
        else:
            names = sites_along(density, ahead / shape.scale)
            what = (
                f"the log density still rises along {names} after {state.num_steps} steps, at "
                f"{float(state.lp[k]):.6g}: it has no smooth mode there, as where a scale goes to "
                "zero (the neck of a funnel) or the slope jumps (a Laplace law)"
            )
            advice = (
                "Give that scale a prior that keeps it from zero, or write hierarchical models "
                "non-centred (mu + tau * raw)"
            )
        first = names.split(",")[0].strip("'")
        at = f" ('{first}' stands at {float(values[first][0]):.3g})" if first in values else ""
        return f"{what}{at}. {advice}; NUTS needs no mode."

    def _check_neck(self, density: Density, peak: Peak) -> None:
        """Refuse a mode so narrow beside other directions that it holds no mass: a funnel's."""
        scales = peak.factor.norm(dim=1)
        widest, narrowest = int(scales.argmax()), int(scales.argmin())
        ratio = float((scales[widest] / scales[narrowest]).square())
        if ratio < 0.01 / torch.finfo(scales.dtype).eps:
            return
        unit = torch.eye(len(scales), dtype=scales.dtype, device=scales.device)
        raise ValueError(
            f"Laplace: the mode, at log density {peak.log_density:.6g}, is {ratio:.2g} times more "
            f"curved along {sites_along(density, unit[narrowest])} than along "
            f"{sites_along(density, unit[widest])}, and by importance weights has no mass: "
            "it lies deep in the neck of a funnel. Write hierarchical models non-centred "
            "(mu + tau * raw), or sample with NUTS."
        )

    def _messages(self, density: Density, ends: _Ends, found: float) -> list[str]:
        messages = self.notes_of(density, self.num_samples)
        if len(ends.peaks) > 1:
            shares = _shares(ends.peaks)
            messages.append(
                f"{len(ends.peaks)} modes differ: the draws are of the one that holds "
                f"{shares[0]:.0%} of their mass by Laplace's estimate, and the log evidence "
                "counts it alone; attrs['modes'] lists all."
            )
        if ends.lost:
            messages.append(f"{len(ends.lost)} starts ended at no mode; the first: {ends.lost[0]}")
        if names := _flat(density):
            messages.append(
                f"flat priors ({names}) have no normalising constant: the log evidence says "
                "nothing beside that of another model."
            )
        if found > _K_HAT or math.isnan(found):
            messages.append(
                f"PSIS k-hat is {found:.2f}, above {_K_HAT}: the posterior is not near normal at "
                "its mode, and neither draws nor log evidence can be trusted. Use NUTS."
            )
        return messages

    def advice(self, step: int) -> str:
        return f"not every start is at a mode after {step} steps: raise max_steps."


def _distinct(found: list[Peak]) -> tuple[list[Peak], list[int]]:
    """Modes that differ in height or volume, that of most mass first, and how often each."""
    peaks, counts = list[Peak](), list[int]()
    for peak in sorted(found, key=lambda p: -p.log_evidence):
        for k, other in enumerate(peaks):
            off = (peak.log_density - other.log_density, peak.log_volume - other.log_volume)
            if max(map(abs, off)) <= _ALIKE * max(1.0, 1e-4 * abs(peak.log_density)):
                counts[k] += 1
                break
        else:
            peaks.append(peak)
            counts.append(1)
    return peaks, counts


def _shares(peaks: list[Peak]) -> list[float]:
    return torch.softmax(torch.tensor([p.log_evidence for p in peaks]).double(), 0).tolist()


def _flat(density: Density) -> str:
    """Sites of flat priors."""
    layout = density.layout
    apart = rng.fork(rng.make_generator(0, layout.device))
    with apart, quietly(layout.dtype), starting_in_the_support(), torch.no_grad():
        return ", ".join(map(repr, flat_sites(poutine.trace(layout.run).get_trace().nodes)))
