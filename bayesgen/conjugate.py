"""Conjugacy as data: one block serves EM, variational Bayes and Gibbs.

A :class:`Block` holds a prior. Given additive sufficient statistics it returns the conjugate
posterior, and from that posterior the mode (EM), a draw (Gibbs) or expectations (variational
Bayes). A prior whose hyperparameters are themselves random stays conjugate *given* them; the block
then also updates its hyperparameters, so that the engines need not know.

Every tensor may carry leading batch dimensions ``(...)``: chains of Gibbs, starts of EM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["Block", "Condensable", "Condensed", "Local", "MarginalBlock", "add_statistics"]


class Local(NamedTuple):
    """What the local step of a conjugate model returns for one batch."""

    statistics: Mapping[str, Tensors]
    """Additive sufficient statistics, by block and name, each ``(..., *shape)``."""
    bound: Tensor
    """``(...)`` sum over the batch of the log normaliser of the local latents, in nats: the exact
    log likelihood when the message is a point, the local part of the ELBO when an expectation."""
    latents: Tensors
    """Local latents, ``responsibilities (..., K, b)`` or ``labels (..., b)`` among them."""


class Condensed(Protocol):
    """What is kept of a batch between passes when its features are too large to keep."""

    def expanded(self) -> Any:
        """The batch again, to the bit."""


@runtime_checkable
class Condensable(Protocol):
    """A batch, as :meth:`Conjugate.observe` made it, that can be kept in the room of its rows."""

    def condensed(self) -> Condensed:
        """What its features can be made of again, without the float64 rows and their centring."""


class Block(ABC):
    """One conjugate block: a prior over some parameters with its hyperparameters."""

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """Names of the parameters in the dicts that this block returns."""

    # ------------------------------------------------------------ variational Bayes
    @abstractmethod
    def update(self, statistics: Tensors, previous: Tensors | None = None) -> Tensors:
        """Variational posterior by its parameters; ``previous`` holds the hyperparameters'.

        Without statistics' mass this is the prior. One call is one pass of coordinate ascent.
        """

    @abstractmethod
    def message(self, posterior: Tensors) -> Tensors:
        """Expected natural parameters under the posterior: what the local step reads."""

    @abstractmethod
    def kl(self, posterior: Tensors) -> Tensor:
        """``KL(posterior || prior)`` in nats, ``(...)``, hyperparameters included."""

    @abstractmethod
    def sample(
        self, posterior: Tensors, num_samples: int, *, generator: torch.Generator
    ) -> Tensors:
        """Draws ``(num_samples, ..., *event)`` of the sites from the variational posterior."""

    # ------------------------------------------------------------ EM
    @abstractmethod
    def maximise(
        self, statistics: Tensors, previous: Tensors | None = None, *, flat: bool = False
    ) -> Tensors:
        """The sites at the posterior's mode; with ``flat`` at the likelihood's maximum."""

    @abstractmethod
    def log_prior(self, values: Tensors) -> Tensor:
        """Log prior density of the sites' values, ``(...)``, summed over components."""

    # ------------------------------------------------------------ Gibbs
    @abstractmethod
    def draw(
        self, statistics: Tensors, previous: Tensors | None, *, generator: torch.Generator
    ) -> Tensors:
        """A draw of the sites given the statistics and the ``previous`` hyperparameters.

        ``previous=None`` draws the hyperparameters from their prior first.
        """

    @abstractmethod
    def natural(self, values: Tensors) -> Tensors:
        """The message for the local step at fixed values of the sites (EM and Gibbs)."""


class MarginalBlock(Block):
    """A block whose parameters integrate out in closed form: what moves between models compare."""

    @abstractmethod
    def log_evidence(self, statistics: Tensors, values: Tensors) -> Tensor:
        """Log marginal likelihood of the statistics given the hyperparameters in ``values``.

        Parameters are integrated out; per component where the block factorises over components,
        ``(..., K)``, else ``(...)``. Split-merge moves compare these.
        """


def add_statistics(
    left: Mapping[str, Tensors] | None, right: Mapping[str, Tensors]
) -> dict[str, dict[str, Tensor]]:
    """Sum two sets of statistics; ``left=None`` counts as zero. The default reducer."""
    if left is None:
        return {block: dict(values) for block, values in right.items()}
    return {
        block: {name: left[block][name] + value for name, value in values.items()}
        for block, values in right.items()
    }
