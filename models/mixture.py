"""Finite and truncated infinite mixtures: one model, any component family, any weights prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import (
    Conditional,
    Encoder,
    Generative,
    Model,
    Partitioned,
    Program,
    Scored,
    Symmetric,
)
from bayesgen.conjugate import Local
from bayesgen.models.families import family_class
from bayesgen.models.families.gaussian import Gaussian
from bayesgen.models.families.mixing import Mixing
from bayesgen.priors import describe, prior_from_config, prior_to_config
from bayesgen.symmetry import LabelPermutation

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.conjugate import MarginalBlock
    from bayesgen.data import Dataset
    from bayesgen.models.families.base import Family

__all__ = ["GaussianMixture", "Mixture"]

_LOG2_E = math.log2(math.e)
_LLOYD_STEPS = 30


class _Rows(dist.TorchDistribution):
    """Rows of the data under a mixture, labels summed out: batch ``(..., n)``, event ``(d,)``."""

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, family: Family, weights: Tensor, values: Tensors, num_rows: int, num_columns: int
    ) -> None:
        self.family, self.weights, self.values = family, weights, dict(values)
        batch = torch.Size((*weights.shape[:-1], num_rows))
        super().__init__(batch, torch.Size((num_columns,)), validate_args=False)

    @property
    def support(self) -> torch.distributions.constraints.Constraint:
        return torch.distributions.constraints.real_vector

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Rows:
        lead = torch.Size(batch_shape)[:-1]
        weights = self.weights.expand(*lead, self.weights.shape[-1])
        return _Rows(self.family, weights, self.values, batch_shape[-1], self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        scores = self.family.log_prob(value, self.values)
        return torch.logsumexp(scores + self.weights.log().unsqueeze(-1), dim=-2)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        if len(self.weights.shape) > 1 or sample_shape:
            raise ValueError(
                "rows are sampled for one draw of the parameters at a time; batch them with "
                "vmap-free "
                "Predictive(parallel=False), or use fit.sample."
            )
        n = self.batch_shape[-1]
        device = self.weights.device
        seed = int(torch.randint(2**32, ()))
        generator = rng.make_generator(seed, device)
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        repeated = {k: v.expand(n, *v.shape) for k, v in self.values.items()}
        return self.family.draw(repeated, labels, generator=generator)


def _softmax(scores: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibilities of the components, and their log normaliser ``(..., n)``.

    Everything to the base two: ``exp2`` is several times faster on a CPU than ``exp``, and
    without its penalty where float32 underflows.

    Args:
        scores: ``(..., K, n)``; overwritten, for the pass is bound by memory.
        log_weights: ``(..., K, 1)``.
    """
    logits = torch.add(log_weights * _LOG2_E, scores, alpha=_LOG2_E, out=scores)
    top = logits.amax(-2, keepdim=True)
    shares = logits.sub_(top).exp2_()
    total = shares.sum(-2, keepdim=True)
    normaliser = torch.log2(total).add_(top).squeeze(-2).mul_(1.0 / _LOG2_E)
    return shares.mul_(total.reciprocal_()), normaliser


