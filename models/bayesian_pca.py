"""Bayesian PCA: the data choose how many directions live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bayesgen.models.linear.base import LinearModel

__all__ = ["BayesianPCA"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class BayesianPCA(LinearModel):
    r"""Bayesian principal component analysis: most of its directions are switched off.

    .. math::
        \alpha_k \sim p(\alpha), \quad
        w_{jk} \mid \alpha_k \sim \mathrm{N}(0, 1/\alpha_k), \quad
        \mu \sim p(\mu), \quad \sigma \sim p(\sigma), \quad
        x_i \sim \mathrm{N}(\mu, W W^\top + \sigma^2 I_d)

    ``latent_dim`` is an upper bound. All loadings of a direction share the precision
    :math:`\alpha_k`; where the data give it no signal, :math:`\alpha_k` grows and the column
    shrinks to nothing (automatic relevance determination). The posterior of the number of live
    directions is the invariant ``num_live``: how many eigenvalues of :math:`W W^\top / \sigma^2`
    exceed :math:`\sqrt{d/n}`, below which no signal shows among ``n`` rows of noise.

    The default prior of the precisions is ``Gamma(1, 0.0003 s^2)``, with ``s^2`` the mean variance
    of the columns. With it the loadings of a direction are Student-t with two degrees of freedom
    and a scale of 2 % of the data's: a direction is off unless the data switch it on, and then its
    size is free. A :class:`~bayesgen.distributions.HorseshoePrecision` switches on more readily.
    Mean and noise have the priors of :class:`~bayesgen.models.PPCA`.

    VB climbs on sums of the rows: when nothing is missing an iteration costs no pass over the
    data. It takes loadings, noise and latents for independent, so its intervals are too narrow,
    and it switches every direction without clear evidence off for good. Gibbs does not: after
    warmup a surplus direction still picks up some noise in some of its draws. EM ends in the joint
    mode of loadings and precisions, whose density rewards each dead column: it keeps too few.

    Loadings are identified up to rotation by the likelihood, and the prior breaks that tie only
    faintly: draws are aligned as those of :class:`~bayesgen.models.PPCA`, and precisions, which no
    rotation can carry along, are reported in increasing order.

    References:
        Bishop (1999). Bayesian PCA. NIPS 11. Bishop (1999). Variational principal components.
        ICANN. Baik, Ben Arous & Péché (2005). Phase transition of the largest eigenvalue for
        nonnull complex sample covariance matrices.

    Args:
        latent_dim: Upper bound of the number of directions, below the number of columns.
        priors: By site: ``"precision"`` ``(q,)``, ``"loc"`` ``(d,)``, ``"noise_scale"`` ``()``. VB
            and Gibbs need a ``Gamma`` or
            :class:`~bayesgen.distributions.HorseshoePrecision`, a ``Normal`` and a
            :class:`~bayesgen.distributions.RootInverseGamma`.

    Raises:
        ValueError: ``latent_dim`` below 1 or not below the number of columns; an unknown site, or
            a prior that does not fit.

    Example:
        >>> from bayesgen import datasets
        >>> from bayesgen.inference import VB
        >>> from bayesgen.models import BayesianPCA
        >>> fit = VB().run(BayesianPCA(3), datasets.load("iris"), seed=0)
        >>> fit.explained_variance().table()["ratio"].round(2).tolist()
        [0.92, 0.05, 0.01]
    """

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def is_learned(self) -> bool:
        return True
