"""The linear-Gaussian model: what PPCA and its kin share, from the data to the verbs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from bayesgen import rng
from bayesgen.capabilities import (
    Conditional,
    Denoising,
    Encoder,
    Explained,
    Generative,
    Model,
    Pooled,
    Program,
    Scored,
    Symmetric,
)
from bayesgen.conjugate import Block, Local
from bayesgen.distributions import PartialLowRankMultivariateNormal
from bayesgen.distributions._low_rank import LowRankForm, low_rank_form
from bayesgen.models.families.base import refuse_categories
from bayesgen.models.linear.guess import guess
from bayesgen.models.linear.latents import from_rows, from_sums, inner
from bayesgen.models.linear.priors import (
    Scales,
    conjugate_block,
    default_priors,
    find_scales,
    given_priors,
    prior_sites,
    sample_sites,
)
from bayesgen.models.linear.rows import Rows, Sums, pool, sum_rows, take_rows
from bayesgen.priors import describe, prior_from_config, prior_to_config
from bayesgen.symmetry import Rotation, factor_invariants

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset
    from bayesgen.models.linear.block import LoadingsBlock

__all__ = ["Bound", "LinearModel", "scale_tril_of"]


class Bound(NamedTuple):
    """What a linear model knows of the data that it is bound to."""

    scales: Scales
    columns: tuple[str, ...]
    is_complete: bool
    """Whether no entry is missing."""
    num_rows: int

    @property
    def is_wide(self) -> bool:
        """Whether there are fewer rows than columns."""
        return self.num_rows < len(self.columns)


def scale_tril_of(precision_tril: Tensor) -> Tensor:
    """Lower Cholesky factor of the inverse of ``L L^T``."""
    flipped = torch.linalg.cholesky((precision_tril @ precision_tril.mT).flip((-2, -1)))
    upper = flipped.flip((-2, -1)).mT
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye.expand(upper.shape), upper=False)


@dataclass(frozen=True, eq=False, repr=False)
class LinearModel(
    Model,
    Program,
    Scored,
    Generative,
    Encoder,
    Denoising,
    Explained,
    Conditional,
    Symmetric,
    Pooled,
):
    r"""Rows that are a linear map of a few latents, plus noise.

    .. math::
        z_i \sim \mathrm{N}(0, I_q), \qquad x_i \mid z_i \sim \mathrm{N}(W z_i + \mu, \Psi)

    Latents are integrated out of the Pyro program and of every density, at the cost of factors of
    size ``q`` only. Subclasses say what the noise :math:`\Psi` looks like.

    Args:
        latent_dim: Number of latents ``q``, below the number of columns.
        priors: By site.
        bound: Set by :meth:`bind`.
    """

    latent_dim: int
    priors: Mapping[str, Any] = field(default_factory=dict)
    bound: Bound | None = None

    # ------------------------------------------------------------ what a subclass says
    @property
    @abstractmethod
    def is_shared(self) -> bool:
        """Whether all columns have the same noise."""

    @property
    def is_learned(self) -> bool:
        """Whether the relevance of each direction is learned."""
        return False

    @property
    def is_robust(self) -> bool:
        """Whether rows or cells have scales of their own."""
        return False

    @property
    def is_cellwise(self) -> bool:
        """Whether each cell has a scale of its own."""
        return False

    @property
    def learns_df(self) -> bool:
        """Whether the law of the scales is learned."""
        return False

    # ------------------------------------------------------------ Model
    def __post_init__(self) -> None:
        q, name = self.latent_dim, type(self).__name__
        if isinstance(q, bool) or not isinstance(q, int) or q < 1:
            raise ValueError(
                f"{name}: latent_dim={q!r}, but it must be a whole number of at least 1."
            )
        allowed = prior_sites(learned=self.is_learned, scaled=self.learns_df)
        for site in self.priors:
            if site not in allowed:
                raise ValueError(
                    f"priors names the site {site!r}, but {name} has {', '.join(allowed)}."
                )

    def __repr__(self) -> str:
        noise = "one noise scale" if self.is_shared else "a noise scale for each column"
        lines = [f"{type(self).__name__} of {self.latent_dim} latents, {noise}"]
        shown = self.all_priors if self.is_bound else dict(self.priors)
        lines += [f"  {site} ~ {describe(prior)}" for site, prior in shown.items()]
        return "\n".join(lines)

    def bind(self, data: Dataset) -> Self:
        name, d = type(self).__name__, data.num_columns
        refuse_categories(data, name)
        if self.latent_dim >= d:
            raise ValueError(
                f"{name}: latent_dim={self.latent_dim}, but the data have {d} "
                f"column{'s' * (d != 1)}; it must be smaller, so that something is left for the "
                "noise."
            )
        self._given(d)
        scales = find_scales(data, shared=self.is_shared, robust=self.is_robust)
        bound = Bound(scales, data.columns, not data.has_missing, data.num_rows)
        return replace(self, bound=bound)

    @property
    def _bound(self) -> Bound:
        if self.bound is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.bound

    def to(self, device: torch.device) -> Self:
        scales = self._bound.scales
        moved = Scales(scales.offset.to(device), scales.scale.to(device))
        return replace(self, bound=self._bound._replace(scales=moved))

    @property
    def is_bound(self) -> bool:
        return self.bound is not None

    @cached_property
    def all_priors(self) -> dict[str, Any]:
        """Every prior in force by site, defaults included."""
        scales = self._bound.scales
        default = default_priors(
            scales,
            self.latent_dim,
            shared=self.is_shared,
            learned=self.is_learned,
            scaled=self.learns_df,
            cellwise=self.is_cellwise,
        )
        return {**default, **self._given(len(scales.offset))}

    def _given(self, num_columns: int) -> dict[str, Any]:
        return given_priors(
            self.priors,
            num_columns,
            self.latent_dim,
            shared=self.is_shared,
            cellwise=self.is_cellwise,
        )

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        dims: dict[str, tuple[str, ...]] = {
            "loadings": ("column", "latent"),
            "loc": ("column",),
            "noise_scale": () if self.is_shared else ("column",),
        }
        learned = {"precision": ("latent",)} if self.is_learned else {}
        invariants = {"signal_variance": ("rank",), "covariance": ("column", "column_2")}
        return {**dims, **learned, **invariants}

    def coords(self) -> dict[str, list[Any]]:
        columns = list(self._bound.columns)
        latents = list(range(self.latent_dim))
        return {"column": columns, "column_2": columns, "latent": latents, "rank": latents}

    def to_config(self) -> dict[str, Any]:
        bound = self._bound
        return {
            "latent_dim": self.latent_dim,
            "priors": {site: prior_to_config(prior) for site, prior in self.priors.items()},
            "offset": bound.scales.offset,
            "scale": bound.scales.scale,
            "columns": list(bound.columns),
            "is_complete": bound.is_complete,
            "num_rows": bound.num_rows,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        priors = {site: prior_from_config(item) for site, item in config["priors"].items()}
        scales = Scales(config["offset"], config["scale"])
        bound = Bound(scales, tuple(config["columns"]), config["is_complete"], config["num_rows"])
        return cls(latent_dim=config["latent_dim"], priors=priors, bound=bound)

    # ------------------------------------------------------------ Program
    def model(self, batch: Tensor | None, *, num_rows: int | None = None) -> None:
        if batch is None:
            raise ValueError("the model's Pyro program needs data; pass a batch of shape (n, d).")
        d, total = batch.shape[1], len(batch) if num_rows is None else num_rows
        values = sample_sites(
            self.all_priors,
            d,
            self.latent_dim,
            shared=self.is_shared,
            cellwise=self.is_cellwise,
        )
        rows = torch.arange(len(batch), device=batch.device)
        with pyro.plate("data", total, subsample=rows, dim=-1):
            self._observe(values, batch)

    def _observe(self, values: Tensors, batch: Tensor) -> None:
        """The Pyro statements of the rows, within their plate."""
        pyro.sample("x", self._observation(values), obs=batch)

    def _noise(self, values: Tensors) -> Tensor:
        """Standard deviations of the noise, ``(..., d)``."""
        scale, loc = values["noise_scale"], values["loc"]
        return scale.unsqueeze(-1).expand(loc.shape) if self.is_shared else scale

    def _observation(self, values: Tensors) -> PartialLowRankMultivariateNormal:
        return PartialLowRankMultivariateNormal(
            values["loc"], values["loadings"], self._noise(values).square(), validate_args=False
        )

    # ------------------------------------------------------------ the verbs
    def _each(self, draws: Tensors) -> dict[str, Tensor]:
        """The draws with a dimension for rows behind those of the draws."""
        lead = draws["loc"].ndim - 1
        return {name: value.unsqueeze(lead) for name, value in draws.items()}

    def log_prob(self, x: Tensor, draws: Tensors) -> Tensor:
        return self._observation(self._each(draws)).log_prob(x)

    def _sample_latents(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        loc = draws["loc"]
        shape = (*loc.shape[:-1], self.latent_dim)
        return rng.standard_normal(shape, generator, dtype=loc.dtype, device=loc.device)

    def _signal(self, latents: Tensor, draws: Tensors) -> Tensor:
        return latents @ draws["loadings"].mT + draws["loc"].unsqueeze(-2)

    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        signal = self.sample_signal(draws, generator=generator)
        noise = rng.standard_normal(
            signal.shape, generator, dtype=signal.dtype, device=signal.device
        )
        return signal + self._noise(draws) * noise

    def encode(self, x: Tensor, draws: Tensors) -> torch.distributions.Distribution:
        shift = x - draws["loc"].unsqueeze(-2)
        found = low_rank_form(shift, x.isnan(), draws["loadings"], self._noise(draws))
        tril = scale_tril_of(found.precision_tril)
        return MultivariateNormal(
            found.loc,
            scale_tril=tril.expand(*found.loc.shape, self.latent_dim),
            validate_args=False,
        )

    def condition(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> torch.distributions.Distribution:
        return self._rest(x, observed, draws)[0]

    def _rest(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> tuple[PartialLowRankMultivariateNormal, LowRankForm]:
        """The other columns given the observed ones, and the form of these."""
        loc, loadings, noise = draws["loc"], draws["loadings"], self._noise(draws)
        shift = x[:, observed] - loc[..., observed].unsqueeze(-2)
        seen = torch.zeros_like(shift, dtype=torch.bool)
        found = low_rank_form(shift, seen, loadings[..., observed, :], noise[..., observed])
        rest = loadings[..., ~observed, :]
        # The latent's covariance given the observed columns is (L L^T)^-1.
        factor = torch.linalg.solve_triangular(
            found.precision_tril, rest.mT.unsqueeze(-3), upper=False
        ).mT
        law = PartialLowRankMultivariateNormal(
            found.loc @ rest.mT + loc[..., ~observed].unsqueeze(-2),
            factor,
            noise[..., ~observed].square().unsqueeze(-2),
            validate_args=False,
        )
        return law, found

    def reconstruct(self, x: Tensor, draws: Tensors) -> Tensor:
        return self._signal(self.encode(x, draws).mean, draws)

    def sample_signal(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        latents = self._sample_latents(draws, generator=generator)
        return self._signal(latents.unsqueeze(-2), draws).squeeze(-2)

    def explained_variance(self, draws: Tensors) -> dict[str, Tensor]:
        loadings = draws["loadings"]
        spectrum = torch.linalg.eigvalsh(loadings.mT @ loadings).flip(-1).clamp_min(0.0)
        return {"signal": spectrum, "noise": self._noise(draws).square().sum(-1)}

    # ------------------------------------------------------------ Symmetric
    @property
    def negligible(self) -> float:
        """Variance of the signal, in units of the noise's, below which a direction is off.

        Rows of pure noise have a leading direction of sample variance ``(1 + sqrt(d / n))^2`` in
        these units, and a signal below ``sqrt(d / n)`` does not show among them.
        """
        if not self.is_learned:
            return 0.0
        return math.sqrt(len(self._bound.columns) / max(self._bound.num_rows, 1))

    @property
    def symmetry(self) -> Rotation:
        attached = ("precision",) if self.is_learned else ()
        return Rotation(
            self.latent_dim, noise="noise_scale", attached=attached, negligible=self.negligible
        )

    def invariants(self, draws: Tensors) -> dict[str, Tensor]:
        found = factor_invariants(draws["loadings"], draws["noise_scale"])
        if self.is_learned:
            scaled = draws["loadings"] / self._noise(draws).unsqueeze(-1)
            spectrum = torch.linalg.eigvalsh(scaled.mT @ scaled)
            live = (spectrum > self.negligible).sum(-1)
            found = {"num_live": live.to(spectrum.dtype), **found}
        return found

    # ------------------------------------------------------------ Conjugate
    @cached_property
    def _block(self) -> LoadingsBlock:
        priors = {site: prior for site, prior in self.all_priors.items() if site != "df"}
        return conjugate_block(priors, self._bound.scales, self.latent_dim)

    @property
    def blocks(self) -> Mapping[str, Block]:
        return {"loadings": self._block}

    @property
    def row_size(self) -> int:
        d, size = len(self._bound.columns), self.latent_dim + 1
        return d if self.pools else 2 * d + size * (size + 1)

    @property
    def pools(self) -> bool:
        return self._bound.is_complete and not self.is_robust

    def pool(self, left: Sums, right: Sums) -> Sums:
        return pool(left, right)

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Sums | Rows:
        centred = x.double() - self._bound.scales.offset.to(x.device)
        if self.pools:
            return sum_rows(centred, dtype, is_root=self._bound.is_wide)
        return take_rows(centred, dtype, complete=self._bound.is_complete)

    def local(
        self,
        observed: Sums | Rows,
        messages: Mapping[str, Tensors],
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        message = messages["loadings"]
        if isinstance(observed, Sums):
            found = from_sums(observed, message, generator=generator)
        else:
            found = from_rows(observed, message, generator=generator)
        return Local({"loadings": found.statistics}, found.bound, {})

    def inner(self, messages: Mapping[str, Tensors], statistics: Mapping[str, Tensors]) -> Tensor:
        return inner(messages["loadings"], statistics["loadings"])

    def start(
        self, x: Tensor, *, num_batch: int, generator: torch.Generator, varied: bool = False
    ) -> Mapping[str, Tensors]:
        values = guess(
            x,
            self._bound.scales,
            self.latent_dim,
            num_batch,
            shared=self.is_shared,
            robust=("cells" if self.is_cellwise else "rows") if self.is_robust else None,
            generator=generator,
        )
        message = self.blocks["loadings"].natural(values)
        return self.local(self.observe(x), {"loadings": message}).statistics

    def export(self, values: Mapping[str, Tensors]) -> dict[str, Tensor]:
        out = dict(values["loadings"])
        scale = out.pop("variance").sqrt()
        offset = self._bound.scales.offset
        out["loc"] = out["loc"] + offset.to(out["loc"])
        out["noise_scale"] = scale.squeeze(-1) if self.is_shared else scale
        return out

    def degenerate(self, values: Mapping[str, Tensors]) -> Tensor:
        variance = values["loadings"]["variance"]
        return (variance <= 1.0001 * self._block.floor).any(-1)

    def log_predictive(self, x: Tensor, posterior: Mapping[str, Tensors]) -> Tensor | None:
        """None: with loadings integrated out there is no closed form."""
        return None
