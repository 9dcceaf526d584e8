r"""What families share whose columns are independent within a component.

Within component :math:`k` the log density of a row is a sum over its observed columns,

.. math::
    \log p(x \mid k) = \sum_{j\ \text{observed}} \bigl(c_{kj} + \eta_{kj}^\top t(x_j)\bigr) + h(x),

so a batch under all components is one product of features ``(F, n)`` with natural parameters
``(K, F)``, and its statistics are the transposed product. The features of a row are a head (one,
and the base measure where there is one), the mask of its observed columns, and the masked
:math:`t(x_j)`. A missing entry simply drops out. A batch without holes leaves out the mask.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from bayesgen.models.families.base import Evaluation, Family
from bayesgen.priors import check_prior

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors
    from bayesgen.data import Dataset

__all__ = [
    "Batch",
    "Entries",
    "Factorised",
    "Layout",
    "OneSite",
    "by_component",
    "check_entries",
    "column_prior",
    "mean_and_covariance",
    "one_prior",
    "per_row",
    "sample_site",
    "stack_features",
]


class Layout(NamedTuple):
    """How the features of a family are stacked: ``head`` rows, ``masks`` rows, and the others."""

    head: int
    masks: int

    @property
    def start(self) -> int:
        """Where the features after the mask begin."""
        return self.head + self.masks


class Batch(NamedTuple):
    """Features of a batch of rows."""

    features: Tensor
    """``(F, n)``, or without its ``masks`` rows where the batch is complete."""
    complete: bool
    """Whether no entry is missing."""


def stack_features(
    x: Tensor,
    *functions: Callable[[Tensor], Tensor],
    base: Callable[[Tensor], Tensor] | None = None,
) -> Batch:
    """Features of ``(n, d)``: one, base measure, mask, and functions of the columns ``(d, n)``.

    Args:
        x: Rows, ``NaN`` for missing entries.
        functions: Elementwise functions of the columns; they count as zero where one is missing.
        base: Elementwise log base measure, summed over the columns of a row.
    """
    columns = x.T.contiguous()
    hole = torch.isnan(columns)
    complete = not bool(hole.any())
    filled = columns if complete else columns.masked_fill(hole, 0.0)
    parts = [torch.ones_like(columns[:1])]
    for term in () if base is None else (base,):
        value = term(filled)
        parts.append((value if complete else value.masked_fill(hole, 0.0)).sum(0, keepdim=True))
    if not complete:
        parts.append((~hole).to(columns.dtype))
    for function in functions:
        value = function(filled)
        parts.append(value if complete else value.masked_fill(hole, 0.0))
    return Batch(torch.cat(parts), complete)


def _fold(natural: Tensor, layout: Layout) -> Tensor:
    """Natural parameters for a complete batch: every column's constant goes to the leading one."""
    constant = natural[..., :1] + natural[..., layout.head : layout.start].sum(-1, keepdim=True)
    return torch.cat(
        [constant, natural[..., 1 : layout.head], natural[..., layout.start :]], dim=-1
    )


def _unfold(moments: Tensor, layout: Layout) -> Tensor:
    """Moments of a complete batch with the mask's put back: each is the number of rows."""
    observed = moments[..., :1].expand(*moments.shape[:-1], layout.masks)
    return torch.cat([moments[..., : layout.head], observed, moments[..., layout.head :]], dim=-1)


# ------------------------------------------------------------ priors, checks
def one_prior(priors: Mapping[str, Any], site: str, default: Any) -> Any:
    """The prior given under ``"components"`` or under the site's own name, else the default."""
    if "components" in priors and site in priors:
        raise ValueError(
            f"priors has both 'components' and {site!r}, which are the same: drop one."
        )
    return priors.get("components", priors.get(site, default))


