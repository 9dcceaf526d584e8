"""A fit for ArviZ, and whether engines agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesgen.agreement import agreement
from bayesgen.arviz_groups import convert, summarise
from bayesgen.capabilities import Pointwise, Scored
from bayesgen.comparison import compare, leave_one_out
from bayesgen.predictive import observed, replicated, sample_prior

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bayesgen.fit import Fit

__all__ = ["agreement", "compare", "leave_one_out", "summarise", "to_arviz"]

_MAX_ELEMENTS = 20_000_000
_ESTIMATES = 50_000  # of log densities, each of them a sum over hundreds of points or more

Arrays = dict[str, "NDArray[Any]"]


def to_arviz(
    fit: Fit,
    *,
    log_likelihood: bool = True,
    posterior_predictive: int = 0,
    prior: Mapping[str, Tensor] | int = 0,
    prior_predictive: Mapping[str, Tensor] | Tensor | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
    max_elements: int = _MAX_ELEMENTS,
) -> Any:
    """The fit as ``InferenceData`` (ArviZ 0.2x) or ``DataTree`` (1.x), through ``from_dict``.

    ``posterior`` holds aligned draws and the invariant quantities, with dimensions and
    coordinates named by the model and the data's columns, or by the plates of a plain program;
    ``log_likelihood`` is pointwise, as ``az.loo`` and ``az.compare`` need it. A group that would
    not fit is left out, and its attribute ``<group>_skipped`` says why.

    Args:
        fit: The fit.
        log_likelihood: Whether the training rows are scored under every draw.
        posterior_predictive: Number of replicated data sets of each chain; 0 for none.
        prior: Number of draws from the prior, and of data sets from them (group
            ``prior_predictive``); or the draws themselves ``(chain, draw, *event)`` by site.
        prior_predictive: The data sets ``(chain, draw, *shape)`` when draws are given.
        coords: Labels along dimensions, in place of those of model and data.
        seed: Of everything that is drawn.
        max_elements: Largest number of elements of a computed group.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> fit = pretend(UnitMixture(2), [[0.0], [0.1], [5.0], [5.1]])
        >>> to_arviz(fit).posterior["loc"].dims
        ('chain', 'draw', 'component', 'column')
    """
    export = _Export(fit, max_elements)
    if coords is not None:
        export.coords |= {key: list(value) for key, value in coords.items()}
    export.data(log_likelihood)
    if posterior_predictive:
        export.replications(posterior_predictive, seed)
    if isinstance(prior, int):
        if prior:
            export.prior(prior, seed)
    else:
        export.groups["prior"] = _numpy(prior)
    if prior_predictive is not None:
        if isinstance(prior_predictive, Tensor):
            prior_predictive = {"x": prior_predictive}
        export.groups["prior_predictive"] = _numpy(prior_predictive)
    return convert(export.groups, coords=export.coords, dims=export.dims, attrs=export.attrs)


class _Export:
    """Groups under construction."""

    def __init__(self, fit: Fit, max_elements: int) -> None:
        self.fit, self.max_elements = fit, max_elements
        self.coords: dict[str, list[Any]] = {k: list(v) for k, v in fit.model.coords().items()}
        self.dims: dict[str, list[str]] = {k: list(v) for k, v in fit.model.dims.items()}
        self.groups: dict[str, Arrays] = {
            "posterior": _numpy({**fit.aligned.draws, **fit.invariants}),
            # ArviZ 0.2x takes this name for pointwise values of old and warns
            "sample_stats": _numpy(
                {
                    "total_log_likelihood" if k == "log_likelihood" else k: v
                    for k, v in fit.sample_stats.items()
                }
            ),
        }
        self.attrs: dict[str, Any] = {"inference_library": "bayesgen", **fit.attrs}
        if fit.aligned.elements is not None:
            self.attrs["alignment"] = fit.aligned.message

    def _fits(self, group: str, size: int) -> bool:
        if size > self.max_elements:
            self.attrs[f"{group}_skipped"] = (
                f"{size:,} elements, above max_elements={self.max_elements:,}"
            )
        return size <= self.max_elements

    def _affordable(self, size: int) -> bool:
        """Whether an estimated density is cheap enough for every draw and row."""
        model = self.fit.model
        dear = isinstance(model, Scored) and model.is_estimated and size > _ESTIMATES
        if dear:
            self.attrs["log_likelihood_skipped"] = (
                f"{size:,} estimates of a density that has no closed form, above {_ESTIMATES:,}: "
                "they would take minutes; fit.log_likelihood(x) makes them"
            )
        return not dear

    def data(self, log_likelihood: bool) -> None:
        """``observed_data`` and ``log_likelihood``."""
        fit, num_draws = self.fit, self.fit.num_chains * self.fit.num_draws
        if isinstance(fit.model, Pointwise):
            held = fit.model.observed
            self.groups["observed_data"] = _numpy(held)
            size = num_draws * sum(value.numel() for value in held.values())
            if log_likelihood and self._fits("log_likelihood", size):
                self.groups["log_likelihood"] = _numpy(fit.model.log_likelihood(fit.draws))
        elif fit.data is not None and fit.data.in_memory:
            rows = fit.data.tensor()
            self.groups["observed_data"] = {"x": rows.cpu().numpy()}
            self.coords.setdefault("column", list(fit.columns))
            self.coords["row"] = list(range(len(rows)))
            self.dims["x"] = ["row", "column"]
            if log_likelihood and isinstance(fit.model, Scored):
                if self._affordable(num_draws * len(rows)) and self._fits(
                    "log_likelihood", num_draws * len(rows)
                ):
                    self.groups["log_likelihood"] = _numpy({"x": fit.log_likelihood(fit.data)})
        elif log_likelihood:
            reason = "the fit does not hold its training data in memory"
            self.attrs["log_likelihood_skipped"] = reason

    def replications(self, num_replicates: int, seed: int) -> None:
        """``posterior_predictive``."""
        size = sum(value.numel() for value in observed(self.fit).values())
        if self._fits("posterior_predictive", self.fit.num_chains * num_replicates * size):
            found = replicated(self.fit, num_replicates, seed=seed)
            self.groups["posterior_predictive"] = _numpy(found)

    def prior(self, num_samples: int, seed: int) -> None:
        """``prior`` and ``prior_predictive``."""
        size = sum(value.numel() for value in observed(self.fit).values())
        if self._fits("prior", num_samples * size):
            found = sample_prior(self.fit.model, self.fit.data, num_samples=num_samples, seed=seed)
            self.groups["prior"] = _numpy(found.prior)
            self.groups["prior_predictive"] = _numpy(found.predictive)


def _numpy(values: Mapping[str, Tensor]) -> Arrays:
    return {name: value.detach().cpu().numpy() for name, value in values.items()}
