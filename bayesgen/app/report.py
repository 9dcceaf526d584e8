"""``bayesgen report``: what a fit says about itself, on one page that needs nothing else."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bayesgen
from bayesgen import plots
from bayesgen.app.page import Mark, Page
from bayesgen.capabilities import Encoder, Generative, Program, Simulated
from bayesgen.predictive import observed, replicated
from bayesgen.replication import posterior_predictive_check
from bayesgen.storage import write_bytes
from bayesgen.verdict import MIN_DRAWS, is_markov

if TYPE_CHECKING:
    from bayesgen.fit import Fit

__all__ = ["page_of", "write_report"]

_ROWS = 60  # of the table
_REPLICATES = 15  # data sets of each of four chains
_MAX_ENTRIES = 2_000_000  # of the data that are replicated
_R_HAT = 1.01
_SMALL = 5  # scalars that a picture of all pairs shows


def write_report(fit: Fit, path: str | Path, *, force: bool = False) -> Path:
    """Write the report of a fit into one HTML file.

    Everything is inside it: style, pictures, the graph of the model. It needs no network and no
    script, reads on a telephone, and every picture says in words what it shows.

    Args:
        fit: Any fit, a plain program's too.
        path: The file.
        force: Replace a file that exists.

    Returns:
        The path.

    Raises:
        ValueError: The file exists, or has another suffix than ``.html``.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {path}: a report is an .html file.")
    if target.exists() and not force:
        raise ValueError(f"--out {path} exists; add --force to replace it.")
    if not target.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {target.parent}.")
    write_bytes(target, page_of(fit).encode())
    return target


def page_of(fit: Fit) -> str:
    """The report as HTML."""
    page = Page(None, _title(fit), _lead(fit))
    _verdict(page, fit)
    for part in (_model, _posterior, _chains, _history, _checks, _density, _facts):
        part(page, fit)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page.html(f"bayesgen {bayesgen.__version__}, written {now}.")


def _title(fit: Fit) -> str:
    return f"{_model_name(fit)} by {fit.attrs.get('engine', 'an unnamed engine')}"


def _model_name(fit: Fit) -> str:
    return str(getattr(fit.model, "name", type(fit.model).__name__))


def _lead(fit: Fit) -> str:
    seconds = fit.attrs.get("seconds")
    time = f" Fitted in {seconds:.3g} s." if seconds is not None else ""
    rows = fit.attrs.get("num_rows")
    data = f", {rows:,} rows of data" if rows else ""
    chains = f"{fit.num_chains:,} chain{'s' * (fit.num_chains != 1)}"
    return f"{chains} of {fit.num_draws:,} draw{'s' * (fit.num_draws != 1)}{data}.{time}"


# ---------------------------------------------------------------- parts
def _verdict(page: Page, fit: Fit) -> None:
    verdict = fit.verdict()
    lines = [f"{f.message} {f.advice}" for f in (*verdict.failures, *verdict.cautions)]
    lines += [f"{text[:1].upper()}{text[1:]}." for text in verdict.passed]
    headline = "PASS: nothing speaks against this posterior"
    if not verdict:
        headline = "FAIL: do not use these draws yet"
    elif verdict.cautions:
        headline = "PASS, with cautions"
    page.banner(headline, lines, good=bool(verdict))


def _model(page: Page, fit: Fit) -> None:
    page.section("Model", "What was fitted, and what depends on what.")
    if isinstance(fit.model, Program | Simulated):
        graph = fit.graph()
        told = ", ".join(f"{b} on {a}" for a, b in graph.edges)
        page.drawing(
            graph.svg(),
            "Sites of the model; observed ones are shaded, computed ones dashed, boxes are "
            f"plates with their sizes. Dependencies: {told or 'none'}.",
        )
        page.snippet(graph.mermaid(), label="the graph as Mermaid", is_shell=True)
    page.text(str(fit.model))


def _posterior(page: Page, fit: Fit) -> None:
    summary = fit.summary()
    table = summary.judged[summary.judged["sd"] != 0.0]  # zeros of a triangle say nothing
    kept = [c for c in table.columns if not c.startswith("mcse")]
    table = table[[c for c in kept if c != "r_hat" or table[c].notna().any()]]
    rest = len(summary.table) - min(_ROWS, len(table))
    more = f" {rest} more rows stand in fit.summary().table." if rest else ""
    page.section("Posterior", f"What is known now about each parameter.{more}")
    rows = [
        (name, *(_cell(str(column), value) for column, value in row.items()))
        for name, row in table[:_ROWS].iterrows()
    ]
    page.table(("entry", *table.columns), rows, caption="Posterior of each entry")
    for message in fit.attrs.get("messages", []):
        page.facts([("note", message)])


def _cell(column: str, value: Any) -> Any:
    number = float(value)
    if math.isnan(number):
        return ""
    if column == "r_hat":
        return f"{number:.3f}" if number <= _R_HAT else Mark(f"{number:.3f}", good=False)
    return round(number) if column.startswith("ess") else number


