"""The conjugate prior of a Gaussian's variance, as a law of its standard deviation."""

from __future__ import annotations

import math
from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from bayesgen.distributions._linalg import sample_gamma

__all__ = ["RootInverseGamma"]


class RootInverseGamma(TorchDistribution):
    r"""A scale whose square is inverse-gamma: conjugate for the noise of a Gaussian.

    .. math::
        \sigma^2 \sim \mathrm{InverseGamma}(a, b), \qquad
        p(\sigma) = \frac{2 b^a}{\Gamma(a)} \sigma^{-2a - 1} e^{-b / \sigma^2}.

    It is worth :math:`2a` observations whose mean square is :math:`b / a`.

    References:
        Gelman et al. (2013). Bayesian Data Analysis, section 2.6.

    Args:
        concentration: :math:`a > 0`, ``(...)``.
        rate: :math:`b > 0`, in squared units of the scale, ``(...)``.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Example:
        >>> RootInverseGamma(2.0, 3.0).log_prob(torch.tensor(1.0))
        tensor(-0.1096)
    """

    arg_constraints = {"concentration": constraints.positive, "rate": constraints.positive}
    support = constraints.positive
    has_rsample = True

    def __init__(
        self,
        concentration: Tensor | float,
        rate: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self.concentration, self.rate = broadcast_all(concentration, rate)
        super().__init__(self.rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(RootInverseGamma, _instance)
        batch = Size(batch_shape)
        new.concentration, new.rate = self.concentration.expand(batch), self.rate.expand(batch)
        super(RootInverseGamma, new).__init__(batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch)``, from ``generator`` when one is given."""
        shape = self._extended_shape(Size(sample_shape))
        return (self.rate / sample_gamma(self.concentration.expand(shape), generator)).sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a, b = self.concentration, self.rate
        constant = math.log(2.0) + a * b.log() - torch.lgamma(a)
        return constant - (2.0 * a + 1.0) * value.log() - b / value.square()
