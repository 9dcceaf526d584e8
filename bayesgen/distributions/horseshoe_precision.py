"""The horseshoe's law of a precision."""

from __future__ import annotations

import math
from typing import Self

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from bayesgen.distributions._linalg import sample_gamma

__all__ = ["HorseshoePrecision"]


class HorseshoePrecision(TorchDistribution):
    r"""A precision whose inverse root is half-Cauchy: effects near zero, and some far from it.

    .. math::
        \alpha^{-1/2} \sim \mathrm{HalfCauchy}(A), \qquad
        p(\alpha) = \frac{1}{\pi A \sqrt{\alpha}\,(\alpha + A^{-2})}.

    As a Gamma whose rate is Gamma again, :math:`\alpha \mid r \sim \mathrm{Gamma}(1/2, r)`,
    :math:`r \sim \mathrm{Gamma}(1/2, A^{-2})`, it stays conjugate for the precision of a normal.

    References:
        Carvalho, Polson & Scott (2010). The horseshoe estimator for sparse signals. Biometrika 97.
        Makalic & Schmidt (2016). A simple sampler for the horseshoe estimator.

    Args:
        scale: :math:`A > 0`, the scale at which an effect counts as large, ``(...)``.
        validate_args: Whether to check arguments and values; PyTorch's default when None.

    Example:
        >>> HorseshoePrecision(torch.tensor(1.0)).log_prob(torch.tensor(1.0)).exp() * math.pi
        tensor(0.5000)
    """

    arg_constraints = {"scale": constraints.positive}
    support = constraints.positive

    def __init__(self, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self.scale = torch.as_tensor(scale)
        super().__init__(self.scale.shape, validate_args=validate_args)

    def expand(self, batch_shape: Size, _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(HorseshoePrecision, _instance)
        batch = Size(batch_shape)
        new.scale = self.scale.expand(batch)
        super(HorseshoePrecision, new).__init__(batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_scale = self.scale.log()
        far = torch.nn.functional.softplus(value.log() + 2.0 * log_scale) - 2.0 * log_scale
        return -math.log(math.pi) - log_scale - 0.5 * value.log() - far

    def sample(
        self,
        sample_shape: Size | tuple[int, ...] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw ``(*sample_shape, *batch)``, from ``generator`` when one is given."""
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            half = torch.full(shape, 0.5, dtype=self.scale.dtype, device=self.scale.device)
            ratio = sample_gamma(half, generator) / sample_gamma(half, generator)
            return ratio / self.scale.square()
