"""A model's graph as SVG text: laid out in layers, plates as boxes, no binary needed."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bayesgen.relations import Graph, Node

__all__ = ["graph_svg"]

_HEIGHT, _GAP, _LAYER, _PAD = 34.0, 18.0, 76.0, 14.0
_CHARACTER = 7.4  # pixels, of 13 px sans-serif
_NAME_ROW = 18.0  # below the sites of a plate, for its name
_INK, _EDGE, _PLATE = "#303030", "#6b6b6b", "#9a9a9a"

Path = tuple[str, ...]


@dataclass
class _Layout:
    """Where everything stands; filled from the innermost plates outwards."""

    graph: Graph
    layer: dict[str, int]
    x: dict[str, float] = field(default_factory=dict)
    """Centres of sites."""
    boxes: dict[Path, tuple[float, float]] = field(default_factory=dict)
    """Left and right of plates."""


def graph_svg(graph: Graph) -> str:
    """Draw a graph: parents above children, observed sites shaded, computed ones dashed.

    Sites of a plate share a box, and no other site stands in it.

    Args:
        graph: From ``fit.graph()``.

    Returns:
        An ``<svg>`` element with a title and a description for screen readers.
    """
    layout = _Layout(graph, _layers(graph))
    width = _place(layout, (), _PAD) + _PAD
    rows = max(layout.layer.values(), default=0) + 1
    height = rows * _LAYER + 2 * _PAD + _NAME_ROW * _depth(graph)
    parts = [*_plates(layout), *_edges(layout), *_nodes(layout)]
    told = ", ".join(f"{b} depends on {a}" for a, b in graph.edges) or "no dependencies"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:.0f} '
        f'{height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        'font-family="system-ui, sans-serif" font-size="13">'
        f"<title>Graph of the model</title><desc>{html.escape(told)}</desc>"
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{_EDGE}"/></marker>'
        f"</defs>{''.join(parts)}</svg>"
    )


def _depth(graph: Graph) -> int:
    return max((len(site.plates) for site in graph.nodes), default=0)


def _layers(graph: Graph) -> dict[str, int]:
    """Longest path from above; sites that depend on nothing sink to just above their children."""
    parents: dict[str, list[str]] = {site.name: [] for site in graph.nodes}
    children: dict[str, list[str]] = {site.name: [] for site in graph.nodes}
    for a, b in graph.edges:
        parents[b].append(a)
        children[a].append(b)
    layer: dict[str, int] = {}
    for site in graph.nodes:  # the program's order is one in which parents come first
        layer[site.name] = 1 + max((layer[p] for p in parents[site.name]), default=-1)
    for site in graph.nodes:
        if not parents[site.name] and children[site.name]:
            layer[site.name] = min(layer[c] for c in children[site.name]) - 1
    return layer


def _width(site: Node) -> float:
    return _CHARACTER * len(site.label) + 26.0


def _span(layout: _Layout, path: Path) -> tuple[int, int]:
    """First and last layer of a plate's sites."""
    held = [
        layout.layer[site.name] for site in layout.graph.nodes if site.plates[: len(path)] == path
    ]
    return min(held), max(held)


def _place(layout: _Layout, path: Path, left: float) -> float:
    """Lay out a plate from ``left`` on, and return its right edge.

    Its own sites stand beside the plates inside it where they share a layer with one, and centred
    above or below them where they do not.
    """
    children = layout.graph.below(path)
    spans = [_span(layout, child) for child in children]
    rows: dict[int, list[Node]] = {}
    for site in layout.graph.inside(path):
        rows.setdefault(layout.layer[site.name], []).append(site)
    beside = {row: sites for row, sites in rows.items() if any(a <= row <= b for a, b in spans)}
    right = left + max((_row_width(sites) for sites in beside.values()), default=0.0)
    at = right + (_GAP if beside else 0.0)
    for child in children:
        inner = _place(layout, child, at + _PAD)
        layout.boxes[child] = (at, max(inner + _PAD, at + _name_width(layout, child)))
        at = layout.boxes[child][1] + _GAP
        right = layout.boxes[child][1]
    free = max((_row_width(s) for row, s in rows.items() if row not in beside), default=0.0)
    right = max(right, left + free)
    for row in sorted(rows):
        sites = _ordered(layout, rows[row])
        width = _row_width(sites)
        start = left if row in beside else left + (right - left - width) / 2
        for site in sites:
            layout.x[site.name] = start + _width(site) / 2
            start += _width(site) + _GAP
    return right