def column_prior(
    site: str,
    prior: Any,
    shape: tuple[int, ...],
    *,
    support: constraints.Constraint | None = None,
    allowed: tuple[type, ...] = (),
) -> Any:
    """Check a prior for a site of this event shape; a prior of one number serves every column.

    Returns:
        The prior, expanded to the shape, and without ``to_event``, which means nothing here.
    """
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if isinstance(prior, Distribution) and not prior.batch_shape:
        given = len(prior.event_shape)
        if prior.event_shape == torch.Size(shape[len(shape) - given :]):
            prior = prior.expand(torch.Size(shape[: len(shape) - given]))
    check_prior(site, prior, support=support, event_shape=shape, allowed=allowed)
    return prior


def sample_site(site: str, prior: Any, event_dim: int, plate: Any) -> Tensor:
    """Sample a site in the plate, from a distribution or from what a callable returns."""
    law: TorchDistribution = prior if isinstance(prior, Distribution) else prior()
    missing = event_dim - len(law.event_shape)
    with plate:
        value: Tensor = pyro.sample(site, law.to_event(missing) if missing > 0 else law)
    return value


class Entries(NamedTuple):
    """What a family can hold, for its checks and their messages."""

    family: str
    wanted: tuple[str, ...]
    """What is allowed, in words: once, or for each column."""
    fix: str
    bad: Callable[[Tensor], Tensor]
    """Which entries of ``(n, d)`` are not allowed; missing ones always are."""


def check_entries(x: Tensor, columns: tuple[str, ...], entries: Entries) -> None:
    """Refuse rows ``(n, d)`` with an entry that the family cannot hold, naming its column."""
    family, wanted, fix, bad = entries
    if x.shape[1] != len(columns):
        raise ValueError(
            f"{family}: the rows have {x.shape[1]} columns, but the model {len(columns)}: "
            f"{', '.join(columns[:8])}."
        )
    wrong = bad(x) & ~torch.isnan(x)
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{family}: column {columns[column]!r} holds {float(x[row, column]):g}, but it must "
            f"hold {wanted[column % len(wanted)]}, or NaN for a missing value. {fix}"
        )


# ------------------------------------------------------------ small tools
def by_component(values: Tensors, site: str, labels: Tensor) -> Tensor:
    """The site's value of the component that each of ``m`` draws chose: ``(m, *event)``."""
    return values[site][torch.arange(len(labels), device=labels.device), labels]


def per_row(value: Tensor, num_rows: int, event_dim: int = 1) -> Tensor:
    """``(..., K, *event)`` repeated for each row without a copy: ``(..., n, K, *event)``."""
    cut = value.ndim - event_dim - 1
    return value.unsqueeze(cut).expand(*value.shape[:cut], num_rows, *value.shape[cut:])


