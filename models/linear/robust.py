"""The conjugate block of a linear model whose rows have scales of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.conjugate import Block
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.models.linear.block import LoadingsBlock

__all__ = ["RobustBlock"]

_START_DF = 4.0


@dataclass(frozen=True, eq=False)
class RobustBlock(Block):
    """Loadings, mean and noise given the rows' scales, and the degrees of freedom of these.

    Statistics are those of :func:`~bayesgen.models.linear.latents.from_rows` with ``df``.

    Args:
        normal: The block of a Gaussian model.
        degrees: The degrees of freedom.
    """

    normal: LoadingsBlock
    degrees: DegreesOfFreedom

    @property
    def floor(self) -> Tensor:
        """Least variance of the noise in maximum likelihood."""
        return self.normal.floor

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.normal.sites, *(() if self.degrees.is_fixed else ("df",)))

    @staticmethod
    def _scales(statistics: Tensors) -> dict[str, Tensor]:
        """The statistics as the degrees of freedom take them: one component."""
        return {
            "count": statistics["rows"],
            "log_scale": statistics["log_scale"],
            "moments": statistics["scale"].unsqueeze(-1),
        }

    def _values(self, values: Tensors, df: Tensor) -> dict[str, Tensor]:
        return dict(values) if self.degrees.is_fixed else {**values, "df": df}

    def update(self, statistics: Tensors, previous: Tensors | None = None) -> dict[str, Tensor]:
        own = self.degrees.update(self._scales(statistics))
        return {**self.normal.update(statistics, previous), **own}

    def message(self, posterior: Tensors) -> dict[str, Tensor]:
        return {**self.normal.message(posterior), **self.degrees.message(posterior)}

    def kl(self, posterior: Tensors) -> Tensor:
        return self.normal.kl(posterior) + self.degrees.kl(posterior)

    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        own = {name: value for name, value in posterior.items() if name != "log_df"}
        values = self.normal.sample(own, num_samples, generator=generator)
        df = self.degrees.sample(posterior, num_samples, generator=generator)
        return self._values(values, df)

    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> dict[str, Tensor]:
        """As for the Gaussian model; maximum likelihood lets the mean scale float as well.

        A mean scale other than one is the same as a smaller noise and latent covariance, which is
        where it goes: the steps to an optimum become far fewer.

        References:
            Kent, Tyler & Vardi (1994). A curious likelihood identity for the multivariate
            t-distribution. Meng & van Dyk (1997). The EM algorithm - an old folk-song sung to a
            fast new tune.
        """
        values = self.normal.maximise(statistics, previous, flat=flat)
        scales = self._scales(statistics)
        if flat:
            mean = statistics["scale"] / statistics["rows"]
            values["variance"] = torch.maximum(values["variance"] / mean, self.floor)
            scales["log_scale"] = scales["log_scale"] - statistics["rows"] * mean.log()
            scales["moments"] = scales["moments"] / mean.unsqueeze(-1)
        return self._values(values, self.degrees.maximise(scales, flat=flat))

    def log_prior(self, values: Tensors) -> Tensor:
        return self.normal.log_prior(values) + self.degrees.log_prior(values)

    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        values = self.normal.draw(statistics, previous, generator=generator)
        df = self.degrees.draw(self._scales(statistics), previous, generator=generator)
        return self._values(values, df)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        lead = values["loc"][..., :1]
        start = self.degrees.grid if self.degrees.is_fixed else torch.full_like(lead, _START_DF)
        df = values.get("df", start.expand(lead.shape))
        return {**self.normal.natural(values), **self.degrees.natural(df)}
