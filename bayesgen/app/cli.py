"""The command line: options in, one action called; whatever is heavy loads inside a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

import bayesgen
from bayesgen.app.guard import GuardedGroup

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _set_traceback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["bayesgen.traceback"] = value or ctx.meta.get("bayesgen.traceback", False)


_traceback = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_set_traceback,
    help="Show where an error came from.",
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
_force = click.option("--force", is_flag=True, help="Replace what --out names.")
_seed = click.option(
    "--seed", type=int, default=0, show_default=True, help="Same seed, same result."
)
_run = click.argument("run")
_data = click.argument("data")
_out = click.option(
    "--out",
    default="-",
    metavar="FILE",
    help="Where to: .csv, .tsv, .parquet or .npy; '-' (the default) is CSV on stdout.",
)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Several options at once, with what every command has."""

    def wrap(function: F) -> F:
        for decorator in reversed((*decorators, _traceback)):
            function = decorator(function)
        return function

    return wrap


@click.group(cls=GuardedGroup, context_settings=_HELP)
@click.version_option(bayesgen.__version__, prog_name="bayesgen")
@_traceback
def cli() -> None:
    """Bayesian generative models: fit, diagnose, generate, fill gaps, find what does not belong.

    DATA is a .csv, .tsv, .parquet or .npy file, the name of a bundled data set (faithful,
    galaxies, iris, wine, breast_cancer, digits), or '-' for CSV on stdin. RUN is a folder that
    `fit` wrote.

    \b
      bayesgen fit GaussianMixture faithful --set num_components=10 --out runs/first
      bayesgen summary runs/first
      bayesgen report runs/first
      bayesgen outliers runs/first new.csv --fdr 0.05 --out outliers.csv
    """  # noqa: D301


@cli.command(short_help="List models and engines, and what can be set.")
@click.argument("name", required=False)
@_options()
def models(name: str | None) -> None:
    """List models and engines, and what can be set on them; NAME shows one with its arguments."""
    from bayesgen.app import catalogue

    click.echo(catalogue.overview() if name is None else catalogue.detail(name))


@cli.command(short_help="Check the installation.")
@_options()
def doctor() -> int:
    """Check the installation: versions, devices, threads, a write, and a fit of one second."""
    from bayesgen.app.doctor import examine

    return examine()


@cli.command(short_help="Fit a model to data.")
@click.argument("model")
@_data
@click.option(
    "--engine",
    default="vb",
    show_default=True,
    help="vb, gibbs, em, nuts, or any other that `bayesgen models` lists.",
)
@click.option("--set", "model_settings", multiple=True, metavar="NAME=VALUE", help="Of the model.")
@click.option(
    "--engine-set", "engine_settings", multiple=True, metavar="NAME=VALUE", help="Of the engine."
)
@click.option("--out", required=True, metavar="RUN", help="A new folder for the fit.")
@click.option("--columns", metavar="A,B", help="Columns to keep; all by default.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="COLUMN=KIND",
    help="real, count, binary or category instead of the learnt kind; KIND alone is for all.",
)
@click.option(
    "--target", metavar="COLUMN", help="The classes, for MixtureClassifier; 'target' if bundled."
)
@click.option("--resume", is_flag=True, help="Go on with an unfinished run.")
@click.option(
    "--calibrate/--no-calibrate",
    help="Refit on a part to calibrate outliers now, and keep that in the run.",
)
@click.option("--folds", type=int, metavar="K", help="Calibrate by K refits, on all rows.")
@_options(_seed, _force, _quiet)
def fit(columns: str | None, kinds: tuple[str, ...], **asked: Any) -> int:
    """Fit MODEL to DATA and save the fit in the folder RUN.

    Ctrl-C keeps the fit so far; --resume then goes on from there, exactly as if it had never
    stopped. `bayesgen models` lists what --set and --engine-set take.

    \b
      bayesgen fit MixtureClassifier flowers.csv --target species \\
          --set 'model=GaussianMixture(3)' --out runs/species
    """  # noqa: D301
    from bayesgen.app import fitting

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    return fitting.run(fitting.Job(**asked, columns=names, kinds=_kinds(kinds)))