def _row_width(sites: list[Node]) -> float:
    return sum(_width(site) for site in sites) + _GAP * (len(sites) - 1)


def _name_width(layout: _Layout, path: Path) -> float:
    return _CHARACTER * len(f"{path[-1]}: {layout.graph.sizes[path[-1]]}") + 2 * _PAD


def _ordered(layout: _Layout, sites: list[Node]) -> list[Node]:
    """By the mean place of the parents, so that fewer edges cross."""
    placed = {
        site.name: [layout.x[a] for a, b in layout.graph.edges if b == site.name and a in layout.x]
        for site in sites
    }
    if not all(placed.values()):
        return sites
    return sorted(sites, key=lambda site: sum(placed[site.name]) / len(placed[site.name]))


# ---------------------------------------------------------------- drawing
def _y(layout: _Layout, name: str) -> float:
    return _PAD + _LAYER * layout.layer[name] + _LAYER / 2


def _plates(layout: _Layout) -> list[str]:
    parts = []
    deepest = _depth(layout.graph)
    for path, (left, right) in sorted(layout.boxes.items(), key=lambda item: len(item[0])):
        first, last = _span(layout, path)
        slack = 5.0 * (deepest - len(path))
        top = _PAD + _LAYER * first + _LAYER / 2 - _HEIGHT / 2 - _PAD / 2 - slack
        names = _NAME_ROW * (deepest - len(path) + 1)
        bottom = _PAD + _LAYER * last + _LAYER / 2 + _HEIGHT / 2 + 4 + names
        label = html.escape(f"{path[-1]}: {layout.graph.sizes[path[-1]]}")
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.1f}" rx="6" fill="none" stroke="{_PLATE}"/>'
            f'<text x="{right - 8:.1f}" y="{bottom - 5:.1f}" text-anchor="end" fill="#4a4a4a" '
            f'font-size="12">{label}</text>'
        )
    return parts


def _edges(layout: _Layout) -> list[str]:
    parts = []
    for a, b in layout.graph.edges:
        x0, y0 = layout.x[a], _y(layout, a) + _HEIGHT / 2
        x1, y1 = layout.x[b], _y(layout, b) - _HEIGHT / 2 - 2
        bend = (y1 - y0) / 2
        parts.append(
            f'<path d="M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} '
            f'{x1:.1f} {y1:.1f}" fill="none" stroke="{_EDGE}" stroke-width="1.3" '
            'marker-end="url(#arrow)"/>'
        )
    return parts


def _nodes(layout: _Layout) -> list[str]:
    parts = []
    for site in layout.graph.nodes:
        x, y, w = layout.x[site.name], _y(layout, site.name), _width(site)
        fill = "#d9d9d9" if site.kind == "observed" else "#ffffff"
        dash = ' stroke-dasharray="4 3"' if site.kind in ("deterministic", "factor") else ""
        rx = 4 if site.kind in ("deterministic", "factor") else _HEIGHT / 2
        parts.append(
            f'<rect x="{x - w / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" width="{w:.1f}" '
            f'height="{_HEIGHT:.0f}" rx="{rx:g}" fill="{fill}" stroke="{_INK}"{dash}/>'
            f'<text x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="middle" fill="#1a1a1a">'
            f"{html.escape(site.label)}</text>"
        )
    return parts
