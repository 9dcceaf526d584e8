"""Conformal p-values and control of the false discovery rate, as functions of scores alone.

A score says how much at home a row is: a log density, low when strange. Nothing here asks where it
came from, and no guarantee below needs the density to be right: a poor model costs power, never
validity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "benjamini_hochberg",
    "conformal_p_values",
    "count_below",
    "rows_needed",
    "together_needed",
]


def conformal_p_values(
    calibration_scores: Tensor, scores: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""P-values of new rows against scores of rows that the scoring density has never seen.

    .. math::
        p = \frac{1 + \#\{i : s_i \le s\}}{n + 1}

    When the new row and the calibration rows are exchangeable,
    :math:`\Pr(p \le \alpha) \le \alpha` exactly, whatever the density. With ``generator`` ties are
    broken at random, :math:`p = (\#\{s_i < s\} + U (1 + \#\{s_i = s\})) / (n + 1)`, which makes
    ``p`` exactly uniform and lets it fall below :math:`1 / (n + 1)`, at the price of an answer
    that depends on a coin.

    References:
        Vovk, Gammerman, Shafer (2005), Algorithmic learning in a random world.
        Bates, Candès, Lei, Romano, Sesia (2023), Testing for outliers with conformal p-values.

    Args:
        calibration_scores: ``(n,)``.
        scores: ``(m,)``.
        generator: Breaks ties at random when given.

    Returns:
        ``(m,)`` p-values in ``(0, 1]``, float64.

    Raises:
        ValueError: Without calibration scores, or when a score is NaN.

    Example:
        >>> usual = torch.tensor([-1.0, -2.0, -3.0])
        >>> conformal_p_values(usual, torch.tensor([-2.5, -9.0])).tolist()
        [0.5, 0.25]
    """
    if calibration_scores.numel() == 0:
        raise ValueError("there are no calibration scores: give at least one calibration row.")
    below, equal = count_below(calibration_scores, scores)
    total = calibration_scores.numel() + 1
    if generator is None:
        return (1.0 + below + equal) / total
    uniform = torch.rand(
        scores.shape, generator=generator, dtype=torch.float64, device=scores.device
    )
    return (below + (1.0 - uniform) * (1.0 + equal)) / total  # in (0, 1], never 0


def count_below(calibration_scores: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """How many calibration scores lie below each score, and how many equal it.

    Args:
        calibration_scores: ``(n,)``.
        scores: ``(m,)``.

    Returns:
        Two ``(m,)`` float64 tensors of counts.

    Raises:
        ValueError: When a score is NaN.
    """
    for name, values in (("calibration_scores", calibration_scores), ("scores", scores)):
        if values.ndim != 1 or bool(values.isnan().any()):
            raise ValueError(
                f"{name} must be a vector without NaN, got shape {tuple(values.shape)} with "
                f"{int(values.isnan().sum())} NaN: score the rows with Fit.log_prob, which "
                "integrates missing entries out."
            )
    ordered = calibration_scores.to(torch.float64).sort().values
    wanted = scores.to(torch.float64).contiguous()
    below = torch.searchsorted(ordered, wanted, right=False)
    upto = torch.searchsorted(ordered, wanted, right=True)
    return below.to(torch.float64), (upto - below).to(torch.float64)


def benjamini_hochberg(
    p_values: Tensor, fdr: float, *, dependence: str = "positive"
) -> tuple[Tensor, Tensor]:
    r"""Which hypotheses to reject so that on average a share ``fdr`` of them at most is true.

    With :math:`p_{(1)} \le \dots \le p_{(m)}`, reject the :math:`k` smallest for the largest
    :math:`k` with :math:`p_{(k)} \le k\,\text{fdr} / m`; the q-value
    :math:`q_{(k)} = \min_{j \ge k} m p_{(j)} / j` is the smallest rate at which a row is rejected.

    References:
        Benjamini, Hochberg (1995), Controlling the false discovery rate.
        Benjamini, Yekutieli (2001), The control of the false discovery rate under dependency.

    Args:
        p_values: ``(m,)`` in ``[0, 1]``.
        fdr: Wanted false discovery rate in ``(0, 1)``.
        dependence: ``"positive"`` holds for independent p-values and for split-conformal ones that
            share calibration rows; ``"arbitrary"`` holds always, and pays a factor of about
            ``log m``.

    Returns:
        ``(m,)`` booleans, and ``(m,)`` q-values.

    Raises:
        ValueError: A p-value outside ``[0, 1]``, or ``fdr`` outside ``(0, 1)``.

    Example:
        >>> rejected, q = benjamini_hochberg(torch.tensor([0.01, 0.9, 0.02, 0.5]), 0.05)
        >>> rejected.tolist(), [round(v, 2) for v in q.tolist()]
        ([True, False, True, False], [0.04, 0.9, 0.04, 0.67])
    """
    check_fdr(fdr)
    p = p_values.to(torch.float64)
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"p_values must be a vector within [0, 1], got {p_values}.")
    if dependence not in ("positive", "arbitrary"):
        raise ValueError(f"dependence must be 'positive' or 'arbitrary', got {dependence!r}.")
    m = len(p)
    ranks = torch.arange(1, m + 1, dtype=torch.float64, device=p.device)
    factor = float((1.0 / ranks).sum()) if dependence == "arbitrary" else 1.0
    ordered, order = p.sort()
    adjusted = (ordered * m * factor / ranks).flip(0).cummin(0).values.flip(0).clamp_max(1.0)
    q_values = torch.empty_like(p)
    q_values[order] = adjusted
    # Conformal p-values are ratios of integers and can meet the line exactly: rounding must not
    # decide.
    return q_values <= fdr * (1.0 + 1e-12), q_values


def rows_needed(num_rows: int, fdr: float) -> int:
    """Calibration rows at which one lone outlier among ``num_rows`` rows can be rejected.

    The smallest p-value is ``1 / (n + 1)`` and a lone rejection needs ``fdr / num_rows``.

    Example:
        >>> rows_needed(20, 0.05)
        399
    """
    check_fdr(fdr)
    return max(1, math.ceil(num_rows / fdr * (1.0 - 1e-12)) - 1)


def together_needed(num_rows: int, fdr: float, num_calibration: int) -> int:
    """How many of ``num_rows`` rows must stand out together before any of them can be rejected.

    More than ``num_rows`` means that nothing can be rejected at all.

    Example:
        >>> together_needed(20, 0.05, 99)
        4
    """
    check_fdr(fdr)
    return max(1, math.ceil(num_rows / (fdr * (num_calibration + 1)) * (1.0 - 1e-12)))


def check_fdr(fdr: float) -> None:
    """Raise ``ValueError`` unless ``fdr`` is a rate strictly between 0 and 1."""
    if not 0.0 < fdr < 1.0:
        raise ValueError(f"fdr={fdr!r}, but it is a rate between 0 and 1, such as 0.05.")
