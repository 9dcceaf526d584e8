"""A page of pictures and tables in one folder: plain HTML, no script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayesgen.storage import write_bytes

__all__ = ["Page"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1040px; margin: 2rem auto 5rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin: 3rem 0 .3rem; padding-top: .8rem; border-top: 1px solid #ddd; }
p.lead { margin: .2rem 0 1rem; max-width: 46rem; color: #444; }
figure { margin: 1.6rem 0 .4rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { margin: .5rem 0 .2rem; max-width: 46rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid #e4e4e4;
         vertical-align: top; }
th { font-weight: 600; color: #444; }
table.verdict td:first-child { white-space: nowrap; color: #444; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th.number { text-align: right; }
details { margin: .1rem 0 1.2rem; }
summary { cursor: pointer; color: #0072b2; font-size: .9rem; }
pre { background: #f6f7f8; padding: .8rem 1rem; overflow-x: auto; font-size: .84rem;
      line-height: 1.45; border-radius: 4px; }
.good { color: #00704f; font-weight: 600; } .bad { color: #b84a00; font-weight: 600; }
footer { margin-top: 3rem; color: #666; font-size: .85rem; }
"""


@dataclass
class Page:
    """A page under construction.

    Args:
        folder: Where page and pictures go.
        title: Heading of the page.
        lead: What the page shows, in a sentence or two.
    """

    folder: Path
    title: str
    lead: str
    _parts: list[str] = field(default_factory=list)
    _verdict: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    """Every piece of code shown, in order: together they are a script."""

    def section(self, title: str, lead: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{_text(title)}</h2>\n<p class='lead'>{_text(lead)}</p>")

    def picture(self, drawn: Any, name: str, caption: str, code: str = "") -> None:
        """Save a figure, or the figure of some axes, and show it with its caption and code."""
        figure = getattr(drawn, "figure", drawn)
        figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
        self.image(name, caption, code)

    def image(self, name: str, caption: str, code: str = "") -> None:
        """Show a picture that lies in the folder already."""
        self._parts.append(
            f"<figure><img src='{name}.png' alt='{_text(caption)}' loading='lazy'>"
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
        self.snippet(code)

    def snippet(self, code: str, *, label: str = "the code", is_shell: bool = False) -> None:
        """Code that the reader can unfold."""
        if not code:
            return
        if not is_shell:
            self.code.append(code.strip())
        self._parts.append(
            f"<details><summary>{_text(label)}</summary><pre>{_text(code.strip())}</pre></details>"
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are set to the right."""
        self._parts.append(_table(head, rows))

    def verdict(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that comes before everything else."""
        self._verdict.append(_table(head, rows).replace("<table>", "<table class='verdict'>"))

    def write(self, footer: str) -> Path:
        """Write ``index.html`` and ``reproduce.py``, and return the page's path."""
        body = "\n".join(
            [
                f"<h1>{_text(self.title)}</h1>",
                f"<p class='lead'>{_text(self.lead)}</p>",
                *self._verdict,
                *self._parts,
                f"<footer>{_text(footer)}</footer>",
            ]
        )
        page = (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )
        path = self.folder / "index.html"
        write_bytes(path, page.encode())
        script = '"""The code of index.html as one script."""\n\n' + "\n\n".join(self.code) + "\n"
        write_bytes(self.folder / "reproduce.py", script.encode())
        return path


class Mark(str):
    """A cell that is good or bad news."""

    good = True

    def __new__(cls, text: str, good: bool) -> Mark:
        """The text, and how to read it."""
        mark = super().__new__(cls, text)
        mark.good = good
        return mark


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [
        all(isinstance(row[j], int | float) for row in rows if row[j] != "")
        for j in range(len(head))
    ]

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{_class(value, number)}>{_text(_shown(value))}</{tag}>"
            for value, number in zip(values, numeric, strict=True)
        )

    lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _class(value: Any, number: bool) -> str:
    names = ["number"] if number else []
    if isinstance(value, Mark):
        names.append("good" if value.good else "bad")
    return f" class='{' '.join(names)}'" if names else ""


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