def mean_and_covariance(weights: Tensor, loc: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Mean and covariance of a mixture, from means and variances ``(..., K, d)`` by component."""
    mean = (weights.unsqueeze(-1) * loc).sum(-2)
    delta = loc - mean.unsqueeze(-2)
    between = torch.einsum("...k,...ki,...kj->...ij", weights, delta, delta)
    within = (weights.unsqueeze(-1) * inside).sum(-2)
    return {"mean": mean, "covariance": between + torch.diag_embed(within)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Factorised(Family):
    """Base of the families with independent columns; one product scores, its transpose counts."""

    num_components: int = 0
    columns: tuple[str, ...] = ()
    given: Mapping[str, Any] | None = None

    @property
    @abstractmethod
    def _layout(self) -> Layout:
        """How :meth:`observe` stacks its features."""

    @abstractmethod
    def _natural(self, values: Tensors) -> Tensor:
        """Natural parameters ``(..., K, F)`` at fixed values of the sites, in the data's units."""

    @property
    def _d(self) -> int:
        if not self.columns:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return len(self.columns)

    def describe(self) -> str:
        return f"{type(self).__name__}, columns independent given the component"

    def coords(self) -> dict[str, list[Any]]:
        return {"column": list(self.columns), "column_2": list(self.columns)}

    # ------------------------------------------------------------ data -> scores -> statistics
    def _product(self, observed: Batch, natural: Tensor) -> Tensor:
        folded = _fold(natural, self._layout) if observed.complete else natural
        return folded.to(observed.features.dtype) @ observed.features

    def collapsed(self, values: Tensors) -> Tensor:
        first = next(iter(values.values()))
        return torch.zeros(first.shape[:-2], dtype=torch.bool, device=first.device)

    def collapsible(self, observed: Batch) -> bool:
        return True

    def evaluate(self, observed: Batch, message: Tensors) -> Evaluation:
        return Evaluation(self._product(observed, message["natural"]))

    def statistics(
        self,
        observed: Batch,
        responsibilities: Tensor,
        evaluation: Evaluation | None,
        message: Tensors | None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        moments = (responsibilities @ observed.features.T).double()
        return {"moments": _unfold(moments, self._layout) if observed.complete else moments}

    def inner(self, message: Tensors, statistics: Tensors) -> Tensor:
        return (message["natural"] * statistics["moments"]).sum((-2, -1))

    def rows(self, statistics: Tensors) -> Tensor:
        return statistics["moments"][..., 0]

    def log_prob(self, x: Tensor, values: Tensors) -> Tensor:
        return self._product(self.observe(x), self._natural(values))


@dataclass(frozen=True, eq=False, kw_only=True)
class OneSite(Factorised):
    """Base of the families with one number a component and column, under independent priors."""

    centre: Tensor | None = None
    """``(d,)`` means of the columns, smoothed by half a count."""
    scale: Tensor | None = None
    """``(d,)`` standard deviations of the columns."""

    @property
    @abstractmethod
    def _site(self) -> str:
        """The public name of the site."""

    @property
    @abstractmethod
    def _support(self) -> constraints.Constraint:
        """Its support."""

    @property
    @abstractmethod
    def _entries(self) -> Entries:
        """What the columns may hold."""

    @property
    @abstractmethod
    def _default(self) -> Distribution:
        """The default prior."""

    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        for block in data.batches(1 << 16):
            check_entries(block, data.columns, self._entries)
        summary = data.summary()
        count = summary.count.double()
        centre = (summary.mean.double().nan_to_num() * count + 0.5) / (count + 1.0)
        scale = summary.variance.double().sqrt().nan_to_num(nan=1.0)
        return replace(
            self,
            num_components=num_components,
            columns=data.columns,
            centre=centre,
            scale=scale,
            given=self._checked(priors, len(centre)),
        )

    def _checked(self, priors: Mapping[str, Any], d: int) -> dict[str, Any]:
        given, prior = dict(priors), one_prior(priors, self._site, None)
        if prior is not None:
            key = "components" if "components" in given else self._site
            given[key] = column_prior(key, prior, (d,), support=self._support)
        return given

    @property
    def _mean(self) -> Tensor:
        if self.centre is None:
            raise ValueError("the model is not bound to data yet: call bind(as_dataset(x)) first.")
        return self.centre

    @property
    def _prior(self) -> Any:
        return one_prior(self.priors, self._site, None)

    @property
    def prior_sites(self) -> tuple[str, ...]:
        return ("components", self._site)

    @property
    def priors(self) -> dict[str, Any]:
        return dict(self.given) if self.given else {"components": self._default}

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {self._site: ("component", "column")}

    def to_config(self) -> dict[str, Any]:
        return {
            "num_components": self.num_components,
            "columns": list(self.columns),
            "centre": self.centre,
            "scale": self.scale,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        family = cls(**{**config, "columns": tuple(config["columns"])})
        return replace(family, given=family._checked(priors, len(family.columns)))

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def to(self, device: torch.device) -> Self:
        assert self.scale is not None
        return replace(self, centre=self._mean.to(device), scale=self.scale.to(device))

    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        return {self._site: sample_site(prefix + self._site, self._prior, 1, plate)}
