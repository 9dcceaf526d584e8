"""The contract of a component family: what one component of a mixture looks like.

A family is an exponential family (or a scale mixture of one) with a conjugate prior. Its log
density is a product of features of the data with natural parameters, and its statistics are the
transpose of that product; so one pass of any engine is two matrix products.

Shapes: ``(...)`` are leading batch dimensions (chains, starts, draws), ``K`` components, ``n``
rows. Components come before rows, because rows are contiguous in memory then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributions import Distribution

    from bayesgen.capabilities import Tensors
    from bayesgen.conjugate import MarginalBlock
    from bayesgen.data import Dataset

__all__ = ["Evaluation", "Family", "refuse_categories"]


def refuse_categories(data: Dataset, family: str) -> None:
    """Refuse columns of categories: their codes are names, and distances between them say nothing.

    Raises:
        ValueError: A column is a category; it is named.
    """
    named = [c for c, kind in zip(data.columns, data.kinds, strict=True) if kind == "category"]
    if named:
        raise ValueError(
            f"{family} needs numbers, but column {named[0]!r} holds categories. Leave it out with "
            "columns=[...], or take Mixture(Product(), num_components), which gives each kind of "
            "column its own family."
        )


class Evaluation(NamedTuple):
    """A batch under each component."""

    scores: Tensor
    """``(..., K, n)`` log density, or its expectation, local scales integrated out."""
    distances: Tensor | None = None
    """``(..., K, n)`` squared distances, where the family's local latents need them."""
    parts: tuple[Evaluation, ...] = ()
    """Evaluations of the families that a product is made of."""


class Family(ABC):
    """One kind of component; immutable, bound to data by :meth:`bind`."""

    # ------------------------------------------------------------ description
    @abstractmethod
    def bind(self, data: Dataset, num_components: int, priors: Mapping[str, Any]) -> Self:
        """A copy for these columns, with ``priors`` checked and defaults scaled to the data."""

    @abstractmethod
    def describe(self) -> str:
        """The family in a few words, such as ``"Gaussian, full covariance"``."""

    @property
    @abstractmethod
    def block(self) -> MarginalBlock:
        """The conjugate block; ``TypeError`` when a prior was given that is not conjugate."""

    @property
    @abstractmethod
    def prior_sites(self) -> tuple[str, ...]:
        """Keys that this family understands in ``priors={...}``."""

    @property
    @abstractmethod
    def priors(self) -> Mapping[str, Any]:
        """The priors in force, by key, for summaries."""

    @property
    @abstractmethod
    def dims(self) -> Mapping[str, tuple[str, ...]]:
        """Event dimensions of each site, ``"component"`` first unless all share it."""

    @property
    @abstractmethod
    def row_size(self) -> int:
        """Numbers that :meth:`observe` keeps for each row."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The bound family as JSON values and tensors."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], priors: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_config`; ``priors`` as they were given to :meth:`bind`."""

    @abstractmethod
    def coords(self) -> dict[str, list[Any]]:
        """Labels along the dimensions that the family names, components excepted."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the bound family's tensors live."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """A copy on another device."""

    @abstractmethod
    def invariants(self, weights: Tensor, values: Tensors) -> dict[str, Tensor]:
        """Quantities that do not depend on labels, such as the mixture's mean ``(..., d)``."""

    @property
    def invariant_dims(self) -> dict[str, tuple[str, ...]]:
        """Event dimensions of :meth:`invariants`."""
        return {"mean": ("column",), "covariance": ("column", "column_2")}

    # ------------------------------------------------------------ data -> scores -> statistics
    @abstractmethod
    def observe(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Any:
        """Features in ``dtype`` of a float64 batch ``(n, d)``, ``NaN`` for missing entries."""

    @abstractmethod
    def collapsed(self, values: Tensors) -> Tensor:
        """``(...)`` whether some component of the block's values sits on a point."""

    @abstractmethod
    def collapsible(self, observed: Any) -> bool:
        """Whether responsibilities alone determine the statistics of a batch."""

    def ready(self, message: Tensors, dtype: torch.dtype) -> Tensors:
        """The message with what every batch of a pass would work out from it again."""
        return message

    @abstractmethod
    def evaluate(self, observed: Any, message: Tensors) -> Evaluation:
        """Scores of a batch under a message of the block; the caller may overwrite them."""

    @abstractmethod
    def statistics(
        self,
        observed: Any,
        responsibilities: Tensor,
        evaluation: Evaluation | None,
        message: Tensors | None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Additive statistics ``(..., K, *shape)`` given responsibilities ``(..., K, n)``.

        ``evaluation=message=None`` asks for starting statistics from responsibilities alone; with
        ``generator`` local latents (missing entries, scales) are drawn instead of averaged.
        """

    @abstractmethod
    def inner(self, message: Tensors, statistics: Tensors) -> Tensor:
        """Expected complete-data log density that the statistics carry, summed: ``(...)``."""

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """Rows as complete points ``(n, e)`` on one scale, for k-means++ starts and splits."""

    # ------------------------------------------------------------ densities and draws, data's
    # units
    @abstractmethod
    def log_prob(self, x: Tensor, values: Tensors) -> Tensor:
        """Log density of rows under each component: ``(..., K, n)``."""

    @abstractmethod
    def log_predictive(self, x: Tensor, posterior: Tensors) -> Tensor | None:
        """Exact log predictive density under each component ``(K, n)``, or None."""

    @abstractmethod
    def conditional(self, x: Tensor, observed: Tensor, values: Tensors) -> Distribution:
        """Missing columns given observed ones: batch ``(..., n, K)``, event ``(m,)``."""

    @abstractmethod
    def draw(self, values: Tensors, labels: Tensor, *, generator: torch.Generator) -> Tensor:
        """One row ``(m, d)`` for each of ``m`` draws of the sites and labels ``(m,)``."""

    @abstractmethod
    def program(self, plate: Any, prefix: str = "") -> dict[str, Tensor]:
        """Pyro statements that sample the sites of all components, in the data's units.

        Args:
            plate: The plate of the components, ``dim=-1``.
            prefix: Put before the names of the Pyro sites; the returned names are without it.
        """

    @abstractmethod
    def export(self, values: Tensors) -> dict[str, Tensor]:
        """The block's sites in the data's own units, under their public names."""

    @abstractmethod
    def rows(self, statistics: Tensors) -> Tensor:
        """``(..., K)`` number of rows in the statistics."""
