"""Can this posterior be trusted? PASS or FAIL, with reasons in words and what to do about each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesgen.arviz_groups import convert, summarise
from bayesgen.lone_chains import lone_chains
from bayesgen.nested import nested_r_hat
from bayesgen.psis import weight_efficiency

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = ["Finding", "Verdict", "is_markov", "judge"]

MIN_DRAWS = 4
"""Fewer, and ArviZ has no R-hat, effective size or Monte Carlo error."""
_R_HAT = 1.01
_ESS = 400.0
_E_BFMI = 0.3
_K_HAT = 0.7
_NEARLY_ALL = 0.95  # of the draws, by their weights: the approximation's body is right
_LEFT_OUT = 0.05  # of the mass, by modes that an approximation leaves out
_SAMPLED = 200  # entries judged of sites that are too large for the table
_FEW = 20
_MIN_ENERGIES = 50  # draws of all chains, for an E-BFMI worth reading


@dataclass(frozen=True)
class Finding:
    """One thing that speaks against a posterior."""

    code: str
    """Such as ``r_hat``, ``apart``, ``ess``, ``divergences``, ``e_bfmi``, ``k_hat``, ``modes`` or
    ``labels``."""
    message: str
    """What was found, with its number."""
    advice: str
    """What to do about it."""
    is_fatal: bool = True
    """Whether it fails the fit; otherwise it is a caution."""


@dataclass(frozen=True)
class Verdict:
    """PASS or FAIL; ``bool`` tells which, ``str`` tells why and what to do.

    Example:
        >>> bad = Finding("divergences", "3 of 400 trajectories diverged.", "Raise target_accept.")
        >>> print(Verdict((bad,), ("R-hat at most 1.003",)))
        FAIL
          ! 3 of 400 trajectories diverged.
            Raise target_accept.
          + R-hat at most 1.003
        >>> bool(Verdict((), ()))
        True
    """

    findings: tuple[Finding, ...]
    """Failures first, then cautions."""
    passed: tuple[str, ...]
    """What was checked and is in order, in words."""

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Findings that fail the fit."""
        return tuple(f for f in self.findings if f.is_fatal)

    @property
    def cautions(self) -> tuple[Finding, ...]:
        """Findings that do not."""
        return tuple(f for f in self.findings if not f.is_fatal)

    def __str__(self) -> str:
        lines = ["PASS" if self else "FAIL"]
        for finding in (*self.failures, *self.cautions):
            lines.append(f"  {'!' if finding.is_fatal else '.'} {finding.message}")
            if finding.advice:
                lines.append(f"    {finding.advice}")
        return "\n".join([*lines, *(f"  + {text}" for text in self.passed)])

    __repr__ = __str__


def judge(fit: Fit) -> Verdict:
    r"""Judge a fit by what its engine and its draws tell.

    * the engine reached its own criterion;
    * draws of Markov chains: :math:`\hat R \le 1.01` (rank-normalised, split) and bulk and tail
      effective sample sizes of at least 400, for every entry of the aligned draws and of the
      invariant quantities; empty components are exchangeable and are left out;
    * of eight chains or more, none that sits apart from the others
      (:mod:`bayesgen.lone_chains`);
    * no divergent trajectory, and an energy fraction E-BFMI of at least 0.3 in every chain;
    * draws of an approximation: Pareto :math:`\hat k \le 0.7` where the engine gave one, and no
      modes beside its own that hold more than a twentieth of the mass.

    Of many short chains in superchains :math:`\hat R` is the nested one
    (:func:`bayesgen.nested.nested_r_hat`). Its noise is of order one over the draws of a (super)
    chain, so a few hundred draws may fail though the chains agree: the cure is the same, more
    draws. Ambiguous labels are a caution: the posterior is right, the names of its components are
    not.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), Rank-normalization, folding, and
        localization: an improved R-hat for assessing convergence of MCMC.
        Betancourt (2016), Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte
        Carlo.
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational
        inference.

    Args:
        fit: The fit.
    """
    passed: list[str] = []
    findings = [*_engine(fit), *_mixing(fit, passed), *_hamiltonian(fit, passed)]
    findings += [*_approximation(fit, passed), *_labels(fit)]
    findings.sort(key=lambda finding: not finding.is_fatal)
    return Verdict(tuple(findings), tuple(passed))


def _engine(fit: Fit) -> Iterator[Finding]:
    if fit.attrs.get("converged") is False:
        settings = fit.attrs.get("settings") or {}
        lengths = ("max_steps", "num_steps", "num_samples")
        length = next((name for name in lengths if name in settings), lengths[0])
        yield Finding(
            "converged",
            "the engine stopped before it converged.",
            f"Let it run longer: raise {length}, or continue with resume=...",
        )


