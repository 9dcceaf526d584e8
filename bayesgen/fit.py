"""What a run of any engine returns: the model, its draws, and everything one does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen import rng, verbs
from bayesgen.capabilities import (
    Conditional,
    Conjugate,
    Denoising,
    Encoder,
    Explained,
    Generative,
    Model,
    Scored,
    Symmetric,
    Weighted,
    require,
)
from bayesgen.data import Dataset, as_dataset
from bayesgen.schema import Schema
from bayesgen.symmetry import Alignment, LabelPermutation, align

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from bayesgen.conditional import Conditioned
    from bayesgen.explained import ExplainedVariance
    from bayesgen.outliers import Outliers
    from bayesgen.predictive import PriorPredictive
    from bayesgen.relations import Graph
    from bayesgen.sensitivity import Sensitivity
    from bayesgen.summary import Summary
    from bayesgen.verdict import Verdict

__all__ = ["Fit", "load"]

_MAX_ANCHORS = 200
_ANCHOR_BUDGET = 2**25  # responsibilities held while aligning
_BATCH_SIZE = 65_536


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    r"""A model with its posterior, however it was found.

    Every verb takes what :func:`bayesgen.data.as_dataset` takes - arrays, tensors, data frames,
    paths - checks it against the columns of the training data, and works in chunks of bounded
    memory. ``NaN`` entries are integrated out. All are plain torch and may be called from several
    threads.

    Args:
        model: The bound model.
        draws: Posterior draws ``(chain, draw, *event)`` by site; a point estimate is one draw.
        posterior: Variational posterior by block, of conjugate fits; its predictive is then exact.
        sample_stats: ``(chain, draw)`` by name: ``lp``, ``num_occupied``, ...
        history: What the engine recorded at each step.
        attrs: JSON values: engine, settings, seed, versions, columns, ``converged``, ``messages``.
        data: The training data, or None when they are not at hand.
        refit: Fits the same model by the same engine to other data with another seed.
        calibration: Conformal calibration of the outlier scores.
        guide: What :class:`~bayesgen.inference.SVI` has trained: draws more, encodes new rows.

    Raises:
        ValueError: No draws, or draws whose leading ``(chain, draw)`` disagree.

    Example:
        >>> from bayesgen.toys import UnitMixture
        >>> data = as_dataset([[0.0], [1.0], [2.0]])
        >>> draws = {"weights": torch.ones(1, 50, 1), "loc": torch.ones(1, 50, 1, 1)}
        >>> fit = Fit(UnitMixture(1).bind(data), draws, data=data, attrs={"engine": "nobody"})
        >>> fit
        Fit(UnitMixture by nobody: 1 chain x 50 draws, 3 rows x 1 column)
        >>> fit.log_prob([[1.0]])
        tensor([-0.9189])
    """

    model: Model
    draws: Mapping[str, Tensor]
    _: dataclasses.KW_ONLY
    posterior: Mapping[str, Mapping[str, Tensor]] | None = None
    sample_stats: Mapping[str, Tensor] = field(default_factory=dict)
    history: Mapping[str, list[float]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    data: Dataset | None = None
    refit: Callable[[Dataset, int], Fit] | None = None
    calibration: Any = None
    guide: Any = None

    def __post_init__(self) -> None:
        self._check()
        # A reload gives equal bits only if memory is laid out as a reload has it.
        object.__setattr__(self, "draws", _contiguous(self.draws))
        if self.posterior is not None:
            posterior = {block: _contiguous(values) for block, values in self.posterior.items()}
            object.__setattr__(self, "posterior", posterior)
        if self.data is not None and "schema" not in self.attrs:
            attrs = {**self.attrs, "schema": self.data.schema.to_config()}
            object.__setattr__(self, "attrs", attrs)

    def _check(self) -> None:
        if not self.draws:
            raise ValueError("draws is empty: a fit needs at least one site.")
        leads = {name: tuple(value.shape[:2]) for name, value in self.draws.items()}
        leads |= {name: tuple(value.shape) for name, value in self.sample_stats.items()}
        if len(set(leads.values())) > 1 or len(next(iter(leads.values()))) != 2:
            raise ValueError(
                "every draw must start with the same (chain, draw), and every sample statistic be "
                f"(chain, draw); got {leads}."
            )
        if 0 in next(iter(leads.values())):
            raise ValueError(f"a fit needs at least one chain of one draw; got {leads}.")

    # ------------------------------------------------------------ what it is
    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return self._some.shape[0]

    @property
    def num_draws(self) -> int:
        """Number of draws of each chain."""
        return self._some.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the draws live, and all verbs compute."""
        return self._some.device

    @property
    def schema(self) -> Schema:
        """Names, kinds and levels of the columns of the training data."""
        if self.data is not None:
            return self.data.schema
        if "schema" not in self.attrs:
            raise ValueError(
                "this fit knows neither its training data nor their columns: pass data=... or "
                "attrs={'schema': schema.to_config()} to Fit."
            )
        return Schema.from_config(self.attrs["schema"])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the training data."""
        return self.schema.columns

    @property
    def _some(self) -> Tensor:
        return next(iter(self.draws.values()))

    @cached_property
    def _flat(self) -> dict[str, Tensor]:
        return verbs.flatten_draws(self.draws)

    @cached_property
    def _flat_aligned(self) -> dict[str, Tensor]:
        return verbs.flatten_draws(self.aligned.draws)

    def __repr__(self) -> str:
        def plural(count: int, noun: str) -> str:
            return f"{count} {noun}{'s' * (count != 1)}"

        engine = self.attrs.get("engine", "an unnamed engine")
        rows = self.attrs.get("num_rows", self.data.num_rows if self.data is not None else None)
        size = "no data"
        if rows:
            size = f"{plural(rows, 'row')} x {plural(len(self.columns), 'column')}"
        return (
            f"Fit({type(self.model).__name__} by {engine}: {plural(self.num_chains, 'chain')} x "
            f"{plural(self.num_draws, 'draw')}, {size})"
        )

    # ------------------------------------------------------------ densities
    def log_prob(self, x: object) -> Tensor:
        r"""Log posterior predictive density of each row, in nats; it integrates to one.

        .. math:: \log p(x_i \mid D) = \log \int p(x_i \mid \theta)\, p(\theta \mid D)\, d\theta

        exact where the model has a closed form under a conjugate posterior (a mixture of
        Student-t), else the log of the mean over all draws; of a density that is itself an
        estimate, over 100 evenly spaced ones.

        Args:
            x: Rows ``(n, d)``, ``NaN`` where missing.

        Returns:
            ``(n,)``.

        Raises:
            TypeError: The model has no density.
            ValueError: The columns are not those of the training data.
        """
        return torch.cat([self._log_prob(batch) for batch in self._batches(x)])

    def _log_prob(self, batch: Tensor) -> Tensor:
        if self.posterior is not None and isinstance(self.model, Conjugate):
            parts = []
            for rows in batch.split(8192):
                exact = self.model.log_predictive(rows, self.posterior)
                if exact is None:
                    break
                parts.append(exact)
            else:
                return torch.cat(parts) if parts else batch.new_empty(0)
        return verbs.log_mean_exp(require(self.model, Scored, "log_prob"), batch, self._flat)

    def log_likelihood(self, x: object) -> Tensor:
        """Log density of each row under each draw, ``(chain, draw, n)``, as in ArviZ's ``loo``."""
        model = require(self.model, Scored, "log_likelihood")
        parts = [verbs.log_likelihood(model, batch, self._flat) for batch in self._batches(x)]
        return torch.cat(parts, dim=-1).unflatten(0, (self.num_chains, self.num_draws))

    def sample(self, num_samples: int, *, with_noise: bool = True, seed: int = 0) -> Tensor:
        """New rows from the posterior predictive, ``(num_samples, d)``; categories as codes.

        Args:
            num_samples: How many.
            with_noise: Whether the rows carry the model's noise; without it they are its signal,
                which latent variable models alone have.
            seed: Of the random numbers; the same rows with and without noise are not paired.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}, but at least 1 is needed.")
        if with_noise:
            draw = require(self.model, Generative, "sample").sample
        else:
            draw = require(self.model, Denoising, "sample(with_noise=False)").sample_signal
        generator = rng.make_generator(seed, self.device)
        return verbs.sample(draw, self._flat, num_samples, generator=generator)

    # ------------------------------------------------------------ latents
    def encode(self, x: object) -> Tensor:
        """Posterior mean of each row's latent, averaged over aligned draws.

        For labels these are responsibilities ``(n, K)``, summing to one; components are those of
        :attr:`aligned`, ordered by decreasing weight. Of a factor model they are scores ``(n, q)``
        along the directions of :attr:`aligned`, ordered by decreasing variance.

        Of a program of yours fitted by SVI, the amortised guide's means; ``x`` is what the guide
        is called with, a tuple for several arguments. A guide of several latents of rows gives
        them all by ``fit.guide.encode(x)``.
        """
        if self.guide is not None and not isinstance(self.model, Encoder):
            return self._encoded(x)
        model = require(self.model, Encoder, "encode")
        return torch.cat(
            [verbs.posterior_mean(model, batch, self._flat_aligned) for batch in self._batches(x)]
        )

    def _encoded(self, x: object) -> Tensor:
        """By the guide, of the one latent that rows have."""
        found: dict[str, Tensor] = self.guide.encode(*(x if isinstance(x, tuple) else (x,)))
        if len(found) != 1:
            raise ValueError(
                f"the guide has {len(found)} latents of rows ({', '.join(found)}): take one from "
                "fit.guide.encode(x), which gives each by its name."
            )
        return next(iter(found.values()))

    def predict(self, x: object) -> Tensor:
        """Most probable label of each row, ``(n,)`` integers: the component in :attr:`aligned`."""
        return self.encode(x).argmax(-1)

    def reconstruct(self, x: object) -> Tensor:
        r"""Each row without its noise, ``(n, d)``: the posterior mean of its signal.

        .. math:: E[f(z_i, \theta) \mid x_i, D]

        averaged over all draws. Missing entries are filled; observed ones are shrunk towards the
        signal as well, unlike in :meth:`impute_mean`.
        """
        model = require(self.model, Denoising, "reconstruct")
        return torch.cat([verbs.reconstruct(model, b, self._flat) for b in self._batches(x)])

    def explained_variance(self) -> ExplainedVariance:
        """How much of the rows' variance the latents explain, direction by direction, by draw."""
        from bayesgen.explained import ExplainedVariance

        model = require(self.model, Explained, "explained_variance")
        found = model.explained_variance(self.draws)
        return ExplainedVariance(found["signal"], found["noise"])

    @cached_property
    def anchors(self) -> Tensor:
        """Up to 200 rows, evenly spaced in the training data, by which draws are aligned.

        Without training data at hand they are drawn from the posterior predictive.
        """
        symmetry = self.model.symmetry if isinstance(self.model, Symmetric) else None
        labels = symmetry.num_components if isinstance(symmetry, LabelPermutation) else 1
        wanted = _ANCHOR_BUDGET // (labels * self.num_chains * self.num_draws)
        wanted = max(20, min(_MAX_ANCHORS, wanted))
        if self.data is None or not self.data.in_memory:
            return self.sample(wanted, seed=0)
        n = self.data.num_rows
        index = torch.linspace(0, n - 1, min(n, wanted), dtype=torch.float64).round().long()
        return self._to(self.data.tensor()[index.unique()])

    @cached_property
    def aligned(self) -> Alignment:
        """The draws after alignment - labels, rotation, signs -, and how sure it is."""
        if not isinstance(self.model, Symmetric):
            return Alignment(dict(self.draws))
        probabilities = None
        if isinstance(self.model, Encoder):
            probabilities = verbs.probabilities(self.model, self.anchors, self._flat)
        if probabilities is not None:
            probabilities = probabilities.unflatten(0, (self.num_chains, self.num_draws))
        return align(
            self.draws,
            self.model.symmetry,
            responsibilities=probabilities,
            log_density=self._log_density(),
        )

    def _log_density(self) -> Tensor | None:
        if "lp" in self.sample_stats:
            return self.sample_stats["lp"]
        if isinstance(self.model, Scored) and not self.model.is_estimated:
            flat = verbs.log_likelihood(self.model, self.anchors, self._flat).sum(-1)
            return flat.unflatten(0, (self.num_chains, self.num_draws))
        return None

    # ------------------------------------------------------------ gaps
    def impute(self, x: object, *, num_samples: int = 20, seed: int = 0) -> Tensor:
        """Completed copies of the rows, ``(num_samples, n, d)``: proper multiple imputations.

        Each copy belongs to one posterior draw and fills the gaps of every row from their
        distribution given the row's observed entries, which stay as they are.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}, but at least 1 is needed.")
        model = require(self.model, Conditional, "impute")
        generator = rng.make_generator(seed, self.device)
        total = self.num_chains * self.num_draws
        index = torch.randint(total, (num_samples,), generator=generator, device=self.device)
        flat = verbs.pick(self._flat, index)
        return torch.cat(
            [verbs.impute(model, b, flat, generator=generator) for b in self._batches(x)], dim=1
        )

    def impute_mean(self, x: object, *, num_draws: int = 200) -> Tensor:
        """The rows with gaps filled by their posterior expectation, ``(n, d)``.

        The expectation given a draw is exact; it is averaged over up to ``num_draws`` draws,
        evenly spaced, since each costs every missing pattern a factorisation. Category and binary
        columns take their most frequent value in 100 imputations instead.
        """
        model = require(self.model, Conditional, "impute_mean")
        batches = list(self._batches(x))
        flat = verbs.thin(self._flat, num_draws)
        filled = torch.cat([verbs.impute_mean(model, b, flat) for b in batches])
        kinds = self.schema.kinds
        discrete = [k for k, kind in enumerate(kinds) if kind in ("binary", "category")]
        raw = torch.cat(batches)
        if discrete and bool(raw[:, discrete].isnan().any()):
            gaps = raw[:, discrete].isnan().any(-1)
            coded = Dataset.from_codes(raw[gaps], self.schema)
            copies = self.impute(coded, num_samples=100)
            filled[gaps.nonzero(), torch.tensor(discrete)] = copies[..., discrete].mode(0).values
        return filled

    def condition(
        self, x: object, observed: Sequence[str | int] | None = None, *, num_draws: int = 200
    ) -> Conditioned:
        r"""The predictive distribution of some columns given the others, row by row.

        .. math::
            p(x_m \mid x_o, D) = \sum_s w_s\, p(x_m \mid x_o, \theta_s), \qquad
            w_s \propto p(x_o \mid \theta_s)

        so that it is the ratio of two posterior predictive densities of new rows. It uses up to
        ``num_draws`` evenly spaced draws.

        Args:
            x: Rows ``(n, d)``; entries of other columns than the observed ones are not read.
            observed: Names or positions of the columns that are given; by default those without a
                ``NaN``, which must be the same in all rows.
            num_draws: Draws at most.

        Raises:
            ValueError: An unknown column, all of them, rows with different gaps, or a given entry
                that is missing.
            TypeError: The model has no conditional distributions.
        """
        from bayesgen.conditional import condition

        return condition(self, x, observed, num_draws=num_draws)

    # ------------------------------------------------------------ verdicts
    def outliers(
        self,
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
        """Which rows do not belong, at most a share ``fdr`` of the calls wrong on average.

        See :func:`bayesgen.outliers.outliers` for the arguments and for what is guaranteed.
        """
        from bayesgen.outliers import outliers

        return outliers(
            self,
            x,
            fdr=fdr,
            calibration=calibration,
            fraction=fraction,
            folds=folds,
            dependence=dependence,
            generator=generator,
            seed=seed,
        )

    def cell_weights(self, x: object) -> Tensor:
        """How much each cell of the rows counts, ``(n, d)``, by the posterior of a robust model.

        About one for a cell that fits its row, near zero for an outlying one; ``NaN`` where
        missing. Averaged over 100 evenly spaced draws at most.
        """
        model = require(self.model, Weighted, "cell_weights")
        return torch.cat([verbs.cell_weights(model, b, self._flat) for b in self._batches(x)])

    def verdict(self) -> Verdict:
        """PASS or FAIL with reasons in words and what to do; true when the fit can be trusted.

        See :func:`bayesgen.verdict.judge` for what is checked.
        """
        return self._verdict

    @cached_property
    def _verdict(self) -> Verdict:
        from bayesgen.verdict import judge

        return judge(self)

    def summary(self) -> Summary:
        """What was fitted, how well it mixed, and the posterior's table; ``print`` it."""
        return self._summary

    @cached_property
    def _summary(self) -> Summary:
        from bayesgen.summary import Summary

        return Summary(self)

    @cached_property
    def invariants(self) -> dict[str, Tensor]:
        """Quantities that the symmetry leaves alone, each ``(chain, draw, ...)``; may be empty."""
        found: dict[str, Tensor] = {}
        if isinstance(self.model, Symmetric):
            found |= self.model.invariants(self.draws)
        if "num_occupied" in self.sample_stats:  # the labels are gone, but the engine counted them
            found.setdefault("num_occupied", self.sample_stats["num_occupied"].to(torch.float64))
        return found

    def prior_predictive(self, num_samples: int = 500, *, seed: int = 0) -> PriorPredictive:
        """What the model believed before it saw the data; ``.plot()`` shows it beside them.

        Raises:
            ValueError: A flat prior, which has no draws.
        """
        from bayesgen.predictive import sample_prior

        return sample_prior(
            self.model, self.data, num_samples=num_samples, seed=seed, device=self.device
        )

    def sensitivity(self, *, sites: Sequence[str] | None = None) -> Sensitivity:
        """How much each quantity hangs on the prior, and how much on the data.

        See :func:`bayesgen.sensitivity.sensitivity`.
        """
        from bayesgen.sensitivity import sensitivity

        return sensitivity(self, sites=sites)

    def graph(self) -> Graph:
        """The model as a graph: ``print`` gives Mermaid, ``dot()`` DOT, ``svg()`` a picture.

        Plates are subgraphs, observed sites are shaded, computed ones dashed.

        Raises:
            TypeError: The model has no Pyro program.
        """
        from bayesgen.relations import graph

        return graph(self)

    @cached_property
    def arviz(self) -> Any:
        """The fit for ArviZ: ``InferenceData`` with ArviZ 0.2x, a ``DataTree`` with 1.x."""
        from bayesgen.diagnostics import to_arviz

        return to_arviz(self)

    # ------------------------------------------------------------ places
    def save(self, path: str | PathLike[str], *, include_data: bool | None = None) -> None:
        """Save into a folder, atomically; :func:`load` gives it back bit by bit.

        Everything is safetensors and JSON. For ArviZ's netCDF say ``fit.arviz.to_netcdf(file)``.

        Args:
            path: The folder, new or an earlier save.
            include_data: Whether the training data are saved too, so that diagnostics and
                calibration keep working; by default when they are in memory and at most 64 MiB.
        """
        from bayesgen.saving import write_fit

        write_fit(self, path, include_data=include_data)

    @staticmethod
    def load(path: str | PathLike[str], model: type[Model] | None = None) -> Fit:
        """Load a saved fit; see :func:`load`."""
        fit = load(path, model)
        if not isinstance(fit, Fit):
            raise ValueError(
                f"{path} holds a {type(fit).__name__}, not a single fit: use bayesgen.load."
            )
        return fit

    def to(self, device: torch.device | str) -> Fit:
        """The same fit with every tensor on ``device``."""
        where = torch.device(device)
        model = self.model.to(where)
        guide = None if self.guide is None else self.guide.moved(model, self.data, where)
        return dataclasses.replace(
            self,
            model=model,
            guide=guide,
            draws=verbs.move(self.draws, where),
            posterior=verbs.move(self.posterior, where),
            sample_stats=verbs.move(self.sample_stats, where),
        )

    # ------------------------------------------------------------ private
    def _batches(self, x: object) -> Iterator[Tensor]:
        """Checked rows in batches, on the fit's device and in its dtype."""
        for batch in as_dataset(x, schema=self.schema).batches(_BATCH_SIZE):
            yield self._to(batch)

    def _to(self, rows: Tensor) -> Tensor:
        dtype = self._some.dtype if self._some.is_floating_point() else torch.float64
        return rows.to(self.device, dtype)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def load(path: str | PathLike[str], model: type[Model] | None = None) -> Fit | Any:
    """Load what :meth:`Fit.save` wrote, or a saved classifier; its scores are equal bit by bit.

    No code comes from the file. The model's class is found by its recorded name among the entry
    points of the group ``bayesgen.models`` that installed packages declare. The fit refits with
    the engine that made it where that is installed.

    Args:
        path: The folder.
        model: The model's class, for models that no package declares.

    Returns:
        A :class:`Fit`; or what else was saved, such as a
        :class:`~bayesgen.models.classifier.ClassifierFit`.

    Raises:
        FileNotFoundError: There is no finished save in the folder.
        ValueError: It is damaged, foreign, of a newer version, or of an unknown model.
    """
    from bayesgen.saving import read

    return read(path, model)
