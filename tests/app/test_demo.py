"""The demo: its page in parts, and (slow) the whole, whose code must run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

import bayesgen
from bayesgen import datasets
from bayesgen.app.cli import cli
from bayesgen.app.demo import arviz_pictures, faithful, wine
from bayesgen.app.demo.background import Background
from bayesgen.app.page import Mark, Page
from bayesgen.inference import EM
from bayesgen.models import GaussianMixture

__all__: list[str] = []


class Links(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_page_holds_its_parts_and_nothing_from_elsewhere(tmp_path: Path):
    page = Page(tmp_path, "A <title>", "lead")
    page.section("One", "why")
    figure = Figure()
    page.picture(figure.subplots(), "one", "a caption with 'quotes' & <signs>", "x = 1 < 2")
    page.snippet("rm -r", label="shell", is_shell=True)
    page.table(("name", "count"), [("a", 1), ("b", 2.34567)])
    page.verdict(("", "all"), [("found", Mark("good news", good=True))])
    text = page.write("made by hand").read_text()
    assert Links(text).found == ["one.png"]
    assert (tmp_path / "one.png").stat().st_size > 0
    assert text.index("good news") < text.index("One")  # the verdict comes first
    assert "<td class='good'>good news" in text
    assert "<td class='number'>2.35</td>" in text
    assert "a caption with &#x27;quotes&#x27; &amp; &lt;signs&gt;" in text
    assert "A &lt;title&gt;" in text
    assert (tmp_path / "reproduce.py").read_text().endswith("\n\nx = 1 < 2\n")


@pytest.mark.parametrize("kind", arviz_pictures.KINDS)
def test_arviz_draws_each_kind(tmp_path: Path, kind: str):
    draws = {"a": torch.linspace(0, 1, 100).reshape(2, 50), "b c": torch.ones(2, 50)}
    draws["b c"][0] += torch.linspace(0, 1, 50)
    arviz_pictures.draw(draws, kind, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_planted_lies_where_the_page_says():
    data = datasets.load("wine")
    rows = wine.invented(data, 200, torch.Generator().manual_seed(0))
    assert (rows >= data.tensor().amin(0)).all()
    assert (rows <= data.tensor().amax(0)).all()
    fit = EM(num_starts=1).run(GaussianMixture(2), datasets.load("faithful"), seed=0)
    planted = fit.log_prob(torch.tensor(faithful.PLANTED))
    assert planted.max() < fit.log_prob(datasets.load("faithful")).quantile(0.02)


def test_a_background_fit_reports_failure_and_can_be_stopped(tmp_path: Path):
    failing = Background("fit", "GaussianMixture", "nothing.csv", "--out", str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="failed: .*needs num_components"):
        failing.wait()
    running = Background(
        *["fit", "GaussianMixture", "galaxies", "--set", "num_components=2", "--engine", "gibbs"],
        *["--engine-set", "num_samples=1000000", "--out", str(tmp_path / "run")],
    )
    running.stop()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_and_the_code_on_its_page(tmp_path: Path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    text = (out / "index.html").read_text()
    links = Links(text).found
    assert {p.name for p in out.glob("*.png")} == set(links)
    assert len(links) == len(set(links)) > 12
    assert "12 of 12 planted rows found, 0 false alarms among 50 real rows" in text
    found = re.search(r"(\d+) of 20 planted rows found, (\d+) false", text)
    assert found is not None
    assert int(found[1]) >= 10
    assert int(found[2]) <= 2
    for run, count in (("faithful-vb", 2), ("wine-vb", 3)):
        assert bayesgen.load(out / "runs" / run).attrs["num_occupied"] == count
    again = CliRunner().invoke(cli, ["demo", "--out", str(out)])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    told = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "reproduce.py"],
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-2000:]