# ---------------------------------------------------------------- chains
def is_markov(fit: Fit) -> bool:
    """Whether draws come from Markov chains, and not independently from an approximation."""
    return fit.posterior is None and "k_hat" not in fit.attrs


def _mixing(fit: Fit, passed: list[str]) -> Iterator[Finding]:
    if not is_markov(fit) or fit.num_draws < MIN_DRAWS:
        return
    table = _table(fit)
    yield from _r_hat(fit, table["r_hat"].dropna(), passed)
    yield from _apart(fit)
    smallest = table[["ess_bulk", "ess_tail"]].min(axis=1).dropna()
    if not len(smallest):
        return
    low = float(smallest.min())
    if low >= _ESS:
        passed.append(f"effective sample sizes of at least {low:,.0f}")
        return
    count = int((smallest < _ESS).sum())
    draws = math.ceil(fit.num_draws * _ESS / max(low, 1.0) / 100) * 100
    yield Finding(
        "ess",
        f"the effective sample size is only {_beyond(low, _ESS)} for {smallest.idxmin()}, "
        f"and below {_ESS:.0f} for {_entries(count)}.",
        f"Draw more: about num_samples={draws:,} would do, if chains have found the posterior; "
        "or reparametrise, so that they move faster.",
    )


def _r_hat(fit: Fit, r_hat: pd.Series[float], passed: list[str]) -> Iterator[Finding]:
    if fit.num_chains == 1:
        yield Finding(
            "chains",
            "there is one chain only, so nothing says whether another start ends elsewhere.",
            "Run four chains.",
            is_fatal=False,
        )
        return
    if not len(r_hat):
        return
    groups = fit.attrs.get("num_superchains", 0)
    name = "nested R-hat" if groups > 1 else "R-hat"
    worst = float(r_hat.max())
    if worst <= _R_HAT:
        passed.append(f"{name} at most {worst:.3f}")
        return
    other = ", such as NUTS(start='pathfinder')" if "diverging" in fit.sample_stats else ""
    yield Finding(
        "r_hat",
        f"{name} is {_beyond(worst, _R_HAT)} for {r_hat.idxmax()}, and above {_R_HAT} for "
        f"{_entries(int((r_hat > _R_HAT).sum()))}: chains have not found the same posterior.",
        "Run longer, with more warm-up; if it stays, look at plots.trace(fit): chains in "
        "different modes need another parametrisation, a tighter prior or a better start"
        f"{other}.",
    )


def _apart(fit: Fit) -> Iterator[Finding]:
    """Few chains in a mode of their own, too few among many to raise R-hat."""
    chains: set[int] = set()
    farthest, where = 0.0, ""
    for name, value in {**fit.invariants, **fit.aligned.draws}.items():
        readable = fit.summary().is_readable(name, value)
        entries = np.flatnonzero(readable)
        if not len(entries) or value.shape[1] < MIN_DRAWS:
            continue
        found = lone_chains(value.reshape(*value.shape[:2], -1)[..., entries])
        if found is None:
            continue
        chains |= set(found.chains)
        if found.distance > farthest:
            index = (
                np.unravel_index(entries[found.entry], value.shape[2:]) if value.ndim > 2 else ()
            )
            farthest, where = (
                found.distance,
                name + (str([int(i) for i in index]) if index else ""),
            )
    if not chains:
        return
    some = ", ".join(str(c) for c in sorted(chains)[:5]) + (", ..." if len(chains) > 5 else "")
    one = len(chains) == 1
    yield Finding(
        "apart",
        f"{len(chains)} of {fit.num_chains} chains ({some}) {'sits' if one else 'sit'} apart from "
        f"the others, in {where} by {farthest:.1f} standard deviations: they count as if their "
        f"place held {len(chains) / fit.num_chains:.2g} of the posterior, which nothing shows.",
        "Give more warm-up or start='pathfinder', and see whether they join the others; a mode "
        "that stays has a weight which no count of chains can tell.",
    )


def _beyond(value: float, limit: float) -> str:
    """A number with as many digits as show on which side of the limit it is."""
    for digits in range(3, 16):
        if float(text := f"{value:.{digits}g}") != limit:
            break
    return text


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _table(fit: Fit) -> pd.DataFrame:
    """R-hat and effective sizes of the entries that are judged, as floats."""
    import pandas as pd

    summary = fit.summary()
    columns = ["r_hat", "ess_bulk", "ess_tail"]
    tables = [summary.judged[columns].astype(float)]
    for name in summary.left_out:  # too large for the table, but not above the law
        value = fit.aligned.draws[name]
        index = np.flatnonzero(summary.is_readable(name, value))
        index = index[np.unique(np.linspace(0, len(index) - 1, _SAMPLED).round().astype(int))]
        entries = value.reshape(*value.shape[:2], -1)[..., index]
        some = entries.cpu().numpy()
        part = summarise(convert({"posterior": {name: some}}, coords={}, dims={}))
        part.index = [f"{name}[{i}]" for i in index]
        groups = fit.attrs.get("num_superchains", 0)
        if groups > 1:
            part["r_hat"] = nested_r_hat(entries, groups).numpy()
        tables.append(part[columns].astype(float))
    table = pd.concat(tables)
    # Quantiles of what takes few values are those values: their effective size means nothing.
    coarse = _coarse(fit)
    table.loc[[name.partition("[")[0] in coarse for name in table.index], "ess_tail"] = math.nan
    return table


