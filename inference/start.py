"""Where chains start: points of finite density, or a message that names the site to blame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesgen.inference.complaints import ProgramError
from bayesgen.inference.trace import Density

__all__ = ["starting_points"]

_RADIUS, _TRIES = 2.0, 100
_ROWS = 20_000


def starting_points(
    density: Density,
    num_chains: int,
    model: Any,
    data: Any,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(c, D)`` points, their log densities ``(c,)`` and gradients ``(c, D)``, all finite.

    Uniform in (-2, 2) on the unconstrained scale, as Stan does, drawn again where the density is
    not
    finite; for a conjugate model, parameters drawn given a random starting assignment of its rows.

    Raises:
        ValueError: No finite point in 100 tries.
    """
    layout = density.layout
    points = _from_model(density, num_chains, model, data, generator) if model else None
    if points is None:
        points = _uniform(density, num_chains, generator)
    lp, gradient = density.value_and_grad(points)
    for k in range(_TRIES):
        bad = ~(lp.isfinite() & gradient.isfinite().all(-1))
        if not bool(bad.any()):
            return points, lp, gradient
        # Ever nearer to the origin: far out, many densities overflow.
        fresh = _uniform(density, num_chains, generator) * (1.0 if k < _TRIES // 2 else 0.1)
        points = torch.where(bad[:, None], fresh, points)
        lp, gradient = density.value_and_grad(points)
    worst = points[~(lp.isfinite() & gradient.isfinite().all(-1))][0]
    raise ProgramError(_blame(density, worst, layout.dtype))


def _uniform(density: Density, num_chains: int, generator: torch.Generator) -> Tensor:
    raw = torch.rand(
        (num_chains, density.num_params),
        generator=generator,
        dtype=density.layout.dtype,
        device=density.layout.device,
    )
    return _RADIUS * (2 * raw - 1)


def _from_model(
    density: Density, num_chains: int, model: Any, data: Any, generator: torch.Generator
) -> Tensor | None:
    rows = data.tensor(torch.float64, density.layout.device)
    if len(rows) > _ROWS:
        rows = rows[torch.randperm(len(rows), generator=generator, device=rows.device)[:_ROWS]]
    statistics = model.start(rows, num_batch=num_chains, generator=generator)
    drawn = {
        name: dict(block.draw(statistics[name], None, generator=generator))
        for name, block in model.blocks.items()
    }
    values = model.export(drawn)
    if any(site.name not in values for site in density.layout.sites):
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