@dataclass(frozen=True, eq=False)
class Mixture(Model, Program, Scored, Generative, Encoder, Conditional, Symmetric, Partitioned):
    r"""A Bayesian mixture of ``num_components`` components of one family.

    .. math::
        w \sim p(w), \quad \theta_k \sim p(\theta), \quad z_i \mid w \sim \mathrm{Categorical}(w),
        \quad x_i \mid z_i \sim p(x \mid \theta_{z_i})

    Labels are summed out of the Pyro program and of every density. With a sparse weights prior
    ``num_components`` is an upper bound, and the data choose how many components live.

    References:
        Bishop (2006). Pattern Recognition and Machine Learning, section 10.2. Malsiner-Walli,
        Frühwirth-Schnatter & Grün (2016). Model-based clustering based on sparse finite Gaussian
        mixtures.

    Args:
        family: The component family: ``Gaussian()``, ``DiagonalGaussian()``, ``StudentT()``,
            ``Bernoulli()``, ``Categorical()``, ``Poisson()``, or ``Product()`` for mixed columns.
        num_components: Number of components, or their upper bound.
        priors: By site: ``"weights"`` and the family's own keys. Default: weakly informative,
            scaled to the data when the model is bound to them.

    Raises:
        ValueError: ``num_components`` below 1, an unknown site in ``priors``, or a prior that does
            not fit.
        TypeError: A prior of a kind that the site does not understand.

    Example:
        >>> from bayesgen.models import Mixture
        >>> from bayesgen.models.families.gaussian import Gaussian
        >>> Mixture(Gaussian(tied=True), num_components=3).num_components
        3
    """

    family: Family
    num_components: int
    priors: Mapping[str, Any] = field(default_factory=dict)
    bound: bool = False

    def __post_init__(self) -> None:
        k = self.num_components
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"num_components={k!r}, but it must be a whole number of at least 1.")
        allowed = ("weights", *self.family.prior_sites)
        for site in self.priors:
            if site not in allowed:
                raise ValueError(
                    f"priors names the site {site!r}, but this model has {', '.join(allowed)}."
                )
        Mixing(k, self.priors.get("weights"))

    def __repr__(self) -> str:
        lines = [f"Mixture of {self.num_components} components: {self.family.describe()}"]
        shown = self.all_priors if self.bound else dict(self.priors)
        lines += [f"  {site} ~ {describe(prior)}" for site, prior in shown.items()]
        return "\n".join(lines)

    # ------------------------------------------------------------ Model
    def bind(self, data: Dataset) -> Self:
        own = {site: prior for site, prior in self.priors.items() if site != "weights"}
        family = self.family.bind(data, self.num_components, own)
        # As the family scaled them to the data, so that a saved model is complete.
        filled = {site: prior for site, prior in family.priors.items() if site in own}
        return replace(self, family=family, priors={**self.priors, **filled}, bound=True)

    def to(self, device: torch.device) -> Self:
        return replace(self, family=self.family.to(device))

    @property
    def is_bound(self) -> bool:
        return self.bound

    @property
    def mixing(self) -> Mixing:
        """The weights under their prior."""
        return Mixing(self.num_components, self.priors.get("weights"))

    @property
    def all_priors(self) -> dict[str, Any]:
        """Every prior in force by site, defaults included."""
        return {"weights": self.mixing.prior, **self.family.priors}

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {**self.mixing.dims, **self.family.dims, **self.family.invariant_dims}

    @property
    def attrs(self) -> dict[str, Any]:
        return {"priors": {site: describe(prior) for site, prior in self.all_priors.items()}}

    def coords(self) -> dict[str, list[Any]]:
        return {"component": list(range(self.num_components)), **self.family.coords()}

    def to_config(self) -> dict[str, Any]:
        return {
            "family": type(self.family).__name__,
            "family_config": self.family.to_config(),
            "num_components": self.num_components,
            "bound": self.bound,
            "priors": {site: prior_to_config(prior) for site, prior in self.priors.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        priors = {site: prior_from_config(item) for site, item in config["priors"].items()}
        own = {site: prior for site, prior in priors.items() if site != "weights"}
        family = family_class(config["family"]).from_config(config["family_config"], own)
        return cls(family, config["num_components"], priors, config["bound"])

    # ------------------------------------------------------------ Program
    def model(self, batch: Tensor | None, *, num_rows: int | None = None) -> None:
        if batch is None:
            raise ValueError(
                "the mixture's Pyro program needs data; pass a batch of shape (n, d)."
            )
        total = len(batch) if num_rows is None else num_rows
        weights = self.mixing.program()
        values = self.family.program(pyro.plate("components", self.num_components, dim=-1))
        # Vectorised particles put the plate's dimension of size one between themselves and K.
        weights = weights.squeeze(-2) if weights.ndim > 1 else weights
        rows = torch.arange(len(batch), device=batch.device)
        with pyro.plate("data", total, subsample=rows, dim=-1):
            law = _Rows(self.family, weights, values, *batch.shape)
            pyro.sample("x", law, obs=batch)

    # ------------------------------------------------------------ Scored, Generative, Encoder,
    # Conditional
    def _logits(self, x: Tensor, draws: Tensors) -> Tensor:
        return self.family.log_prob(x, draws) + draws["weights"].log().unsqueeze(-1)

    def log_prob(self, x: Tensor, draws: Tensors) -> Tensor:
        return torch.logsumexp(self._logits(x, draws), dim=-2)

    def sample(self, draws: Tensors, *, generator: torch.Generator) -> Tensor:
        labels = rng.categorical(draws["weights"].log(), generator, dim=-1)
        return self.family.draw(draws, labels, generator=generator)

    def encode(self, x: Tensor, draws: Tensors) -> torch.distributions.Categorical:
        logits = self._logits(x, draws).transpose(-1, -2)
        return torch.distributions.Categorical(logits=logits, validate_args=False)

    def condition(
        self, x: Tensor, observed: Tensor, draws: Tensors
    ) -> torch.distributions.Distribution:
        blind = torch.where(observed, x, torch.full_like(x, torch.nan))
        return torch.distributions.MixtureSameFamily(
            self.encode(blind, draws),
            self.family.conditional(x, observed, draws),
            validate_args=False,
        )

    # ------------------------------------------------------------ Symmetric
    @property
    def symmetry(self) -> LabelPermutation:
        axes = {
            site: dims.index("component")
            for site, dims in self.dims.items()
            if "component" in dims
        }
        return LabelPermutation(self.num_components, axes)

    def invariants(self, draws: Tensors) -> dict[str, Tensor]:
        weights = draws["weights"]
        entropy = torch.special.entr(weights).sum(-1)
        return {"num_effective": entropy.exp(), **self.family.invariants(weights, draws)}

    # ------------------------------------------------------------ Conjugate
    @cached_property
    def blocks(self) -> Mapping[str, MarginalBlock]:
        components = self.family.block
        return {"weights": self.mixing.block(self.family.device), "components": components}

    @property
    def row_size(self) -> int:
        return self.family.row_size + 2 * self.num_components

    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Any:
        return self.family.observe(x, dtype)

    def ready(self, messages: Mapping[str, Tensors], dtype: torch.dtype) -> Mapping[str, Tensors]:
        return {**messages, "components": self.family.ready(messages["components"], dtype)}

    def component_scores(self, observed: Any, message: Tensors) -> Tensor:
        return self.family.evaluate(observed, message).scores

    def degenerate(self, values: Mapping[str, Tensors]) -> Tensor:
        return self.family.collapsed(values["components"])

    def collapsible(self, observed: Any) -> bool:
        return self.family.collapsible(observed)

    def occupancy(self, statistics: Mapping[str, Tensors]) -> Tensor:
        return statistics["weights"]["count"]

    def export(self, values: Mapping[str, Tensors]) -> dict[str, Tensor]:
        return {
            **self.mixing.export(values["weights"]),
            **self.family.export(values["components"]),
        }

    def local(
        self,
        observed: Any,
        messages: Mapping[str, Tensors],
        *,
        generator: torch.Generator | None = None,
    ) -> Local:
        message = messages["components"]
        evaluation = self.family.evaluate(observed, message)
        scores = evaluation.scores
        log_weights = messages["weights"]["log_weights"].unsqueeze(-1).to(scores.dtype)
        latents: dict[str, Tensor]
        if generator is None:
            responsibilities, normaliser = _softmax(scores, log_weights)
            latents = {"responsibilities": responsibilities}
        else:
            labels, normaliser = rng.draw_and_normaliser(scores.add_(log_weights), generator)
            responsibilities = torch.zeros_like(scores).scatter_(-2, labels.unsqueeze(-2), 1.0)
            latents = {"labels": labels}
        components = self.family.statistics(
            observed, responsibilities, evaluation, message, generator=generator
        )
        statistics = {
            "weights": {"count": self.family.rows(components)},
            "components": components,
        }
        return Local(statistics, normaliser.sum(-1, dtype=torch.float64), latents)

    def inner(self, messages: Mapping[str, Tensors], statistics: Mapping[str, Tensors]) -> Tensor:
        weights = messages["weights"]["log_weights"] * statistics["weights"]["count"]
        return weights.sum(-1) + self.family.inner(
            messages["components"], statistics["components"]
        )

    def assigned(self, observed: Any, responsibilities: Tensor) -> dict[str, dict[str, Tensor]]:
        components = self.family.statistics(observed, responsibilities, None, None)
        return {"weights": {"count": self.family.rows(components)}, "components": components}

    def embed(self, x: Tensor) -> Tensor:
        return self.family.embed(x)

    def start(
        self,
        x: Tensor,
        *,
        num_batch: int,
        generator: torch.Generator,
        varied: bool = False,
    ) -> dict[str, dict[str, Tensor]]:
        points = self.embed(x)
        # Every other start stops after one step of k-means: converged ones are often alike.
        hard = torch.stack(
            [
                self._seeded(points, size, 1 if i % 2 else _LLOYD_STEPS, generator)
                for i, size in enumerate(self._sizes(num_batch, varied))
            ]
        )
        return self.assigned(self.observe(x), hard)

    def _sizes(self, num_batch: int, varied: bool) -> list[int]:
        """Clusters of each start: all components, or from all of them down to two."""
        k = self.num_components
        if not varied or k < 3 or num_batch < 2:
            return [k] * num_batch
        return [round(k * (2 / k) ** (i / (num_batch - 1))) for i in range(num_batch)]

    def scattered(
        self, x: Tensor, *, num_batch: int, generator: torch.Generator, varied: bool = False
    ) -> dict[str, dict[str, Tensor]]:
        shape = (num_batch, self.num_components, len(x))
        shares = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        for i, size in enumerate(self._sizes(num_batch, varied)):
            shares[i, size:] = 0.0
        return self.assigned(self.observe(x), shares / shares.sum(-2, keepdim=True))

    def _seeded(
        self, points: Tensor, num_clusters: int, max_iter: int, generator: torch.Generator
    ) -> Tensor:
        """One hard k-means++ assignment ``(K, n)``."""
        import warnings

        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        clusters = min(num_clusters, len(points))
        with warnings.catch_warnings():
            # Fewer distinct rows than clusters is a legitimate start here: the rest stay empty.
            warnings.simplefilter("ignore", ConvergenceWarning)
            labels = KMeans(clusters, n_init=1, max_iter=max_iter, random_state=seed).fit_predict(
                points.double().cpu().numpy()
            )
        index = torch.as_tensor(labels, dtype=torch.int64, device=points.device)
        hot = torch.zeros(
            (self.num_components, len(points)), dtype=points.dtype, device=points.device
        )
        return hot.scatter_(0, index.unsqueeze(0), 1.0)

    def log_predictive(self, x: Tensor, posterior: Mapping[str, Tensors]) -> Tensor | None:
        scores = self.family.log_predictive(x, posterior["components"])
        if scores is None:
            return None
        weights = self.mixing.block(self.family.device).log_mean(posterior["weights"])
        return torch.logsumexp(scores + weights.unsqueeze(-1), dim=-2)


_COVARIANCES = ("full", "tied", "diagonal", "spherical")


def GaussianMixture(
    num_components: int, covariance: str = "full", priors: Mapping[str, Any] | None = None
) -> Mixture:
    r"""A Bayesian mixture of Gaussians, in one and many dimensions.

    .. math::
        w \sim p(w), \quad (\mu_k, \Sigma_k) \sim \mathrm{NIW}, \quad
        x_i \sim \sum_k w_k \mathrm{N}(\mu_k, \Sigma_k)

    References:
        Fraley & Raftery (2007). Bayesian regularization for normal mixture estimation and
        model-based clustering.

    Args:
        num_components: Number of components, or their upper bound under a sparse weights prior.
        covariance: ``"full"``, ``"tied"``, ``"diagonal"`` or ``"spherical"``.
        priors: ``"weights"``: :class:`~bayesgen.priors.SymmetricDirichlet` (the default, sparse),
            :class:`~bayesgen.priors.GammaDirichlet`, :class:`~bayesgen.priors.StickBreaking` or
            any distribution on the simplex. ``"components"``: a
            :class:`~bayesgen.distributions.NormalInverseWishart` (its diagonal analogue for
            diagonal and spherical), or one with a hyperprior. Or site by site.

    Raises:
        ValueError: An unknown covariance, or what :class:`Mixture` refuses.

    Example:
        >>> from bayesgen.models import GaussianMixture
        >>> GaussianMixture(10, covariance="tied").family.tied
        True
    """
    if covariance not in _COVARIANCES:
        raise ValueError(
            f"covariance={covariance!r}, but it must be one of {', '.join(_COVARIANCES)}."
        )
    family: Family
    if covariance in ("full", "tied"):
        family = Gaussian(tied=covariance == "tied")
    else:
        from bayesgen.models.families.diagonal import DiagonalGaussian

        family = DiagonalGaussian(spherical=covariance == "spherical")
    return Mixture(family, num_components, dict(priors or {}))
