"""Some columns given the others: the posterior predictive distribution of the unobserved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesgen import rng, verbs
from bayesgen.capabilities import Conditional, Scored, require
from bayesgen.data import as_dataset

if TYPE_CHECKING:
    from bayesgen.fit import Fit

__all__ = ["Conditioned", "condition"]


@dataclass(frozen=True, eq=False, repr=False)
class Conditioned:
    """What :meth:`bayesgen.fit.Fit.condition` returns: one distribution a row, over the rest.

    Args:
        columns: Names of the columns that it is about.
        given: Names of the columns that were observed.
        parts: The conditional distribution of each row under each draw, batch ``(s, n)``.
        log_weights: ``(s, n)`` log probability of each draw given the observed entries of a row.
    """

    columns: tuple[str, ...]
    given: tuple[str, ...]
    parts: Distribution
    log_weights: Tensor

    @property
    def mean(self) -> Tensor:
        """``(n, m)``."""
        weights = self.log_weights.exp().unsqueeze(-1)
        return (weights * self.parts.mean).sum(0)

    @property
    def stddev(self) -> Tensor:
        """``(n, m)``: within draws and between them."""
        weights = self.log_weights.exp().unsqueeze(-1)
        second = (weights * (self.parts.variance + self.parts.mean.square())).sum(0)
        return (second - self.mean.square()).clamp_min(0.0).sqrt()

    def log_prob(self, values: Tensor) -> Tensor:
        """Log density ``(n,)`` of values ``(n, m)`` of the columns, in nats."""
        return torch.logsumexp(self.parts.log_prob(values) + self.log_weights, 0)

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Draws ``(num_samples, n, m)``."""
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}, but at least 1 is needed.")
        generator = rng.make_generator(seed, self.log_weights.device)
        draw = torch.stack(
            [rng.categorical(self.log_weights, generator, dim=0) for _ in range(num_samples)]
        )
        # One sample of all parts serves every row and draw once: as many as the most chosen needs.
        turn = _turns(draw)
        found = self.log_weights.new_empty(0)
        for index in range(int(turn.max()) + 1):
            values = verbs.draw_from(self.parts, generator)
            if index == 0:
                found = values.new_empty((*draw.shape, values.shape[-1]))
            place, row = (turn == index).nonzero(as_tuple=True)
            found[place, row] = values[draw[place, row], row]
        return found

    def interval(
        self, mass: float = 0.9, *, num_samples: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Central interval of each column by sampling: lower and upper ends, ``(n, m)`` each."""
        if not 0.0 < mass < 1.0:
            raise ValueError(f"mass={mass}, but it must lie between 0 and 1.")
        ends = torch.tensor([(1.0 - mass) / 2.0, (1.0 + mass) / 2.0])
        drawn = self.sample(num_samples, seed=seed)
        low, high = torch.quantile(drawn, ends.to(drawn), dim=0)
        return low, high

    def __repr__(self) -> str:
        rows = self.log_weights.shape[1]
        given = ", ".join(self.given) if self.given else "nothing"
        return f"Conditioned({', '.join(self.columns)} given {given}: {rows} rows)"


def _turns(draw: Tensor) -> Tensor:
    """How many entries above each one ``(k, n)`` in its column are equal to it."""
    order = draw.argsort(dim=0, stable=True)
    ordered = draw.gather(0, order)
    places = torch.arange(len(draw), device=draw.device).unsqueeze(-1).expand(draw.shape)
    is_first = torch.ones_like(draw, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    since = places - torch.where(is_first, places, 0).cummax(0).values
    return torch.empty_like(draw).scatter_(0, order, since)


@torch.no_grad()
def condition(
    fit: Fit, x: object, observed: Sequence[str | int] | None = None, *, num_draws: int = 200
) -> Conditioned:
    """See :meth:`bayesgen.fit.Fit.condition`."""
    model = require(fit.model, Conditional, "condition")
    scored = require(fit.model, Scored, "condition")
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws}, but at least 1 is needed.")
    rows = torch.cat(list(as_dataset(x, schema=fit.schema).batches(65_536)))
    rows = rows.to(fit.device, next(iter(fit.draws.values())).dtype)
    mask = _mask(fit, rows, observed).to(fit.device)
    shown = torch.where(mask, rows, torch.nan)
    flat = verbs.thin(verbs.flatten_draws(fit.draws), num_draws)
    if bool(mask.any()):
        evidence = scored.log_prob(shown, flat)
        log_weights = evidence - evidence.logsumexp(0)
    else:
        count = next(iter(flat.values())).shape[0]
        log_weights = rows.new_full((count, len(rows)), -math.log(count))
    names = fit.columns
    return Conditioned(
        tuple(name for name, seen in zip(names, mask.tolist(), strict=True) if not seen),
        tuple(name for name, seen in zip(names, mask.tolist(), strict=True) if seen),
        model.condition(rows, mask, flat),
        log_weights,
    )


def _mask(fit: Fit, rows: Tensor, observed: Sequence[str | int] | None) -> Tensor:
    """Which columns are given, ``(d,)``."""
    names, known = fit.columns, ~rows.isnan()
    if observed is None:
        if not bool((known == known[:1]).all()):
            raise ValueError(
                "the rows have gaps in different columns: name the columns that are given, "
                "observed=[...], or fill each row's own gaps by impute."
            )
        mask = known[0]
    else:
        if isinstance(observed, str):
            raise TypeError(f"observed={observed!r}; pass a list of columns: [{observed!r}].")
        mask = torch.zeros(len(names), dtype=torch.bool)
        for column in observed:
            position = names.index(column) if column in names else column
            if not isinstance(position, int) or not 0 <= position < len(names):
                raise ValueError(
                    f"there is no column {column!r}; the data have {', '.join(names)}."
                )
            mask[position] = True
    if bool(mask.all()):
        raise ValueError("every column is given: leave out of observed what you ask about.")
    if observed is not None:
        gaps = (~known[:, mask.to(known.device)]).nonzero()
        if len(gaps):
            row, column = gaps[0].tolist()
            name = [n for n, seen in zip(names, mask.tolist(), strict=True) if seen][column]
            raise ValueError(
                f"column '{name}' is given but missing in row {row}: leave it out of observed, or "
                "drop the row."
            )
    return mask
