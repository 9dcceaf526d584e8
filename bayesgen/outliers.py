r"""Which rows do not belong, with a guarantee: conformal p-values, false discoveries controlled.

The score of a row is its log density, low when strange. A threshold on it is arbitrary; the rank
of the score among those of *calibration rows*, which the density has not seen, is not: for a row
that does belong it is uniform, whatever the density, the dimension and the sample size.
Benjamini-Hochberg on these p-values controls the expected share of false calls.

What each way of calibrating guarantees, for new rows that belong (are exchangeable with the
fitted):

* rows given by the user, or *split* (refit on a part, calibrate on the rest): each p-value is
  valid exactly, and Benjamini-Hochberg controls the false discovery rate exactly, since p-values
  that share calibration rows are positively dependent (Bates et al. 2023). Both hold on average
  over calibration sets.
* *cross* (``folds=K``): all rows calibrate, each scored by the refit without its fold. Proven is
  :math:`\Pr(p \le \alpha) \le 2\alpha` plus a term that vanishes with n (Vovk, Wang 2020; Barber
  et al. 2021); in practice it holds at :math:`\alpha` unless the refits are unstable.
* *model*: rows simulated from the fit itself. P-values may be as small as you like, and rows of
  the training data may be judged too, but validity rests on the model being right. No conformal
  guarantee.

Contaminated training data (outliers among the rows that calibrate) make all p-values too large:
validity stands, power falls. Remove what was found and calibrate again, or calibrate with rows
known to be clean.

Rows with missing entries are scored by the marginal density of what was observed. Scores of
different missing patterns are not comparable, so each pattern is held against calibration rows cut
down to the same columns (those rows that have them all). This is valid when entries are missing
independently of their values.

References:
    Vovk (2015), Cross-conformal predictors.
    Vovk, Wang (2020), Combining p-values via averaging.
    Barber, Candès, Ramdas, Tibshirani (2021), Predictive inference with the jackknife+.
    Bates, Candès, Lei, Romano, Sesia (2023), Testing for outliers with conformal p-values.
    Benjamini, Hochberg (1995), Controlling the false discovery rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Conditional, Model, Scored, require
from bayesgen.conformal import (
    benjamini_hochberg,
    check_fdr,
    conformal_p_values,
    count_below,
    rows_needed,
    together_needed,
)
from bayesgen.data import Dataset, as_dataset

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = [
    "Calibration",
    "Outliers",
    "benjamini_hochberg",
    "calibrate",
    "conformal_p_values",
    "explain",
    "outliers",
]

Method = Literal["given", "split", "cross", "model"]
_SIMULATED_ROWS, _ESTIMATED_ROWS = 10_000, 1_000  # the latter where each score is an estimate
_COMPARED_ROWS = 200_000  # training rows up to which new rows are searched among them

# Refits are dear: those made on behalf of a fit live as long as the fit does.
_MADE: WeakKeyDictionary[Fit, dict[tuple[float | None, int | None, int], Calibration]]
_MADE = WeakKeyDictionary()

_GUARANTEES: Mapping[str, str] = {
    "given": "exact (calibration rows that the fit has not seen)",
    "split": "exact (refit on one part of the training rows, calibrated on the other)",
    "cross": "approximate (cross-conformal: proven up to a factor of 2)",
    "model": "only as good as the model (calibrated on rows simulated from the fit)",
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows whose scores say what is usual, and the fits that score them without having seen them.

    Args:
        rows: ``(n, d)`` calibration rows, NaN where missing.
        folds: ``(n,)`` integers: which of ``scorers`` has not seen the row.
        scorers: The fits; empty when the fit that is calibrated scores all rows itself.
        method: ``"given"``, ``"split"``, ``"cross"`` or ``"model"``.
    """

    rows: Tensor
    folds: Tensor
    scorers: tuple[Fit, ...]
    method: Method

    @property
    def num_rows(self) -> int:
        """Number of calibration rows."""
        return self.rows.shape[0]

    def p_values(
        self, fit: Fit, x: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P-values of rows, their scores, and the number of calibration rows behind each.

        Args:
            fit: The fit that is calibrated; scores when there are no ``scorers``.
            x: ``(m, d)`` checked rows, NaN where missing.
            generator: Breaks ties at random when given.

        Returns:
            Three ``(m,)`` tensors; the score is the mean over the scorers.
        """
        p_values, scores = x.new_empty(len(x)), x.new_empty(len(x))
        sizes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        # Calibration rows are cut down to the columns that the rows of a pattern have.
        # have.
        patterns, group = x.isnan().unique(dim=0, return_inverse=True)
        for index, missing in enumerate(patterns):
            members = (group == index).nonzero()[:, 0]
            usable = ~(self.rows.isnan() & ~missing).any(-1)
            if not bool(usable.any()):
                p_values[members], sizes[members] = 1.0, 0
                scores[members] = _score(fit, x[members]).to(scores)
                continue
            below, equal, mean = self._count(fit, x[members], missing, usable)
            total = int(usable.sum())
            coin = torch.zeros_like(below)
            if generator is not None:
                coin = torch.rand(below.shape, generator=generator, dtype=below.dtype).to(below)
            # Without a generator ties count in full, as in conformal_p_values.
            p_values[members] = ((below + (1.0 - coin) * (1.0 + equal)) / (total + 1)).to(p_values)
            scores[members], sizes[members] = mean.to(scores), total
        return p_values, scores, sizes

    def _count(
        self, fit: Fit, x: Tensor, missing: Tensor, usable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calibration scores below and equal to each row's, over scorers; its mean score."""
        scorers = self.scorers or (fit,)
        parts, means = [], []
        for fold, scorer in enumerate(scorers):
            mine = self.rows[usable & (self.folds == fold)]
            score = _score(scorer, x)
            means.append(score)
            if len(mine):
                usual = _score(scorer, torch.where(missing, torch.nan, mine))
                parts.append(torch.stack(count_below(usual, score)))
        below, equal = torch.stack(parts).sum(0)
        return below, equal, torch.stack(means).mean(0)

    # ------------------------------------------------------------ saved
    def to_config(self) -> dict[str, Any]:
        """Nested dicts of JSON values and tensors, read by :meth:`from_config`."""
        return {
            "method": self.method,
            "rows": self.rows,
            "folds": self.folds,
            "scorers": [
                {
                    "model": scorer.model.to_config(),
                    "draws": dict(scorer.draws),
                    "posterior": None
                    if scorer.posterior is None
                    else {block: dict(values) for block, values in scorer.posterior.items()},
                    "schema": scorer.schema.to_config(),
                }
                for scorer in self.scorers
            ],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model_type: type[Model]) -> Self:
        """The inverse of :meth:`to_config`; ``model_type`` is the class of the fit's model."""
        from bayesgen.fit import Fit

        method: Method = config["method"]
        if method not in _GUARANTEES:
            raise ValueError(
                f"a calibration's method is one of {list(_GUARANTEES)}, got {method!r}."
            )
        scorers = tuple(
            Fit(
                model_type.from_config(saved["model"]),
                dict(saved["draws"]),
                posterior=saved["posterior"],
                attrs={"schema": saved["schema"]},
            )
            for saved in config["scorers"]
        )
        return cls(config["rows"], config["folds"], scorers, method)


@dataclass(frozen=True, eq=False)
class Outliers:
    """The verdict on rows: who does not belong, how surely, and what the verdict is worth."""

    is_outlier: Tensor
    """``(m,)`` booleans: rejected at :attr:`fdr`."""
    p_values: Tensor
    """``(m,)``: chance that a row that belongs is at least as strange."""
    q_values: Tensor
    """``(m,)``: smallest false discovery rate at which the row is rejected."""
    scores: Tensor
    """``(m,)`` log density of the observed entries by the scoring fits, nats; low = strange."""
    fdr: float
    """Wanted false discovery rate."""
    num_calibration: Tensor
    """``(m,)`` number of calibration rows behind each p-value."""
    message: str
    """What the verdict rests on, and what stands in its way."""
    calibration: Calibration
    """The calibration used; pass it on to judge other rows without another refit."""

    def to_frame(self) -> pd.DataFrame:
        """One line a row, in a pandas data frame."""
        import pandas as pd

        names = ("is_outlier", "p_values", "q_values", "scores", "num_calibration")
        shown = ("is_outlier", "p_value", "q_value", "score", "num_calibration")
        columns = {s: getattr(self, n).cpu().numpy() for s, n in zip(shown, names, strict=True)}
        return pd.DataFrame(columns)

    def __str__(self) -> str:
        return (
            f"{int(self.is_outlier.sum())} of {len(self.is_outlier)} rows are outliers at a false "
            f"discovery rate of {self.fdr:g}. {self.message}"
        )


def calibrate(
    fit: Fit, *, fraction: float = 0.5, folds: int | None = None, seed: int = 0
) -> Calibration:
    """Refit without some training rows and keep those to calibrate with.

    Args:
        fit: A fit that knows its training data and can refit.
        fraction: Share of the training rows held out (*split*).
        folds: Number of folds (*cross*): ``folds`` refits, all rows calibrate. Overrides
            ``fraction``.
        seed: Decides who is held out, and seeds the refits.

    Returns:
        The calibration, which knows nothing of the rows to be judged.

    Raises:
        ValueError: If the fit knows no data or no ``refit``, or the parts would be empty.
    """
    if fit.data is None or fit.refit is None:
        raise ValueError(
            f"calibration holds out training rows and refits, but this fit has no "
            f"{'training data' if fit.data is None else 'refit'}: give rows that it has not seen "
            "as calibration=rows, or calibration='model' to trust the model."
        )
    data, n = fit.data, fit.data.num_rows
    order = torch.randperm(n, generator=rng.make_generator(seed))
    groups: Sequence[Tensor]
    if folds is None:
        held = round(fraction * n)
        if not 0 < held < n:
            raise ValueError(
                f"fraction={fraction:g} of {n} training rows holds out {held} and leaves "
                f"{n - held}: both must be at least 1."
            )
        groups = [order[:held]]
    else:
        if not 2 <= folds <= n:
            raise ValueError(f"folds={folds}, but it must be between 2 and the {n} training rows.")
        groups = order.tensor_split(folds)
    rows, scorers = [], []
    for group, child in zip(groups, rng.spawn(seed, len(groups)), strict=True):
        keep = torch.ones(n, dtype=torch.bool)
        keep[group] = False
        scorers.append(fit.refit(data.subset(keep), child))
        rows.append(_tensor(data.subset(~keep)).to(fit.device))
    index = torch.cat([torch.full((len(part),), k) for k, part in enumerate(rows)])
    method: Method = "split" if folds is None else "cross"
    return Calibration(torch.cat(rows), index.to(fit.device), tuple(scorers), method)


def outliers(
    fit: Fit,
    x: object,
    *,
    fdr: float = 0.05,
    calibration: object = None,
    fraction: float = 0.5,
    folds: int | None = None,
    dependence: str = "positive",
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> Outliers:
    """Call the rows that do not belong, at most a share ``fdr`` of the calls wrong on average.

    Args:
        fit: The fit whose data say what belongs.
        x: New rows ``(m, d)``, NaN where missing.
        fdr: Wanted false discovery rate.
        calibration: A :class:`Calibration`; rows that the fit has never seen; ``"model"`` to trust
            the model and calibrate on rows simulated from it; or None: the fit's own, or
            :func:`calibrate`.
        fraction: Share of training rows held out when calibrating here.
        folds: Cross-conformal calibration with this many refits; set aside the fit's own.
        dependence: ``"arbitrary"`` controls the rate also where positive dependence is not proven
            (several missing patterns at once, cross-conformal); see :func:`benjamini_hochberg`.
        generator: Breaks ties of scores at random, which makes p-values exactly uniform.
        seed: Of held-out rows, refits and simulated rows.

    Returns:
        Verdict, p-values, q-values and scores, with a message on what they are worth.

    Raises:
        ValueError: Bad columns, an ``fdr`` outside (0, 1), or no way to calibrate.
    """
    check_fdr(fdr)
    rows = _tensor(as_dataset(x, schema=fit.schema)).to(fit.device)
    used = _calibration(fit, calibration, fraction, folds, seed)
    p_values, scores, sizes = used.p_values(fit, rows, generator=generator)
    called, q_values = benjamini_hochberg(p_values, fdr, dependence=dependence)
    if generator is None and together_needed(len(rows), fdr, int(sizes.max())) > len(rows):
        warnings.warn(
            f"no row can be called at fdr={fdr:g} with {int(sizes.max())} calibration rows: the "
            "verdict's message says what helps.",
            UserWarning,
            stacklevel=2,
        )
    message = _message(fit, rows, used, fdr, sizes, called)
    return Outliers(called, p_values, q_values, scores, fdr, sizes, message, used)


def _calibration(
    fit: Fit, given: object, fraction: float, folds: int | None, seed: int
) -> Calibration:
    if isinstance(given, Calibration):
        return given
    if isinstance(given, str) and given == "model":
        dear = isinstance(fit.model, Scored) and fit.model.is_estimated
        rows = fit.sample(_ESTIMATED_ROWS if dear else _SIMULATED_ROWS, seed=seed)
        return _unseen(rows.to(torch.float64), "model")
    if given is not None:
        return _unseen(_tensor(as_dataset(given, schema=fit.schema)).to(fit.device), "given")
    if isinstance(fit.calibration, Calibration) and folds is None:
        return fit.calibration
    made = _MADE.setdefault(fit, {})
    key = (fraction if folds is None else None, folds, seed)
    if key not in made:
        made[key] = calibrate(fit, fraction=fraction, folds=folds, seed=seed)
    return made[key]


def _unseen(rows: Tensor, method: Method) -> Calibration:
    folds = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return Calibration(rows, folds, (), method)


def _score(fit: Fit, rows: Tensor) -> Tensor:
    """Log density of rows that are checked and coded already."""
    return fit.log_prob(Dataset.from_codes(rows, fit.schema))


def _tensor(data: Dataset) -> Tensor:
    return data.tensor() if data.in_memory else torch.cat(list(data.batches(65_536)))


# ------------------------------------------------------------------ messages
def _too_small(num_rows: int, fdr: float, num_calibration: int) -> str:
    return (
        f"no row can be called: with {num_calibration} calibration rows no p-value falls below "
        f"1/{num_calibration + 1}, and fdr={fdr:g} needs {rows_needed(1, fdr)} calibration rows "
        f"at least, {rows_needed(num_rows, fdr)} to call one row alone among {num_rows}. Give "
        "more rows to calibrate with (folds=10 uses all training rows), judge fewer rows at "
        "once, raise fdr, or use calibration='model'."
    )


def _message(
    fit: Fit, rows: Tensor, used: Calibration, fdr: float, sizes: Tensor, called: Tensor
) -> str:
    smallest, largest = int(sizes.min()), int(sizes.max())
    shown = str(largest) if smallest == largest else f"{smallest} to {largest}"
    parts = [f"Guarantee: {_GUARANTEES[used.method]}; {shown} calibration rows."]
    together = together_needed(len(rows), fdr, largest)
    if together > len(rows):
        parts.append(_too_small(len(rows), fdr, largest).capitalize())
    elif together > 1 and not bool(called.all()):
        parts.append(
            f"With {largest} calibration rows and {len(rows)} rows judged at once, {together} "
            f"must stand out together to be called; one alone needs {rows_needed(len(rows), fdr)} "
            "calibration rows."
        )
    if smallest == 0:
        parts.append(
            f"{int((sizes == 0).sum())} rows have columns that no calibration row has all of, and "
            "cannot be judged: their p-value is 1."
        )
    seen = 0 if used.method == "model" else _num_seen(fit, rows)
    if seen > len(rows) // 2:
        parts.append(
            f"{seen} of the {len(rows)} rows are training rows, which the fits have adapted to, "
            "so that their p-values are too large: judge new rows, or use calibration='model'."
        )
    return " ".join(parts)


def _num_seen(fit: Fit, rows: Tensor) -> int:
    """How many rows are training rows; 0 where equality is no evidence or costs too much."""
    data = fit.data
    if data is None or not data.in_memory or data.num_rows > _COMPARED_ROWS:
        return 0
    if "real" not in data.kinds:
        return 0
    known = {row.tobytes() for row in data.tensor().nan_to_num(nan=-1e300).numpy()}
    return sum(row.tobytes() in known for row in rows.cpu().nan_to_num(nan=-1e300).numpy())


# ------------------------------------------------------------------ reasons
def explain(
    fit: Fit, x: object, *, centred: bool = True, num_reference: int = 1000, seed: int = 0
) -> Tensor:
    r"""Which columns make each row strange: the surprise at each entry given the others.

    .. math::
        r_{ij} = -\log p(x_{ij} \mid x_{i,-j}) = \log p(x_{i,-j}) - \log p(x_i),

    under the posterior predictive. Raw surprises of different columns cannot be compared, since a
    density changes with the unit of its column; ``centred`` subtracts the average surprise of that
    column over rows simulated from the fit, which no unit changes: 0 is ordinary, 5 nats very
    strange.

    Args:
        fit: A fit whose model is ``Conditional``.
        x: Rows ``(n, d)``, NaN where missing.
        centred: Whether to subtract each column's average surprise.
        num_reference: Simulated rows for that average.
        seed: Of the simulated rows.

    Returns:
        ``(n, d)`` nats, high = strange, NaN where ``x`` is missing.

    Raises:
        TypeError: If the model cannot condition on some columns.
    """
    require(fit.model, Conditional, "explain")
    surprise = _surprise(fit, _tensor(as_dataset(x, schema=fit.schema)).to(fit.device))
    if not centred:
        return surprise
    return surprise - _surprise(fit, fit.sample(num_reference, seed=seed)).mean(0)


def _surprise(fit: Fit, rows: Tensor) -> Tensor:
    whole = _score(fit, rows)
    columns = []
    for j in range(rows.shape[1]):
        without = rows.clone()
        without[:, j] = torch.nan
        columns.append(_score(fit, without) - whole)
    return torch.stack(columns, -1).masked_fill(rows.isnan(), torch.nan)