def _chains(page: Page, fit: Fit) -> None:
    if fit.num_draws < MIN_DRAWS or not _moves(fit):
        return
    scalars = [
        name
        for name, value in fit.draws.items()
        if value.ndim == 2 and value.is_floating_point() and name in fit.summary().judged.index
    ]
    pairs = 2 <= len(scalars) <= _SMALL
    if is_markov(fit):
        page.section("Chains", "Whether the draws can be trusted, as pictures.")
        page.picture(
            plots.chains(fit, max_rows=6),
            "chains",
            "For each quantity its density by chain, its trace, and how often each chain's draws "
            "take which rank among all: good chains lie on top of each other, wander fast, and "
            "stay within the grey band.",
            is_wide=True,
        )
    elif pairs:  # independent draws of an approximation have no trace
        page.section("Draws", "What the approximation looks like.")
    if "energy" in fit.sample_stats and fit.num_draws > 2:
        page.picture(
            plots.energy(fit),
            "energy",
            "Energies of the draws beside their changes from draw to draw; changes that are much "
            "narrower mean slow tails.",
        )
    if pairs:
        page.picture(
            plots.draw_pairs(fit, scalars),
            "pairs",
            f"Draws of every pair of {', '.join(scalars)}; divergent ones in orange.",
            is_wide=len(scalars) > 3,
        )


def _moves(fit: Fit) -> bool:
    table = fit.summary().judged
    return bool((table["sd"] > 0).any())


def _history(page: Page, fit: Fit) -> None:
    known = [n for n in ("elbo", "loss", "objective", "log_likelihood") if n in fit.history]
    if not known and fit.sample_stats.get("lp") is None:
        return
    page.section("Run", "How the run went.")
    for name in known[:1] or ["lp"]:
        page.picture(
            plots.trace(fit, name=name),
            "history",
            f"The record '{name}' over the run: it should have settled long before the end.",
        )


def _checks(page: Page, fit: Fit) -> None:
    """Replicated data beside the data."""
    if isinstance(fit.model, Simulated):
        held = observed(fit)
    elif isinstance(fit.model, Generative) and fit.data is not None and fit.data.in_memory:
        held = observed(fit)
    else:
        return
    if not held or sum(value.numel() for value in held.values()) > _MAX_ENTRIES:
        return
    page.section(
        "Does the model resemble the data?",
        "Data sets replicated from the posterior, beside the data.",
    )
    count = max(1, 4 * _REPLICATES // fit.num_chains)
    copies = {k: v.flatten(0, 1) for k, v in replicated(fit, count).items()}
    columns = None if isinstance(fit.model, Simulated) else {"x": fit.columns}
    page.picture(
        plots.predictive(copies, held, columns=columns),
        "predictive",
        "Distribution of the data (thick) among those of replicated data sets (thin): where the "
        "thick line leaves the bundle, the model cannot produce what the data show.",
        is_wide=True,
    )
    check = posterior_predictive_check(fit, num_samples=100)
    page.picture(
        plots.predictive_check(check, max_panels=12),
        "check",
        "The statistics of the data (line) that fit worst, among those of replicated data sets "
        f"(bars): the smallest p-value of {len(check.p_values)} is "
        f"{min(check.p_values.values()):.2g}.",
        is_wide=True,
    )


def _density(page: Page, fit: Fit) -> None:
    is_mixture = isinstance(fit.model, Encoder) and "weights" in fit.draws
    if not is_mixture or fit.data is None or not fit.data.in_memory:
        return
    page.section("Clusters", "The fitted density, and the rows.")
    width = len(fit.columns)
    drawn = plots.density(fit) if width <= 2 else plots.pairs(fit, columns=fit.columns[:4])
    page.picture(
        drawn,
        "density",
        f"Posterior predictive density of {', '.join(fit.columns[:4])} with the training rows.",
        is_wide=width > 2,
    )
    if "num_occupied" in fit.sample_stats:
        page.picture(
            plots.occupied(fit), "occupied", "Posterior distribution of the number of clusters."
        )


def _facts(page: Page, fit: Fit) -> None:
    page.section("How to get it again", "Settings, data and versions of this run.")
    attrs = fit.attrs
    settings = attrs.get("settings", {})
    pairs: list[tuple[str, Any]] = [
        ("engine", f"{attrs.get('engine')}({', '.join(f'{k}={v}' for k, v in settings.items())})"),
        ("seed", attrs.get("seed", "not recorded")),
        ("rows", attrs.get("num_rows", "not recorded")),
        ("columns", ", ".join(fit.columns[:30]) or "those of the program"),
        ("data fingerprint", attrs.get("data_fingerprint", "not recorded")),
        ("computed on", f"{attrs.get('device', '?')}, {attrs.get('dtype', '?')}"),
        *((f"version of {k}", v) for k, v in attrs.get("versions", {}).items()),
    ]
    page.facts(pairs)