def _coarse(fit: Fit) -> set[str]:
    values = {**fit.invariants, **fit.aligned.draws}
    first = {k: v.flatten(2)[..., 0] if v.ndim > 2 else v for k, v in values.items()}
    return {name for name, value in first.items() if len(value.unique()) <= _FEW}


def _hamiltonian(fit: Fit, passed: list[str]) -> Iterator[Finding]:
    stats = fit.sample_stats
    if "diverging" in stats:
        count, total = int(stats["diverging"].sum()), stats["diverging"].numel()
        if count:
            yield Finding(
                "divergences",
                f"{count:,} of {total:,} trajectories diverged: the posterior has a region too "
                "narrow for the step size, and the draws miss it.",
                "Raise target_accept to 0.95 or 0.99; write hierarchical models non-centred "
                "(mu + tau * raw); give scales a prior that keeps them from zero.",
            )
        else:
            passed.append("no divergent trajectory")
    if "energy" in stats and stats["energy"].numel() >= _MIN_ENERGIES and fit.num_draws > 2:
        lowest = _e_bfmi(stats["energy"])
        if lowest < _E_BFMI:
            yield Finding(
                "e_bfmi",
                f"E-BFMI is {_beyond(lowest, _E_BFMI)}, below {_E_BFMI}: momenta are too weak to "
                "cross the posterior's energies, and its tails are explored slowly.",
                "Reparametrise heavy tails and funnels (non-centred, a log scale), or run longer.",
            )
        else:
            passed.append(f"E-BFMI at least {lowest:.2f}")


def _e_bfmi(energy: Any) -> float:
    """Smallest over chains; of all chains together where each is short."""
    energy = energy.double()
    change, spread = energy.diff(dim=1).square().mean(1), energy.var(1, correction=0)
    if energy.shape[1] < _MIN_ENERGIES:
        change, spread = change.mean(0, keepdim=True), spread.mean(0, keepdim=True)
    return float((change / spread.clamp_min(1e-300)).min())


# ---------------------------------------------------------------- approximations and labels
def _approximation(fit: Fit, passed: list[str]) -> Iterator[Finding]:
    k_hat = fit.attrs.get("k_hat")
    if k_hat is None:
        if fit.posterior is not None or "k_hat" in fit.attrs:
            yield Finding(
                "approximation",
                "the posterior is approximated, and nothing here says how well.",
                "Compare it with a sampler: agreement({'NUTS': ..., 'VB': ...}).",
                is_fatal=False,
            )
        return
    weights = fit.sample_stats.get("log_weight")
    share = math.nan if weights is None else weight_efficiency(weights)
    said = "" if math.isnan(share) else f" (the weights make the draws worth {share:.0%} of them)"
    if k_hat > _K_HAT or math.isnan(k_hat):
        wrong = "the approximation is far from the posterior, and means and intervals may be wrong"
        if share > _NEARLY_ALL:
            wrong = "means and intervals are near the posterior's, but its tails reach beyond the "
            wrong += "draws, and what hangs on rare events may be wrong"
        yield Finding(
            "k_hat",
            f"Pareto k-hat is {_beyond(k_hat, _K_HAT)}, above {_K_HAT}{said}: {wrong}.",
            "Use a richer guide (AutoMultivariateNormal, a normalising flow), reparametrise, or "
            "sample with NUTS.",
        )
    else:
        passed.append(f"Pareto k-hat {k_hat:.2f}{said}")
    yield from _modes(fit)


def _modes(fit: Fit) -> Iterator[Finding]:
    """Modes that an approximation knows of and leaves out."""
    heights = [mode["log_evidence"] for mode in fit.attrs.get("modes", ())]
    if len(heights) < 2:
        return
    outside = 1.0 - 1.0 / sum(math.exp(min(height - heights[0], 700.0)) for height in heights)
    yield Finding(
        "modes",
        f"there are {len(heights)} modes that differ, and the draws leave {outside:.1%} of their "
        "mass out.",
        "Sample with NUTS(start='pathfinder'), or write a program with one mode.",
        is_fatal=outside > _LEFT_OUT,
    )


def _labels(fit: Fit) -> Iterator[Finding]:
    if fit.aligned.is_ambiguous:
        yield Finding(
            "labels",
            fit.aligned.message,
            "Read what no relabelling changes: fit.summary().invariants.",
            is_fatal=False,
        )
