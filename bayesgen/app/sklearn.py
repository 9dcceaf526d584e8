"""The scikit-learn facade: a mixture and an outlier detector that fit into pipelines.

It alone speaks scikit-learn: ``n_components``, ``score_samples`` low = outlier, ``predict`` -1/+1.
All work is done by the model, the engine and the fit, which stays at hand as ``fit_``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClusterMixin, DensityMixin, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from bayesgen import rng
from bayesgen.app.registry import ENGINES, find
from bayesgen.capabilities import Model
from bayesgen.data import Dataset
from bayesgen.fit import Fit
from bayesgen.inference.run import Engine
from bayesgen.models import GaussianMixture
from bayesgen.outliers import Outliers

__all__ = ["BayesianMixture", "OutlierDetector"]

Array = NDArray[np.float64]
_COVARIANCES = {"diag": "diagonal"}


@dataclass(frozen=True)
class _Refit:
    """Runs the same engine on other rows."""

    engine: Engine[Any]
    model: Model

    def __call__(self, data: Dataset, seed: int) -> Fit:
        return self.engine.run(self.model, data, seed=seed)


class _MixtureEstimator(BaseEstimator):
    """What both estimators share: arguments, checks, the run."""

    def __init__(
        self,
        n_components: int = 10,
        *,
        covariance_type: str = "full",
        priors: dict[str, Any] | None = None,
        engine: str | Engine[Any] = "vb",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.priors = priors
        self.engine = engine
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True  # missing entries are integrated out
        return tags

    def _validated(self, x: ArrayLike, *, reset: bool = False) -> Array:
        """Numbers ``(n, d)``, NaN where missing; the columns of the training data."""
        checked: Array = validate_data(
            self, x, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan"
        )
        return checked

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _run(self, x: Array, seed: int) -> Fit:
        covariance = _COVARIANCES.get(self.covariance_type, self.covariance_type)
        model = GaussianMixture(self.n_components, covariance, self.priors)
        engine = find(ENGINES, self.engine)() if isinstance(self.engine, str) else self.engine
        # Workers of joblib send fitted estimators back, which a closure in them would forbid.
        return replace(engine.run(model, x, seed=seed), refit=_Refit(engine, model))

    def score_samples(self, X: ArrayLike) -> Array:
        """Log posterior predictive density of each row, nats: low for outliers."""
        check_is_fitted(self)
        density: Array = self.fit_.log_prob(self._validated(X)).cpu().numpy()
        return density


class BayesianMixture(ClusterMixin, DensityMixin, _MixtureEstimator):
    """A Bayesian Gaussian mixture for scikit-learn: clusters, densities, missing entries.

    Unlike that of :class:`sklearn.mixture.BayesianGaussianMixture` its score is a normalised
    density of new rows, entries may be NaN, and the number of clusters does not depend on the
    start.

    Args:
        n_components: Upper bound of the number of clusters.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        priors: As :func:`~bayesgen.models.mixture.GaussianMixture` takes them.
        engine: ``"vb"``, ``"gibbs"``, ``"em"``, or an engine with settings of its own.
        random_state: Seed of the run.

    Attributes:
        fit_: The :class:`bayesgen.Fit` with everything else: draws, summary, ArviZ, imputation.
        labels_: ``(n,)`` cluster of each training row.
        weights_: ``(K,)`` posterior mean of the weights, largest first.
        n_clusters_: Number of clusters that training rows occupy.
        n_iter_: Steps of the engine.
        converged_: Whether it converged.

    Example:
        >>> from bayesgen import datasets
        >>> x = datasets.load("faithful").tensor().numpy()
        >>> mixture = BayesianMixture(random_state=0).fit(x)
        >>> mixture.n_clusters_
        2
    """

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Fit the mixture to rows ``(n, d)``, NaN where missing; ``y`` is ignored."""
        x = self._validated(X, reset=True)
        self.fit_ = self._run(x, self._seed())
        self.labels_ = self.fit_.predict(x).cpu().numpy()
        weights = self.fit_.aligned.draws["weights"]
        self.weights_ = weights.double().mean((0, 1)).cpu().numpy()
        self.n_clusters_ = len(np.unique(self.labels_))
        self.n_iter_ = int(self.fit_.attrs["num_steps"])
        self.converged_ = bool(self.fit_.attrs["converged"])
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The most probable cluster of each row."""
        labels: NDArray[np.int64] = self.predict_proba(X).argmax(-1)
        return labels

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probability of each component, ``(n, K)``, averaged over the posterior."""
        check_is_fitted(self)
        belief: Array = self.fit_.encode(self._validated(X)).cpu().numpy()
        return belief

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log posterior predictive density of the rows, nats; ``y`` is ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[Array, NDArray[np.int64]]:
        """New rows, and the cluster that each most probably belongs to."""
        check_is_fitted(self)
        rows = self.fit_.sample(n_samples, seed=self._seed()).cpu().numpy()
        return rows, self.predict(rows)


