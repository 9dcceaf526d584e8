"""The conjugate block of a linear model whose rows, or cells, have scales of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.conjugate import Block
from bayesgen.models.families.degrees_of_freedom import DegreesOfFreedom
from bayesgen.models.linear.tails import tail_likelihood

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.models.linear.block import LoadingsBlock

__all__ = ["RobustBlock"]

_START_DF = 4.0


@dataclass(frozen=True, eq=False)
class RobustBlock(Block):
    """Loadings, mean and noise given the scales, and the degrees of freedom of these.

    Statistics are those of :func:`~bayesgen.models.linear.latents.from_rows` with ``df``, or of
    :mod:`~bayesgen.models.linear.cells`. Degrees of freedom are ``(..., 1)`` for rows,
    ``(..., d)`` for cells, one a column.

    Args:
        normal: The block of a Gaussian model.
        degrees: The degrees of freedom.
        is_cellwise: Whether each cell has a scale of its own.
    """

    normal: LoadingsBlock
    degrees: DegreesOfFreedom
    is_cellwise: bool = False

    @property
    def floor(self) -> Tensor:
        """Least variance of the noise in maximum likelihood."""
        return self.normal.floor

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.normal.sites, *(() if self.degrees.is_fixed else ("df",)))

    def _scales(self, statistics: Tensors) -> dict[str, Tensor]:
        """The statistics as the degrees of freedom take them: one component, or the columns."""
        return {
            "count": statistics["count" if self.is_cellwise else "rows"],
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
        """As for the Gaussian model; maximum likelihood lets rows' mean scale float as well.

        A mean scale other than one is the same as a smaller noise and latent covariance, which is
        where it goes: the steps to an optimum become far fewer.

        References:
            Kent, Tyler & Vardi (1994). A curious likelihood identity for the multivariate
            t-distribution. Meng & van Dyk (1997). The EM algorithm - an old folk-song sung to a
            fast new tune.
        """
        values = self.normal.maximise(statistics, previous, flat=flat)
        scales = self._scales(statistics)
        if flat and not self.is_cellwise:
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
        """All sites; of cells the degrees of freedom when latents were drawn, the others later."""
        if "tails" in statistics:
            assert previous is not None
            return {**previous, "df": self._by_tails(statistics, previous, generator)}
        values = self.normal.draw(statistics, previous, generator=generator)
        scales = self._scales(statistics)
        if self.is_cellwise:
            factor = self._stretch(values, scales, previous, generator)
            values["variance"] = values["variance"] * factor
            values["stretch"] = factor
            if previous is not None:
                return self._values(values, self._own_df(values, previous))
            scales["log_scale"] = scales["log_scale"] + scales["count"] * factor.log()
            scales["moments"] = scales["moments"] * factor.unsqueeze(-1)
        df = self.degrees.draw(scales, previous, generator=generator)
        return self._values(values, df)

    def _by_tails(
        self, statistics: Tensors, previous: Tensors, generator: torch.Generator
    ) -> Tensor:
        count = statistics["count"]
        likelihood = tail_likelihood(statistics["tails"], count)
        return self.degrees.draw_by(likelihood, count.shape, previous, generator=generator)

    def _stretch(
        self,
        values: Tensors,
        scales: Tensors,
        previous: Tensors | None,
        generator: torch.Generator,
    ) -> Tensor:
        r"""A factor ``(..., 1)`` of the noise's variance and of all scales, for faster mixing.

        The likelihood sees :math:`\sigma^2 / u_{ij}` alone. Given that, the factor follows a
        Gamma, up to the prior of the noise, by which it is accepted.

        References:
            Liu & Wu (1999). Parameter expansion for data augmentation. JASA 94.
        """
        df = self._own_df(values, previous)
        power = 0.5 * (scales["count"] * df).sum(-1, keepdim=True)
        rate = 0.5 * (scales["moments"].squeeze(-1) * df).sum(-1, keepdim=True)
        factor = rng.gamma(power, generator) / rate
        moved = {**values, "variance": values["variance"] * factor}
        # In the basis of the variance's logarithm, as the factor's law is.
        ratio = self.normal.log_noise_prior(moved) - self.normal.log_noise_prior(values)
        uniform = torch.rand(
            ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device
        )
        accepted = (uniform.log() < ratio).unsqueeze(-1)
        return torch.where(accepted, factor, torch.ones_like(factor))

    def _own_df(self, values: Tensors, previous: Tensors | None) -> Tensor:
        own = None if previous is None else previous.get("df")
        return self._start_df(values) if own is None else own

    def _start_df(self, values: Tensors) -> Tensor:
        lead = values["loc"] if self.is_cellwise else values["loc"][..., :1]
        start = self.degrees.grid if self.degrees.is_fixed else torch.full_like(lead, _START_DF)
        return start.expand(lead.shape)

    def natural(self, values: Tensors) -> dict[str, Tensor]:
        df = self._own_df(values, values)
        message = {**self.normal.natural(values), **self.degrees.natural(df)}
        return message | ({"stretch": values["stretch"]} if "stretch" in values else {})
