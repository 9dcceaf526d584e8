"""A page of pictures and tables, in a folder or in one file: no script, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import re
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
caption { text-align: left; color: #444; padding-bottom: .3rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
figure.wide img { min-width: 640px; }
figure svg { max-width: 100%; height: auto; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.2rem 0; }
a { color: #0060a0; }
.banner { border-left: 6px solid; padding: .9rem 1.1rem; margin: 1.2rem 0; border-radius: 4px; }
.banner.pass { border-color: #00704f; background: #eef7f3; }
.banner.fail { border-color: #b84a00; background: #fdf3ec; }
.banner h2 { border: 0; padding: 0; margin: 0 0 .4rem; }
.banner ul { margin: .3rem 0; padding-left: 1.2rem; } .banner li { margin: .25rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 1rem 0; }
dt { color: #444; } dd { margin: 0; overflow-wrap: anywhere; }
table.verdict td:first-child { white-space: nowrap; color: #444; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th.number { text-align: right; }
details { margin: .1rem 0 1.2rem; }
summary { cursor: pointer; color: #0072b2; font-size: .9rem; }
pre { background: #f6f7f8; padding: .8rem 1rem; overflow-x: auto; font-size: .84rem;
      line-height: 1.45; border-radius: 4px; }
.good { color: #00704f; font-weight: 600; } .bad { color: #b84a00; font-weight: 600; }
footer { margin-top: 3rem; color: #595959; font-size: .85rem; }
@media (max-width: 560px) {
  body { margin-top: 1rem; padding: 0 .9rem; }
  h1 { font-size: 1.35rem; } h2 { font-size: 1.15rem; }
  dl { grid-template-columns: 1fr; gap: 0 0; } dd { margin-bottom: .6rem; }
  th, td { padding-right: .8rem; }
}
@media print { details { display: none; } figure { break-inside: avoid; } }
"""


@dataclass
class Page:
    """A page under construction.

    Args:
        folder: Where page and pictures go; None keeps pictures inside the page.
        title: Heading of the page.
        lead: What the page shows, in a sentence or two.
    """

    folder: Path | None
    title: str
    lead: str
    _parts: list[str] = field(default_factory=list)
    _verdict: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    """Every piece of code shown, in order: together they are a script."""
    _sections: list[str] = field(default_factory=list)

    def section(self, title: str, lead: str) -> None:
        """Begin a section."""
        self._sections.append(title)
        self._parts.append(
            f"<h2 id='{_slug(title)}'>{_text(title)}</h2>\n<p class='lead'>{_text(lead)}</p>"
        )

    def picture(
        self, drawn: Any, name: str, caption: str, code: str = "", *, is_wide: bool = False
    ) -> None:
        """Save a figure, or the figure of some axes, and show it with its caption and code.

        Args:
            drawn: The figure.
            name: Of its file.
            caption: Below it, and read aloud by screen readers.
            code: That draws it again.
            is_wide: Whether a narrow screen scrolls it rather than shrinking it.
        """
        figure = getattr(drawn, "figure", drawn)
        if self.folder is not None:
            figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
            self.image(name, caption, code)
            return
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        image = f"<img src='{source}' alt='{_text(caption)}'>"
        if is_wide:
            image = _scrolled(image, name)
        self._figure(image, caption, is_wide)
        self.snippet(code)

    def drawing(self, svg: str, caption: str) -> None:
        """Show SVG text."""
        self._figure(_scrolled(svg, "graph"), caption, False)

    def _figure(self, inner: str, caption: str, is_wide: bool) -> None:
        start = "<figure class='wide'>" if is_wide else "<figure>"
        self._parts.append(f"{start}{inner}<figcaption>{_text(caption)}</figcaption></figure>")

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

    def text(self, text: str) -> None:
        """Text as it is, in lines."""
        self._parts.append(f"<pre>{_text(text)}</pre>")

    def facts(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """Names and values."""
        inner = "".join(f"<dt>{_text(k)}</dt><dd>{_text(_shown(v))}</dd>" for k, v in pairs)
        self._parts.append(f"<dl>{inner}</dl>")

    def banner(self, headline: str, lines: Sequence[str], *, good: bool) -> None:
        """Good or bad news that comes before everything else."""
        listed = "".join(f"<li>{_text(line)}</li>" for line in lines)
        kind = "pass" if good else "fail"
        self._verdict.append(
            f"<section class='banner {kind}' aria-label='Verdict'>"
            f"<h2>{_text(headline)}</h2><ul>{listed}</ul></section>"
        )

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = ""
    ) -> None:
        """A table; numbers are set to the right. One with a caption scrolls on narrow screens."""
        found = _table(head, rows)
        if caption:
            found = found.replace("<table>", f"<table><caption>{_text(caption)}</caption>")
            found = _scrolled(found, caption)
        self._parts.append(found)

    def verdict(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that comes before everything else."""
        self._verdict.append(_table(head, rows).replace("<table>", "<table class='verdict'>"))

    def html(self, footer: str) -> str:
        """The whole page; one that holds its pictures begins with links to its sections."""
        links = [f"<a href='#{_slug(title)}'>{_text(title)}</a>" for title in self._sections]
        contents = f"<nav aria-label='Sections'>{''.join(links)}</nav>"
        body = "\n".join(
            [
                f"<header><h1>{_text(self.title)}</h1>",
                f"<p class='lead'>{_text(self.lead)}</p></header>\n<main>",
                *self._verdict,
                *([contents] if self.folder is None else []),
                *self._parts,
                f"</main>\n<footer>{_text(footer)}</footer>",
            ]
        )
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )

    def write(self, footer: str) -> Path:
        """Write ``index.html`` and ``reproduce.py``, and return the page's path."""
        if self.folder is None:
            raise ValueError("a page without a folder is text: use html().")
        path = self.folder / "index.html"
        write_bytes(path, self.html(footer).encode())
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
    numeric = [all(_is_number(row[j]) for row in rows if row[j] != "") for j in range(len(head))]

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{_class(value, number)}>{_text(_shown(value))}</{tag}>"
            for value, number in zip(values, numeric, strict=True)
        )

    lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or bool(re.fullmatch(r"-?[\d.,]+", str(value)))


def _class(value: Any, number: bool) -> str:
    names = ["number"] if number else []
    if isinstance(value, Mark):
        names.append("good" if value.good else "bad")
    return f" class='{' '.join(names)}'" if names else ""


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _scrolled(inner: str, label: str) -> str:
    """In a box that scrolls sideways, by keyboard too."""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{_text(label)}'>{inner}</div>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
