"""Where chains start: points of finite density, or a message that names the site to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesgen.inference.compiled.native import NativeDensity
from bayesgen.inference.hamiltonian.pathfinder import pathfinder
from bayesgen.inference.programs.complaints import ProgramError
from bayesgen.inference.programs.trace import Density

__all__ = ["STARTS", "check_start", "conjugate_values", "starting_points"]

STARTS = ("uniform", "pathfinder")

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_RADIUS, _TRIES = 2.0, 100
_PATHS = 8  # at least, of which the best are kept
_ROWS = 20_000
_WALK = 100


def check_start(engine: str, start: str) -> None:
    """Refuse a start that there is not."""
    if start not in STARTS:
        raise ValueError(
            f"{engine}: start={start!r}, but it must be 'uniform', within 2 of the origin on the "
            "unconstrained scale, or 'pathfinder', near the mass that quasi-Newton paths find."
        )


def starting_points(
    density: Density,
    num_chains: int,
    model: Any,
    data: Any,
    *,
    start: str = "uniform",
    gradient_of: Gradient | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(c, D)`` points, their log densities ``(c,)`` and gradients ``(c, D)``, all finite.

    Uniform in (-2, 2) on the unconstrained scale, as Stan does, drawn again where the density is
    not finite, and led uphill where it is absurdly low; for a conjugate model, parameters drawn
    given a random starting assignment of its rows. With ``start="pathfinder"`` paths go on from at
    least eight such points, and chains start at draws of the normal laws found there.

    ``gradient_of`` is a faster way to the same densities, if there is one.

    Raises:
        ValueError: No finite point in 100 tries.
    """
    layout, gradient_of = density.layout, gradient_of or density.value_and_grad
    if start == "pathfinder":
        # What is made for the chains' number alone is no use for paths.
        of_any = gradient_of if isinstance(gradient_of, NativeDensity) else density.value_and_grad
        count = max(num_chains, _PATHS)
        first, _, _ = starting_points(
            density, count, model, data, gradient_of=of_any, generator=generator
        )
        near = pathfinder(of_any, first, num_chains, generator)
        return near, *gradient_of(near)
    points = _from_model(density, num_chains, model, data, generator) if model else None
    if points is None:
        points = _uniform(density, num_chains, generator)
    lp, gradient = gradient_of(points)
    for k in range(_TRIES):
        bad = ~(lp.isfinite() & gradient.isfinite().all(-1))
        if not bool(bad.any()):
            return _nearer(gradient_of, points, lp, gradient)
        # Ever nearer to the origin: far out, many densities overflow.
        fresh = _uniform(density, num_chains, generator) * (1.0 if k < _TRIES // 2 else 0.1)
        points = torch.where(bad[:, None], fresh, points)
        lp, gradient = gradient_of(points)
    worst = points[~(lp.isfinite() & gradient.isfinite().all(-1))][0]
    raise ProgramError(_blame(density, worst, layout.dtype))


def _nearer(
    gradient_of: Gradient, points: Tensor, lp: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lead chains uphill whose log density is absurd beside the others', until it no longer is.

    A chain in a desert (an explosive time series, predictors far from scale one) would need a step
    size that no other chain can use. Steps follow the sign of each slope alone, growing while it
    lasts and halved where it turns (Rprop), since slopes there may be of any size.
    """
    allowance = 10.0 * (points.shape[1] + 10)
    if float(lp.max() - lp.min()) <= allowance:
        return points, lp, gradient
    path = [(points, lp, gradient)]
    size, before = torch.full_like(points, 0.1), torch.zeros_like(points)
    for _ in range(_WALK):
        sign = gradient.sign()
        turn = sign * before
        size = size * torch.where(turn > 0, 1.2, torch.where(turn < 0, 0.5, 1.0))
        before = torch.where(turn < 0, 0.0, sign)
        new = points + before * size
        new_lp, new_gradient = gradient_of(new)
        good = new_lp.isfinite() & new_gradient.isfinite().all(-1)
        size = torch.where(good[:, None], size, 0.5 * size)
        points = torch.where(good[:, None], new, points)
        lp = torch.where(good, new_lp, lp)
        gradient = torch.where(good[:, None], new_gradient, gradient)
        path.append((points, lp, gradient))
    heights = torch.stack([height for _, height, _ in path])
    enough = heights >= heights.amax(0) - allowance
    first = enough.int().argmax(0)
    chains = torch.arange(len(first), device=first.device)
    points, lp, gradient = (torch.stack(part)[first, chains] for part in zip(*path, strict=True))
    return points, lp, gradient


def _uniform(density: Density, num_chains: int, generator: torch.Generator) -> Tensor:
    raw = torch.rand(
        (num_chains, density.num_params),
        generator=generator,
        dtype=density.layout.dtype,
        device=density.layout.device,
    )
    return _RADIUS * (2 * raw - 1)


def conjugate_values(
    model: Any, data: Any, count: int, generator: torch.Generator
) -> dict[str, Tensor] | None:
    """Sites ``(count, *event)`` drawn given ``count`` random guesses of the latents of rows."""
    try:
        blocks = model.blocks
    except TypeError:  # under a prior of another kind there is no conjugate draw to start from
        return None
    rows = data.tensor(torch.float64, generator.device)
    if len(rows) > _ROWS:
        rows = rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:_ROWS]]
    statistics = model.start(rows, num_batch=count, generator=generator)
    drawn = {
        name: dict(block.draw(statistics[name], None, generator=generator))
        for name, block in blocks.items()
    }
    values: dict[str, Tensor] = model.export(drawn)
    return values


def _from_model(
    density: Density, num_chains: int, model: Any, data: Any, generator: torch.Generator
) -> Tensor | None:
    values = conjugate_values(model, data, num_chains, generator)
    if values is None or any(site.name not in values for site in density.layout.sites):
        return None
    chains = [{k: v[c] for k, v in values.items()} for c in range(num_chains)]
    points = torch.stack([density.unconstrain(chain) for chain in chains])
    return points.to(density.layout.device)


def _blame(density: Density, point: Tensor, dtype: torch.dtype) -> str:
    terms = density.terms(point)
    wrong = [f"'{name}' ({value})" for name, value in terms.items() if not _finite(value)]
    if wrong:
        return (
            f"no starting point of finite density was found in {_TRIES} tries; not finite: "
            f"{', '.join(wrong)}. Is the data's scale far from the prior's, or a value outside "
            f"the support? "
            "Rescale the data, or widen the prior."
        )
    return (
        f"no starting point with a finite gradient was found in {_TRIES} tries although the "
        f"density is "
        "finite: an operation such as sqrt(0), 0 / 0 or a norm at zero has no derivative there."
    )


def _finite(value: float) -> bool:
    return bool(torch.tensor(value).isfinite())
