"""Settings read from signatures, values read from text, progress."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Literal

import pytest
import torch

from bayesgen import priors
from bayesgen.app.guard import Misuse
from bayesgen.app.progress import live_numbers, progress
from bayesgen.app.registry import ENGINES, MODELS, build, find, names, settings, story
from bayesgen.app.values import parse_value, type_name
from bayesgen.inference import VB, Gibbs
from bayesgen.inference.run import Progress

__all__: list[str] = []


def maker(
    size: int,
    name: str = "x",
    *,
    rate: float | None = None,
    mode: Literal["fast", "slow"] = "fast",
    hidden: int = 0,
) -> dict[str, Any]:
    """Make a thing.

    More of it.

    Args:
        size: How large
            it is.
        name: Its ``name``, a :class:`~builtins.str`.
        rate: How fast.
        mode: Which way.

    Raises:
        ValueError: hidden: never.
    """
    return {"size": size, "name": name, "rate": rate, "mode": mode, "hidden": hidden}


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesgen.app.registry.find", lambda *_: maker)


def test_settings_are_the_documented_arguments():
    found = settings(maker)
    assert list(found) == ["size", "name", "rate", "mode"]
    assert found["size"].required
    assert found["size"].help == "How large it is."
    assert found["name"].help == "Its name, a str."
    assert [str(s) for s in found.values()] == [
        "size: int",
        "name: text = x",
        "rate: float or none = none",
        "mode: fast|slow = fast",
    ]
    assert story(maker) == "Make a thing."


@pytest.mark.usefixtures("declared")
def test_assignments_become_arguments():
    made = build(MODELS, "thing", ["size=1_000", "rate=2", "mode=slow", "name=a=b"])
    assert made == {"size": 1000, "rate": 2.0, "mode": "slow", "name": "a=b", "hidden": 0}
    assert isinstance(made["rate"], float)
    assert build(MODELS, "thing", ["size=1", "rate=none"])["rate"] is None
    for wrong, words in (
        ("hidden=1", "no setting 'hidden'"),
        ("sise=1", "did you mean size"),
        ("mode=odd", "fast, slow"),
        ("rate=fast", "a number"),
        ("size.x=1", "priors"),
    ):
        with pytest.raises(Misuse, match=words):
            build(MODELS, "thing", ["size=1", wrong])


def test_every_declared_engine_and_model_can_be_read():
    for group in (MODELS, ENGINES):
        assert names(group)
        for name in names(group):
            found = settings(find(group, name))
            assert found, name
            assert all(setting.help for setting in found.values()), name


def test_priors_are_read_as_they_are_printed():
    prior: Any = Mapping[str, Any] | None
    for given in (
        priors.SymmetricDirichlet(0.5),
        priors.GammaDirichlet(1.0, 20.0),
        priors.StickBreaking(shape=2.0, rate=1.0),
    ):
        assert parse_value("x", priors.describe(given), prior, "weights") == given
    found = parse_value("x", "Dirichlet([1, 2.5])", prior, "weights")
    assert isinstance(found, torch.distributions.Distribution)
    assert found.concentration.tolist() == [1.0, 2.5]
    assert found.concentration.dtype == torch.float64
    wrong = "HierarchicalNormalInverseWishart([0.0], 0.1, -3, 1, [1.0])"
    with pytest.raises(Misuse, match="df=-3"):
        parse_value("x", wrong, prior, "components")
    assert type_name(prior) == "prior by site (name.site=...) or none"


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "().__class__", "Gaussian(open('x'))", "print"]
)
def test_no_code_runs_from_a_setting(text: str):
    with pytest.raises(Misuse):
        parse_value("x", text, dict[str, Any], "weights")


# ------------------------------------------------------------------ progress
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(callback: Any, count: int) -> None:
    for step in range(1, count + 1):
        callback(Progress("VB", step, 100, {"elbo": -10.25, "num_occupied": 2.0}, 0.5))


def test_numbers_in_words():
    assert live_numbers({"elbo": -1284.66, "num_occupied": 2.0}) == "ELBO -1284.7, clusters 2"


def test_a_bar_on_a_terminal():
    out = Terminal()
    with progress(VB(), stream=out) as (callback,):
        steps(callback, 5)
    shown = out.getvalue()
    assert "VB" in shown
    assert "ELBO -10.2, clusters 2" in shown
    assert "5 steps" in shown
    out = Terminal()
    with progress(Gibbs(num_samples=3, num_warmup=2), stream=out) as (callback,):
        steps(callback, 5)
    assert "5/5" in out.getvalue()  # a known end


def test_few_lines_elsewhere_and_none_when_quiet():
    out = io.StringIO()
    with progress(VB(), stream=out) as (callback,):
        steps(callback, 50)
    assert out.getvalue() == "VB: step 1, ELBO -10.2, clusters 2 (0.5 s)\n"
    out = io.StringIO()
    with progress(Gibbs(num_samples=50, num_warmup=0), stream=out) as (callback,):
        steps(callback, 50)
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        "Gibbs: step 1 of 50",
        "Gibbs: step 50 of 50",
    ]
    with progress(VB(), stream=out, quiet=True) as callbacks:
        assert callbacks == []


def test_an_engine_goes_by_its_class_so_that_a_saved_fit_can_refit():
    points = list(entry_points(group="bayesgen.engines"))
    assert points
    for point in points:
        assert point.name == point.load().__name__.lower()
