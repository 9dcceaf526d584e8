"""Formulas as MathML, written at build time: no script and no network to read a page."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert

__all__ = ["setup"]

# What the converter does not know.
_REWRITTEN = {
    r"\arg\max": r"\operatorname{argmax}",
    r"\arg\min": r"\operatorname{argmin}",
    r"\_": "_",
}
# Symbols that the converter takes for letters; as operators they get their space.
_OPERATORS = {"<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>"}
# A named function stands apart from an argument without brackets.
_FUNCTION = re.compile(
    r"(?<!<msub>)(<mi>(?:log|exp|max|min|det|Pr)</mi>)(?!<mo stretchy|<mrow><mo|</m)"
)


def _mathml(source: str, display: str) -> str:
    rows = source.strip()
    if r"\\" in rows and r"\begin" not in rows:
        rows = rf"\begin{{aligned}}{rows}\end{{aligned}}"
    for unknown, known in _REWRITTEN.items():
        rows = rows.replace(unknown, known)
    text = convert(rows, display=display)
    for letter, operator in _OPERATORS.items():
        text = text.replace(letter, operator)
    return _FUNCTION.sub(r'\1<mspace width="0.17em" />', text)


def _inline(translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator, node: nodes.math_block) -> None:
    parts = [part for part in node.astext().split("\n\n") if part.strip()]
    formulas = "".join(_mathml(part, "block") for part in parts)
    translator.body.append(f'<div class="formula">{formulas}</div>')
    raise nodes.SkipNode


def setup(app) -> dict[str, object]:
    """Register the renderer, named ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
