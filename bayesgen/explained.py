"""How much of the variance the latents explain, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ExplainedVariance"]


@dataclass(frozen=True, eq=False, repr=False)
class ExplainedVariance:
    r"""Variance of the signal along its principal directions, in every posterior draw.

    .. math:: \mathrm{Cov}(x) = W W^\top + \Psi, \qquad
        \text{ratio}_k = \lambda_k(W W^\top) / \operatorname{tr} \mathrm{Cov}(x)

    Noise is not counted as explained: an eigenvalue of scikit-learn's ``PCA.explained_variance_``
    is :math:`\lambda_k + \sigma^2`.

    Args:
        variance: ``(chain, draw, q)``, decreasing within each draw, in squared units of the data.
        noise: ``(chain, draw)``, summed over the columns.

    Example:
        >>> explained = ExplainedVariance(torch.tensor([[[6.0, 2.0]]]), torch.tensor([[2.0]]))
        >>> explained.ratio
        tensor([[[0.6000, 0.2000]]])
        >>> explained.table()[["ratio", "cumulative"]].round(2).values.tolist()
        [[0.6, 0.6], [0.2, 0.8]]
    """

    variance: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """Total variance of all columns, ``(chain, draw)``."""
        return self.variance.sum(-1) + self.noise

    @property
    def ratio(self) -> Tensor:
        """Share of the total variance, ``(chain, draw, q)``."""
        return self.variance / self.total.unsqueeze(-1)

    @property
    def cumulative(self) -> Tensor:
        """Share of the first directions together, ``(chain, draw, q)``."""
        return self.ratio.cumsum(-1)

    def table(self, mass: float = 0.9) -> pd.DataFrame:
        """Posterior means and central intervals of probability ``mass``, a row a direction."""
        import pandas as pd

        if not 0.0 < mass < 1.0:
            raise ValueError(f"mass={mass}, but it must lie between 0 and 1.")
        columns = {}
        for name in ("variance", "ratio", "cumulative"):
            value: Tensor = getattr(self, name).flatten(0, 1).double().cpu()
            ends = torch.tensor([(1.0 - mass) / 2.0, (1.0 + mass) / 2.0], dtype=torch.float64)
            low, high = torch.quantile(value, ends, dim=0)
            columns[name] = value.mean(0).numpy()
            columns[f"{name}_low"], columns[f"{name}_high"] = low.numpy(), high.numpy()
        return pd.DataFrame(columns, index=pd.RangeIndex(self.variance.shape[-1], name="latent"))

    def __str__(self) -> str:
        share = self.cumulative[..., -1].double().mean()
        head = f"{self.variance.shape[-1]} latent directions explain {float(share):.1%}"
        lines = [
            f"{head} of the variance",
            "latent  variance  90% interval         share  together",
        ]
        for k, row in self.table().iterrows():
            interval = f"[{row['variance_low']:.4g}, {row['variance_high']:.4g}]"
            shares = f"{row['ratio']:>6.1%}  {row['cumulative']:>8.1%}"
            lines.append(f"{k:<8}{row['variance']:<10.4g}{interval:<20}{shares}")
        return "\n".join(lines)

    __repr__ = __str__
