"""The report: one file, nothing from elsewhere, readable on a telephone and aloud."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner

from bayesgen import datasets, rng
from bayesgen.app.cli import cli
from bayesgen.app.report import page_of, write_report
from bayesgen.inference import NUTS, SVI, Gibbs
from bayesgen.models import GaussianMixture
from bayesgen.toys import UnitMixture, pretend
from tests.posteriordb.hierarchical import eight_schools

__all__: list[str] = []

VOID = {"meta", "img", "br", "hr", "input", "link", "rect", "path"}


class Reader(HTMLParser):
    """Everything that a page refers to, its headings and alternative texts; tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.alts: list[str | None] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.scripts = 0
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [
            found[k] or "" for k in ("src", "href", "xlink:href", "action") if k in found
        ]
        self.ids |= {found["id"] or ""} if "id" in found else set()
        self.scripts += tag in ("script", "iframe", "object", "embed")
        if tag == "img":
            self.alts.append(found.get("alt"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def check(text: str) -> Reader:
    """What must hold of every report."""
    read = Reader(text)
    assert read.scripts == 0
    for link in read.links:
        assert link.startswith(("data:image/png;base64,", "#")), f"refers to {link[:60]}"
        assert not link.startswith("#") or link[1:] in read.ids, f"{link} leads nowhere"
    outside = re.sub(r"xmlns=.http://www.w3.org/2000/svg.|base64,[^']*", "", text)
    assert "//" not in outside
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(alt and len(alt) > 20 for alt in read.alts)
    assert len(set(read.alts)) == len(read.alts)
    assert "<html lang='en'>" in text
    assert "name='viewport'" in text
    assert text.count("<h1>") == 1
    return read


@pytest.fixture(scope="module")
def schools():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
    data = {"J": 8, "y": y, "sigma": torch.full((8,), 12.0).double()}
    return NUTS(num_samples=60, num_warmup=60, num_chains=2).run(eight_schools, data, seed=0)


def test_a_plain_program(schools, tmp_path: Path):
    path = write_report(schools, tmp_path / "schools.html")
    text = path.read_text()
    read = check(text)
    assert read.headings == [
        "eight_schools by NUTS",
        "FAIL: do not use these draws yet",
        "Model",
        "Posterior",
        "Chains",
        "Run",
        "Does the model resemble the data?",
        "How to get it again",
    ]
    assert "effective sample size is only" in text
    assert "mu ~ Normal(0, 5)" in text  # the graph
    assert "flowchart TD" in text
    assert len(read.alts) == 6  # chains, energy, pairs of mu and tau, run, predictive, check
    assert "version of torch" in text
    assert schools.attrs["data_fingerprint"] in text


def test_independent_draws_have_no_chains_and_no_r_hat():
    def program(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = rng.standard_normal(30, rng.make_generator(0))
    text = page_of(SVI(num_steps=200, num_samples=200).run(program, x, seed=0))
    read = check(text)
    assert "Draws" in read.headings
    assert "Chains" not in read.headings
    assert "r_hat" not in text


def test_a_mixture_that_passes():
    x = rng.standard_normal((60, 2), rng.make_generator(0))
    fit = pretend(UnitMixture(1), x, num_chains=4, num_draws=300)
    text = page_of(dataclasses.replace(fit, attrs={**fit.attrs, "converged": True}))
    read = check(text)
    assert "PASS: nothing speaks against this posterior" in read.headings
    assert "Clusters" in read.headings
    assert "class='banner pass'" in text


def test_a_fit_of_one_draw_and_names_that_need_escapes():
    x = {"a<b>": [0.0, 1.0, 2.0, 3.0], "c&d": [0.0, 1.0, 0.0, 1.0]}
    fit = pretend(UnitMixture(1), x, num_chains=1, num_draws=1)
    text = page_of(fit)
    read = check(text)
    assert "Chains" not in read.headings
    assert "a&lt;b&gt;" in text
    assert "<b>" not in text


def test_the_command(tmp_path: Path):
    run = tmp_path / "run"
    fit = Gibbs(num_warmup=20, num_samples=30, num_chains=2).run(
        GaussianMixture(2), datasets.load("faithful"), seed=0
    )
    fit.save(run)
    result = CliRunner().invoke(cli, ["report", str(run)])
    assert result.exit_code == 0, result.stderr
    assert "(FAIL)" in result.stderr
    text = (run / "report.html").read_text()
    read = check(text)
    assert "Clusters" in read.headings
    assert CliRunner().invoke(cli, ["summary", str(run)]).output.count("verdict: FAIL") == 1
    other = tmp_path / "other.html"
    assert CliRunner().invoke(cli, ["report", str(run), "--out", str(other), "-q"]).output == ""
    again = CliRunner().invoke(cli, ["report", str(run), "--out", str(other)])
    assert again.exit_code == 1
    assert "--force" in again.stderr
    bad = CliRunner().invoke(cli, ["report", str(run), "--out", str(tmp_path / "x.pdf")])
    assert "is an .html file" in bad.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.slow
def test_headless_chromium_shows_it_whole_at_any_width(schools, tmp_path: Path):
    """Nothing sticks out sideways, no picture is broken, and nothing is fetched."""
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth, "
        "[...document.images].every(i => i.complete && i.naturalWidth > 0), "
        "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        "].join()</script>"
    )
    path = tmp_path / "probe.html"
    path.write_text(page_of(schools).replace("</body>", probe + "</body>"))
    for width in (500, 1200):
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            + [f"--window-size={width},900", f"--user-data-dir={tmp_path}", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "<title>true,true,0</title>" in done.stdout, re.findall("<title>.*?<", done.stdout)