class OutlierDetector(OutlierMixin, _MixtureEstimator):
    r"""Outliers by a mixture's density, with a guaranteed false alarm rate (split conformal).

    The mixture is fitted to one part of the rows; the other part calibrates. A row is an outlier
    when its log density is below that of all but a share :math:`\alpha` of the calibration rows,

    .. math:: s(x) < s_{(k)}, \qquad k = \lfloor \alpha (m + 1) \rfloor,

    so that a row that belongs is called with probability at most :math:`\alpha`, whatever the data
    and however poor the mixture. Rows with missing entries are held against calibration rows cut
    down to the same columns. To control the false discovery rate of a whole batch instead, ask
    :meth:`outliers`.

    References:
        Bates, Candès, Lei, Romano & Sesia (2023). Testing for outliers with conformal p-values.

    Args:
        n_components: Upper bound of the number of clusters.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"`` or ``"spherical"``.
        priors: As :func:`~bayesgen.models.mixture.GaussianMixture` takes them.
        engine: ``"vb"``, ``"gibbs"``, ``"em"``, or an engine with settings of its own.
        random_state: Seed of the split and of the run.
        false_alarm_rate: Share of rows that belong which may be called outliers.
        calibration_fraction: Share of the training rows that calibrate.

    Attributes:
        fit_: The :class:`bayesgen.Fit` to the first part.
        calibration_: ``(m, d)`` calibration rows, which ``fit_`` has not seen.
        offset_: Log density below which a complete row is an outlier.

    Example:
        >>> from bayesgen import datasets
        >>> x = datasets.load("faithful").tensor().numpy()
        >>> detector = OutlierDetector(random_state=0).fit(x)
        >>> detector.predict([[4.5, 80.0], [3.0, 95.0]])
        array([ 1, -1])
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        covariance_type: str = "full",
        priors: dict[str, Any] | None = None,
        engine: str | Engine[Any] = "vb",
        random_state: int | np.random.RandomState | None = None,
        false_alarm_rate: float = 0.05,
        calibration_fraction: float = 0.5,
    ) -> None:
        super().__init__(
            n_components,
            covariance_type=covariance_type,
            priors=priors,
            engine=engine,
            random_state=random_state,
        )
        self.false_alarm_rate = false_alarm_rate
        self.calibration_fraction = calibration_fraction

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Fit to one part of the rows, calibrate with the other; ``y`` is ignored.

        Raises:
            ValueError: Rates outside (0, 1), or too few rows to call anything at this rate.
        """
        for name in ("false_alarm_rate", "calibration_fraction"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}, but it must be within (0, 1).")
        x = self._validated(X, reset=True)
        seed, held = self._seed(), round(self.calibration_fraction * len(x))
        if self._rank(held) < 1 or held == len(x):
            needed = math.ceil((1 / self.false_alarm_rate - 1) / self.calibration_fraction) + 1
            raise ValueError(
                f"with {len(x)} rows (n_samples={len(x)}) nothing can be called at "
                f"false_alarm_rate={self.false_alarm_rate}: about {needed} are needed. Give more "
                "rows or raise the rate."
            )
        order = torch.randperm(len(x), generator=rng.make_generator(seed)).numpy()
        self.calibration_ = x[order[:held]]
        self.fit_ = self._run(x[order[held:]], seed)
        self.offset_ = self._thresholds(np.zeros((1, x.shape[1]), dtype=bool))[0]
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """Log density above the threshold, nats: negative for outliers."""
        scores = self.score_samples(X)
        decision: Array = scores - self._thresholds(np.isnan(self._validated(X)))
        return decision

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """-1 for outliers, +1 for rows that belong."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def outliers(self, X: ArrayLike, *, fdr: float = 0.05) -> Outliers:
        """The verdict on a batch of rows with its false discovery rate controlled."""
        check_is_fitted(self)
        return self.fit_.outliers(self._validated(X), fdr=fdr, calibration=self.calibration_)

    def _rank(self, num_calibration: int) -> int:
        """Which of the sorted calibration scores is the threshold, counted from 1."""
        return math.floor(self.false_alarm_rate * (num_calibration + 1) + 1e-9)

    def _thresholds(self, missing: NDArray[np.bool_]) -> Array:
        """The threshold of each row, by which of its entries are missing."""
        patterns, group = np.unique(missing, axis=0, return_inverse=True)
        found = np.full(len(patterns), -np.inf)
        for index, pattern in enumerate(patterns):
            usable = ~(np.isnan(self.calibration_) & ~pattern).any(-1)
            rank = self._rank(int(usable.sum()))
            if rank >= 1:  # else too few calibration rows have these columns: none is called
                rows = np.where(pattern, np.nan, self.calibration_[usable])
                found[index] = np.sort(self.fit_.log_prob(rows).cpu().numpy())[rank - 1]
        thresholds: Array = found[group.reshape(-1)]
        return thresholds
