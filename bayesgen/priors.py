"""Priors by site name: what may be given, and the conjugate ones that carry their own hyperpriors.

A prior is a Pyro distribution, a callable that samples its own hyperparameters and returns one, or
one of the descriptions below, which the conjugate engines (EM, variational Bayes, Gibbs)
understand as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

if TYPE_CHECKING:
    from bayesgen.prior_design import explore, solve_concentration
    from bayesgen.prior_replacement import with_priors

__all__ = [
    "GammaDirichlet",
    "HierarchicalNormalInverseWishart",
    "Prior",
    "StickBreaking",
    "SymmetricDirichlet",
    "check_prior",
    "describe",
    "explore",
    "prior_from_config",
    "prior_to_config",
    "same_support",
    "solve_concentration",
    "with_priors",
]


def _check_positive(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (float(value) > 0.0 and float(value) < float("inf")):
            raise ValueError(
                f"{owner}: {name}={value!r}, but it must be a positive finite number."
            )


@dataclass(frozen=True)
class SymmetricDirichlet:
    r"""Weights ``~ Dirichlet(concentration, ..., concentration)``.

    Well below 1 the prior is sparse: superfluous components stay empty, and the data choose how
    many live (a sparse finite mixture).

    References:
        Malsiner-Walli, Frühwirth-Schnatter & Grün (2016). Model-based clustering based on sparse
        finite Gaussian mixtures.

    Args:
        concentration: Concentration of each component, positive.
    """

    concentration: float

    def __post_init__(self) -> None:
        _check_positive("SymmetricDirichlet", concentration=self.concentration)


@dataclass(frozen=True)
class GammaDirichlet:
    r"""Symmetric Dirichlet whose common concentration is learned.

    .. math::
        e \sim \mathrm{Gamma}(\text{shape}, \text{rate}), \quad
        w \mid e \sim \mathrm{Dirichlet}(e, \dots, e)

    References:
        Frühwirth-Schnatter & Malsiner-Walli (2019). From here to infinity: sparse finite versus
        Dirichlet process mixtures in model-based clustering.

    Args:
        shape: Shape of the Gamma hyperprior, positive.
        rate: Rate of the Gamma hyperprior, positive; the prior mean of each concentration is shape
            / rate.
    """

    shape: float
    rate: float

    def __post_init__(self) -> None:
        _check_positive("GammaDirichlet", shape=self.shape, rate=self.rate)


@dataclass(frozen=True)
class StickBreaking:
    r"""Dirichlet process weights, truncated at the number of components.

    .. math::
        v_k \sim \mathrm{Beta}(1, \alpha), \quad
        w_k = v_k \prod_{j<k} (1 - v_j), \quad v_K = 1

    Either a fixed ``concentration`` or a Gamma hyperprior on it by ``shape`` and ``rate``.

    References:
        Ishwaran & James (2001). Gibbs sampling methods for stick-breaking priors.
        Blei & Jordan (2006). Variational inference for Dirichlet process mixtures.

    Args:
        concentration: The process' concentration, positive; None when it is learned.
        shape: Shape of its Gamma hyperprior, positive.
        rate: Rate of its Gamma hyperprior, positive.
    """

    concentration: float | None = None
    shape: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        fixed, learned = self.concentration is not None, self.shape is not None
        if fixed == learned or (self.shape is None) != (self.rate is None):
            raise ValueError(
                f"StickBreaking needs either concentration or both shape and rate, got {self}. "
                "Write StickBreaking(1.0) or StickBreaking(shape=2.0, rate=2.0)."
            )
        _check_positive(
            "StickBreaking", concentration=self.concentration, shape=self.shape, rate=self.rate
        )


class HyperNumbers(NamedTuple):
    """The numbers of a :class:`HierarchicalNormalInverseWishart`."""

    loc: Tensor
    mean_precision: float
    df: float
    shape: float
    rate: Tensor


@dataclass(frozen=True)
class HierarchicalNormalInverseWishart:
    r"""Normal-inverse-Wishart whose scale matrix is learned, one variance scale a column.

    .. math::
        s_j \sim \mathrm{Gamma}(\text{shape}, \text{rate}_j), \quad
        \Sigma_k \mid s \sim \mathrm{IW}(\text{df}, \mathrm{diag}(s)), \quad
        \mu_k \mid \Sigma_k \sim \mathrm{N}(\text{loc}, \Sigma_k / \text{mean\_precision})

    It frees the size of the clusters from a guess: the components teach each other their scale.

    References:
        Richardson & Green (1997). On Bayesian analysis of mixtures with an unknown number of
        components.

    What is left out is scaled to the data when a model is bound to them: ``loc`` is their mean,
    ``df`` is ``d + 2``, and the hyperprior expects what the default prior of the family fixes.

    Args:
        loc: Prior mean of the component means, ``(d,)`` in the data's units.
        mean_precision: How many observations the prior mean is worth, positive.
        df: Degrees of freedom, above ``d - 1``.
        shape: Shape of the Gamma hyperprior, positive.
        rate: Rates of the Gamma hyperprior, ``(d,)``, in 1 / squared units of the data.

    Example:
        >>> from bayesgen.models import GaussianMixture
        >>> prior = HierarchicalNormalInverseWishart()
        >>> GaussianMixture(10, priors={"components": prior}).num_components
        10
    """

    loc: Tensor | None = None
    mean_precision: float = 0.01
    df: float | None = None
    shape: float = 1.0
    rate: Tensor | None = None

    def scaled(self, loc: Tensor, expected: Tensor) -> HierarchicalNormalInverseWishart:
        """A copy whose open parts are filled in.

        Args:
            loc: ``(d,)`` mean of the data.
            expected: ``(d,)`` diagonal of the scale matrix that the hyperprior expects.
        """
        return replace(
            self,
            loc=loc if self.loc is None else self.loc,
            df=len(loc) + 2.0 if self.df is None else self.df,
            rate=self.shape / expected if self.rate is None else self.rate,
        )

    @property
    def numbers(self) -> HyperNumbers:
        """Its numbers, once all are there.

        Raises:
            ValueError: Some are left to the data, which are not known yet.
        """
        if self.loc is None or self.df is None or self.rate is None:
            raise ValueError(
                "HierarchicalNormalInverseWishart: loc, df and rate are left to the data, and no "
                "data are known here: give them, or bind a model with this prior to data."
            )
        return HyperNumbers(self.loc, self.mean_precision, self.df, self.shape, self.rate)

    def __post_init__(self) -> None:
        name = "HierarchicalNormalInverseWishart"
        _check_positive(name, mean_precision=self.mean_precision, shape=self.shape)
        given = [part for part in (self.loc, self.rate) if part is not None]
        positive = self.rate is None or bool((self.rate > 0).all())
        if any(part.ndim != 1 or part.shape != given[0].shape for part in given) or not positive:
            shapes = ["None" if p is None else tuple(p.shape) for p in (self.loc, self.rate)]
            raise ValueError(
                f"{name}: loc has shape {shapes[0]} and rate {shapes[1]}; both must be (d,), and "
                "every rate positive."
            )
        d = len(given[0]) if given else 0
        if self.df is not None and not self.df > d - 1:
            raise ValueError(f"{name}: df={self.df}, but it must exceed d - 1 = {d - 1}.")


Prior = (
    Distribution
    | Callable[[], Distribution]
    | SymmetricDirichlet
    | GammaDirichlet
    | StickBreaking
    | HierarchicalNormalInverseWishart
)
"""Anything that may stand behind a site name in ``priors={...}``."""


def check_prior(
    site: str,
    prior: object,
    *,
    support: constraints.Constraint | None = None,
    event_shape: tuple[int, ...] | None = None,
    allowed: tuple[type, ...] = (),
) -> None:
    """Check a prior against the site it is for.

    Args:
        site: The site's name, for the message.
        prior: What the user gave.
        support: Support of the site; a distribution's own must lie inside it.
        event_shape: Event shape that a distribution must have after broadcasting its batch shape.
        allowed: Description classes of this module that the site understands.

    Raises:
        TypeError: Neither a distribution, nor a callable, nor one of ``allowed``.
        ValueError: A distribution of another support or shape.
    """
    if isinstance(prior, allowed):
        return
    if not isinstance(prior, Distribution):
        if callable(prior) and not isinstance(prior, type):
            return
        names = ", ".join(c.__name__ for c in allowed)
        raise TypeError(
            f"prior of site '{site}': got {type(prior).__name__}, but a prior is a Pyro "
            "distribution, a "
            f"callable that returns one{', or one of ' + names if names else ''}."
        )
    if event_shape is not None:
        shape = tuple(prior.batch_shape + prior.event_shape)
        trailing = (
            shape[len(shape) - len(event_shape) :] if len(shape) >= len(event_shape) else None
        )
        if trailing != event_shape:
            raise ValueError(
                f"prior of site '{site}': {type(prior).__name__} has shape {shape}, but the site "
                "needs a "
                f"shape ending in {event_shape}. Use .expand({list(event_shape)}) or rebuild it."
            )
    if support is not None and not same_support(prior.support, support):
        raise ValueError(
            f"prior of site '{site}': {type(prior).__name__} has support {prior.support}, but the "
            "site "
            f"needs {support}."
        )


def same_support(given: Any, wanted: Any) -> bool:
    """Whether every value that a prior can take is one that its site can take."""
    given, wanted = _plain(given), _plain(wanted)
    if given.is_discrete != wanted.is_discrete:
        return False
    inner, outer = _bounds(given), _bounds(wanted)
    if outer is None or given.is_discrete:
        return type(given) is type(wanted)
    if inner is None:  # vectors under a constraint of their own are real vectors
        return wanted is constraints.real
    # Narrower is fine, and so is the end point that Gamma includes and LogNormal does not.
    low = torch.as_tensor(inner[0]).min() >= torch.as_tensor(outer[0]).max()
    return bool(low and torch.as_tensor(inner[1]).max() <= torch.as_tensor(outer[1]).min())


def _plain(support: Any) -> Any:
    """A constraint of single entries; that of a mixture is of its components."""
    wrapped = constraints.independent | constraints.MixtureSameFamilyConstraint
    while isinstance(support, wrapped):
        support = support.base_constraint
    return support


def _bounds(support: Any) -> tuple[Any, Any] | None:
    """Ends of an interval; None of what is no interval."""
    if support is constraints.real:
        return -torch.inf, torch.inf
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None and high is None:
        return None
    return (-torch.inf if low is None else low), (torch.inf if high is None else high)


def describe(prior: object) -> str:
    """A prior in one line, for summaries: its name and its arguments, long tensors by shape."""
    if isinstance(prior, Independent):
        return f"{describe(prior.base_dist)}.to_event({prior.reinterpreted_batch_ndims})"
    if isinstance(prior, Distribution):
        arguments: Mapping[str, Any] = _arguments(prior)
    elif isinstance(
        prior,
        SymmetricDirichlet | GammaDirichlet | StickBreaking | HierarchicalNormalInverseWishart,
    ):
        arguments = {f.name: getattr(prior, f.name) for f in fields(prior)}
    else:
        return f"callable {getattr(prior, '__qualname__', type(prior).__name__)}"
    shown = ", ".join(f"{k}={_short(v)}" for k, v in arguments.items() if v is not None)
    return f"{type(prior).__name__}({shown})"


def _arguments(prior: Distribution) -> dict[str, Any]:
    """The tensors that a distribution was built from, by argument."""
    names = sorted(prior.arg_constraints)
    # Of alternative arguments (covariance, precision, root) the given one is kept as an attribute;
    # a Beta keeps none, but derives them.
    kept = [name for name in names if name in vars(prior)] or names
    return {name: getattr(prior, name) for name in kept}


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            return f"{float(value.flatten()[0]):.4g} x {tuple(value.shape)}"
        if value.numel() > 4:
            return f"tensor{tuple(value.shape)}"
        return "[" + ", ".join(f"{v:.4g}" for v in value.flatten().tolist()) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Unsaved:
    """Stands for a prior that a file cannot hold, such as a callable."""

    description: str

    def __call__(self) -> Distribution:
        raise TypeError(
            f"the prior '{self.description}' was a Python object that is not saved with a fit. "
            "Scores, draws "
            "and summaries need none; to fit again, build the model with its priors anew."
        )


_DESCRIPTIONS = (
    SymmetricDirichlet,
    GammaDirichlet,
    StickBreaking,
    HierarchicalNormalInverseWishart,
)


def prior_to_config(prior: object) -> dict[str, Any]:
    """A prior as JSON values and tensors; a callable is kept by its description alone."""
    if isinstance(prior, _DESCRIPTIONS):
        arguments = {f.name: getattr(prior, f.name) for f in fields(prior)}
        return {"prior": type(prior).__name__, "arguments": arguments}
    if isinstance(prior, Independent):
        base = prior_to_config(prior.base_dist)
        return {"base": base, "to_event": prior.reinterpreted_batch_ndims}
    if isinstance(prior, Distribution) and _distribution_class(type(prior).__name__) is type(
        prior
    ):
        given = {name: value.clone() for name, value in _arguments(prior).items()}
        return {"distribution": type(prior).__name__, "arguments": given}
    return {"unsaved": describe(prior)}


def prior_from_config(config: Mapping[str, Any]) -> Any:
    """The inverse of :func:`prior_to_config`; looks up names of known priors only."""
    if "prior" in config:
        known = {c.__name__: c for c in _DESCRIPTIONS}
        if config["prior"] not in known:
            raise ValueError(f"prior {config['prior']!r} is not known; known are {sorted(known)}.")
        return known[config["prior"]](**config["arguments"])
    if "base" in config:
        base = prior_from_config(config["base"])
        return base if isinstance(base, Unsaved) else base.to_event(config["to_event"])
    if "distribution" in config:
        found = _distribution_class(config["distribution"])
        if found is None:
            raise ValueError(
                f"distribution {config['distribution']!r} is not one of Pyro's or bayesgen's."
            )
        return found(**config["arguments"])
    return Unsaved(config["unsaved"])


def _distribution_class(name: str) -> type[Distribution] | None:
    import pyro.distributions

    import bayesgen.distributions

    for home in (bayesgen.distributions, pyro.distributions):
        found = getattr(home, name, None)
        if isinstance(found, type) and issubclass(found, Distribution):
            return found
    return None


_ELSEWHERE = {
    "explore": "bayesgen.prior_design",
    "solve_concentration": "bayesgen.prior_design",
    "with_priors": "bayesgen.prior_replacement",
}


def __getattr__(name: str) -> Any:
    """Import on first use what itself imports this module."""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'bayesgen.priors' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ELSEWHERE[name]), name)
    return value