def _kinds(given: tuple[str, ...]) -> Any:
    from bayesgen.schema import KINDS

    found: dict[str, str] = {}
    for text in given:
        column, equals, kind = text.rpartition("=")
        if kind not in KINDS:
            raise click.UsageError(f"--kind {text}: the kind must be one of {', '.join(KINDS)}.")
        if not equals and len(given) > 1:
            raise click.UsageError(f"--kind {text} is for all columns and must stand alone.")
        if not equals:
            return kind
        found[column] = kind
    return found or None


@cli.command(short_help="Say what was fitted and whether to trust it.")
@_run
@click.option("--out", metavar="FILE", help="The whole table into a file instead.")
@_options(_force)
def summary(run: str, out: str | None, force: bool) -> None:
    """What was fitted, whether it converged, and the posterior's table."""
    from bayesgen.app import actions

    actions.summary(run, out=out, force=force)


@cli.command(short_help="Write a page about a fit: verdict, tables, pictures.")
@_run
@click.option("--out", metavar="FILE", help="An .html file; report.html in RUN by default.")
@_options(_force, _quiet)
def report(run: str, out: str | None, force: bool, quiet: bool) -> None:
    """One HTML page about RUN: verdict, tables, pictures, graph of the model, versions."""
    from bayesgen.app import actions

    actions.report(run, out=out, force=force, quiet=quiet)


@cli.command(short_help="Score rows by their log density.")
@_run
@_data
@_options(_out, _force)
def score(run: str, data: str, out: str, force: bool) -> None:
    """Log posterior predictive density of each row of DATA, in nats; gaps are integrated out."""
    from bayesgen.app import actions

    actions.score(run, data, out=out, force=force)


@cli.command(short_help="Label each row with its cluster or class.")
@_run
@_data
@_options(_out, _force)
def predict(run: str, data: str, out: str, force: bool) -> None:
    """The cluster of each row of DATA, or its class by a classifier, and its probability."""
    from bayesgen.app import actions

    actions.predict(run, data, out=out, force=force)


@cli.command(short_help="Say which rows do not belong.")
@_run
@_data
@click.option(
    "--fdr",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=0.05,
    help="Share of false calls.",
    show_default=True,
)
@click.option(
    "--calibration",
    metavar="DATA|model",
    help="Clean rows that the fit has not seen; or 'model': trust the fit, no guarantee.",
)
@click.option("--folds", type=int, metavar="K", help="Calibrate by K refits, on all rows.")
@click.option("--explain", is_flag=True, help="Add how surprising each entry is, in nats.")
@_options(_seed, _out, _force, _quiet)
def outliers(run: str, data: str, **asked: Any) -> None:
    """Which rows of DATA do not belong, at most a share FDR of the calls wrong on average."""
    from bayesgen.app import actions

    actions.outliers(run, data, **asked)


@cli.command(short_help="Draw new rows.")
@_run
@click.option("-n", "num_samples", type=click.IntRange(min=1), default=100, show_default=True)
@_options(_seed, _out, _force)
def sample(run: str, num_samples: int, seed: int, out: str, force: bool) -> None:
    """N new rows, drawn from the fit; a classifier's come with their classes."""
    from bayesgen.app import actions

    actions.sample(run, num_samples, seed=seed, out=out, force=force)


@cli.command(short_help="Fill gaps.")
@_run
@_data
@click.option(
    "-n",
    "num_samples",
    type=click.IntRange(min=1),
    help="N random completions instead of one mean.",
)
@_options(_seed, _out, _force)
def impute(run: str, data: str, num_samples: int | None, seed: int, out: str, force: bool) -> None:
    """DATA with its gaps filled from the rest of each row."""
    from bayesgen.app import actions

    actions.impute(run, data, num_samples=num_samples, seed=seed, out=out, force=force)


@cli.command(short_help="The main job on real data, with pictures.")
@click.option("--out", required=True, metavar="DIR", help="A new folder for pictures and page.")
@_options(_force, _quiet)
def demo(out: str, force: bool, quiet: bool) -> int:
    """The main job on real data: pictures, outliers, gaps, and a page that shows them."""
    from bayesgen.app.demo import make

    return make(out, force=force, quiet=quiet)


def main() -> None:
    """Run the command line."""
    cli(prog_name="bayesgen")
