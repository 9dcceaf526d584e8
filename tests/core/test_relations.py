"""A program as a graph: dependencies by provenance, plates as subgraphs; Mermaid, DOT, SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen.relations import relations
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * raw)
        pyro.sample("y", dist.Normal(theta, 10.0), obs=torch.zeros(8))


def crossed():
    scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    rows, columns = pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, scale))
    with columns:
        b = pyro.sample("b", dist.Normal(torch.arange(3.0), 1.0))
    with rows, columns:
        pyro.sample("y", dist.Poisson((a + b).exp()), obs=torch.ones(4, 3))
    pyro.factor("push", -b.sum())


def test_dependencies_plates_and_laws():
    graph = relations(schools)
    kinds = {site.name: (site.kind, site.law, site.plates) for site in graph.nodes}
    assert kinds["mu"] == ("latent", "Normal(0, 5)", ())
    assert kinds["tau"] == ("latent", "HalfCauchy(5)", ())
    assert kinds["theta"] == ("deterministic", "", ("school",))
    assert kinds["y"] == ("observed", "Normal", ("school",))
    assert set(graph.edges) == {
        ("mu", "theta"),
        ("tau", "theta"),
        ("raw", "theta"),
        ("theta", "y"),
    }
    assert graph.sizes == {"school": 8}


def test_crossed_plates_flat_priors_and_factors():
    graph = relations(crossed)
    by_name = {site.name: site for site in graph.nodes}
    assert by_name["y"].plates == ("rows", "columns")
    assert by_name["a"].plates == ("rows",)
    assert by_name["push"].kind == "factor"
    assert set(graph.edges) == {("scale", "a"), ("a", "y"), ("b", "y"), ("b", "push")}
    text = graph.mermaid()
    assert text.count("subgraph") == 3  # rows, columns in rows, columns alone
    assert text.count("end") == 3


def test_mermaid_and_dot():
    graph = relations(schools)
    assert str(graph) == graph.mermaid()
    assert 'n4(["y ~ Normal"]):::observed' in graph.mermaid()
    assert 'subgraph p0["school: 8"]' in graph.mermaid()
    assert "n3 --> n4" in graph.mermaid()
    dot = graph.dot()
    assert dot.count("{") == dot.count("}")
    assert re.search(r'n4 \[label="y ~ Normal", style=filled', dot)
    assert "n0 -> n3;" in dot


def boxes(svg):
    """Rectangles by the text that stands in them."""
    root = ElementTree.fromstring(svg)
    tag = "{http://www.w3.org/2000/svg}"
    found, last = {}, None
    for element in root:
        if element.tag == f"{tag}rect":
            last = [float(element.get(k)) for k in ("x", "y", "width", "height")]
        elif element.tag == f"{tag}text":
            found[element.text] = last
    return found, root


@pytest.mark.parametrize("program", [schools, crossed])
def test_the_picture_holds_every_site_once_and_plates_hold_their_own(program):
    graph = relations(program)
    found, root = boxes(graph.svg())
    width, height = float(root.get("width")), float(root.get("height"))
    sites = [found[site.label] for site in graph.nodes]
    for k, (x, y, w, h) in enumerate(sites):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for other in sites[k + 1 :]:
            apart = x + w <= other[0] or other[0] + other[2] <= x
            assert apart or y + h <= other[1] or other[1] + other[3] <= y, "sites overlap"
    for a, b in graph.edges:
        label = {site.name: site.label for site in graph.nodes}
        assert found[label[a]][1] < found[label[b]][1]
    assert root.find("{http://www.w3.org/2000/svg}title").text


def test_plates_of_the_picture():
    found, _ = boxes(relations(schools).svg())
    x, y, w, h = found["school: 8"]
    for label in ("raw ~ Normal(0, 1)", "theta", "y ~ Normal"):
        a, b, c, d = found[label]
        assert x <= a
        assert a + c <= x + w
        assert y <= b
        assert b + d <= y + h
    mu = found["mu ~ Normal(0, 5)"]
    inside = x < mu[0] + mu[2] and mu[0] < x + w and y < mu[1] + mu[3] and mu[1] < y + h
    assert not inside


def test_a_model_of_ours_and_one_without_a_program():
    fit = pretend(UnitMixture(2), [[0.0], [0.1], [5.0], [5.1]])
    graph = fit.graph()
    assert graph.sizes == {"data": 4}
    assert ("loc", "x") in graph.edges
