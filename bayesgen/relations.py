"""A Pyro program as a graph: what depends on what, in which plates; text, without any binary."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance

from bayesgen import rng
from bayesgen.capabilities import Program, Simulated, require
from bayesgen.replay import Forwards, is_computed, quietly, unwrapped

if TYPE_CHECKING:
    from bayesgen.fit import Fit

__all__ = ["Graph", "Node", "graph", "relations"]


@dataclass(frozen=True)
class Node:
    """One site of a program."""

    name: str
    law: str
    """Its distribution, with parameters that are single fixed numbers: ``Normal(0, 5)``."""
    kind: str
    """``latent``, ``observed``, ``deterministic`` or ``factor``."""
    plates: tuple[str, ...]
    """Outermost first."""

    @property
    def label(self) -> str:
        """What is written into the node."""
        return f"{self.name} ~ {self.law}" if self.law else self.name


@dataclass(frozen=True)
class Graph:
    """Sites, dependencies and plates; ``str`` is Mermaid, which Markdown pages draw.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> print(pretend(UnitMixture(2), [[0.0], [0.1], [5.0], [5.1]]).graph())
        flowchart TD
            n0(["weights ~ Dirichlet(1)"])
            n1(["loc ~ Normal(0, 10)"])
            subgraph p0["data: 4"]
                n2(["x ~ MixtureSameFamily"]):::observed
            end
            n0 --> n2
            n1 --> n2
            classDef observed fill:#d9d9d9,stroke:#303030
            classDef computed stroke-dasharray: 4 3
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]
    """From a site to one that depends on it directly."""
    sizes: dict[str, int]
    """Number of rows of each plate."""

    # ------------------------------------------------------------ text
    def mermaid(self) -> str:
        """As Mermaid: plates are subgraphs, observed sites are shaded."""
        lines, number = ["flowchart TD"], self._numbers

        def node(site: Node) -> str:
            text = site.label.replace('"', "#quot;")
            opening, closing = _MERMAID[site.kind]
            style = {"observed": ":::observed", "latent": ""}.get(site.kind, ":::computed")
            return f'n{number[site.name]}{opening}"{text}"{closing}{style}'

        counter = iter(range(len(self.nodes)))

        def plate(path: tuple[str, ...], indent: str) -> None:
            lines.extend(f"{indent}{node(site)}" for site in self.inside(path))
            for child in self.below(path):
                name = f"{child[-1]}: {self.sizes[child[-1]]}".replace('"', "#quot;")
                lines.append(f'{indent}subgraph p{next(counter)}["{name}"]')
                plate(child, indent + "    ")
                lines.append(f"{indent}end")

        plate((), "    ")
        lines += [f"    n{number[a]} --> n{number[b]}" for a, b in self.edges]
        lines.append("    classDef observed fill:#d9d9d9,stroke:#303030")
        lines.append("    classDef computed stroke-dasharray: 4 3")
        return "\n".join(lines)

    def dot(self) -> str:
        """As DOT, for Graphviz."""
        lines, number = ["digraph {", "    rankdir=TB; node [shape=ellipse];"], self._numbers
        counter = iter(range(len(self.nodes)))

        def plate(path: tuple[str, ...], indent: str) -> None:
            for site in self.inside(path):
                lines.append(
                    f"{indent}n{number[site.name]} [label={_quoted(site.label)}{_DOT[site.kind]}];"
                )
            for child in self.below(path):
                lines.append(f"{indent}subgraph cluster_{next(counter)} {{")
                label = _quoted(f"{child[-1]}: {self.sizes[child[-1]]}")
                lines.append(f"{indent}    label={label}; labeljust=r; labelloc=b;")
                plate(child, indent + "    ")
                lines.append(f"{indent}}}")

        plate((), "    ")
        lines += [f"    n{number[a]} -> n{number[b]};" for a, b in self.edges]
        return "\n".join([*lines, "}"])

    def svg(self) -> str:
        """As a picture; see :func:`bayesgen.plots.graph_svg`."""
        from bayesgen.plots.graph import graph_svg

        return graph_svg(self)

    __str__ = mermaid

    # ------------------------------------------------------------ structure
    def inside(self, path: tuple[str, ...]) -> list[Node]:
        """The sites in exactly these plates."""
        return [site for site in self.nodes if site.plates == path]

    def below(self, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The plates directly inside; one that crosses another appears in both."""
        depth = len(path)
        children = {
            s.plates[: depth + 1]: None
            for s in self.nodes
            if len(s.plates) > depth and s.plates[:depth] == path
        }
        return list(children)

    @property
    def _numbers(self) -> dict[str, int]:
        return {site.name: k for k, site in enumerate(self.nodes)}


_MERMAID = {
    "latent": ("([", "])"),
    "observed": ("([", "])"),
    "deterministic": ("[", "]"),
    "factor": ("{{", "}}"),
}
_DOT = {
    "latent": "",
    "observed": ', style=filled, fillcolor="#d9d9d9"',
    "deterministic": ", shape=box, style=dashed",
    "factor": ", shape=hexagon, style=dashed",
}


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# ---------------------------------------------------------------- from a program
def graph(fit: Fit) -> Graph:
    """The graph of a fit's model; see :meth:`bayesgen.fit.Fit.graph`."""
    model = fit.model
    if isinstance(model, Simulated):
        return relations(model.program)
    program = require(model, Program, "graph")
    num_rows = fit.attrs.get("num_rows", 1 if fit.data is None else fit.data.num_rows)
    row = torch.zeros(1, len(fit.columns), dtype=torch.float64)
    if fit.data is not None and fit.data.in_memory:
        row = fit.data.tensor()[:1]
    return relations(lambda: program.model(row, num_rows=num_rows), private=type(model).__name__)


def relations(
    run: Callable[[], Any], *, private: str = "", dtype: torch.dtype = torch.float64
) -> Graph:
    """Run a program once, following which site every number came from.

    Args:
        run: The program with its data, called without arguments.
        private: What distributions are called whose class is private.
        dtype: Default dtype while the program runs.
    """
    tracker = TrackProvenance(include_deterministic=True)
    values = Forwards({}, keep_observed=True, flat_at_zero=True)
    with rng.fork(rng.make_generator(0)), quietly(dtype), torch.no_grad():
        with warnings.catch_warnings(), tracker, values:
            warnings.simplefilter("ignore")
            trace = poutine.trace(run).get_trace()
        nodes: list[Node] = []
        edges: list[tuple[str, str]] = []
        sizes: dict[str, int] = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if poutine.util.site_is_subsample(site):
                sizes[name] = int(site["fn"].size)  # of all rows, not of a batch
                continue
            frames = site["cond_indep_stack"]
            sizes |= {f.name: int(f.size) for f in frames if f.name not in sizes}
            law = "" if _kind(site) in ("deterministic", "factor") else _law(site["fn"], private)
            nodes.append(Node(name, law, _kind(site), tuple(f.name for f in frames)))
            parents = _parents(site)
            edges += [(other, name) for other in trace.nodes if other in parents - {name}]
    return Graph(tuple(nodes), tuple(edges), sizes)


def _parents(site: dict[str, Any]) -> frozenset[str]:
    law = site["fn"].base_dist if is_computed(site) else site["fn"]
    found: frozenset[str] = get_provenance(law.log_prob(site["value"]))
    return found


def _kind(site: dict[str, Any]) -> str:
    if is_computed(site):
        return "deterministic"
    if isinstance(site["fn"], dist.Unit):
        return "factor"
    return "observed" if site["is_observed"] else "latent"


def _law(law: Any, private: str) -> str:
    law = unwrapped(law)
    name = type(law).__name__
    if name.startswith("_"):
        return private or name.strip("_")
    numbers = _fixed(law)
    return f"{name}({', '.join(numbers)})" if numbers else name


def _fixed(law: Any) -> list[str]:
    """Parameters that are one number each and depend on no site; empty if there is another."""
    found = []
    is_transformed = isinstance(law, torch.distributions.TransformedDistribution)
    for parameter in getattr(law, "arg_constraints", {}):
        if parameter not in vars(law) and not is_transformed:  # logits beside probs
            continue
        value = torch.as_tensor(getattr(law, parameter))
        if get_provenance(value):
            return []
        distinct = value.detach().double().unique()
        if len(distinct) != 1:
            return []
        found.append(f"{float(distinct[0]):g}")
    return found
