"""What every page is made in: a title, ready sections and data as JSON come in, one HTML text goes out.

The text holds its style and script, and loads nothing from anywhere.
"""

from __future__ import annotations

from importlib import resources

from sae_train.report.text import escape

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<noscript><style>.panel[hidden]{{display:block}}.needs-script{{display:none}}</style></noscript>
</head>
<body>
<main>
{body}
</main>
<div id="tip" hidden></div>
{data}
<script>{script}</script>
</body>
</html>
"""


def document(title: str, sections: list[str], data: dict[str, str]) -> str:
    """Put sections (already HTML, empty ones left out) and data for the script (name: safe JSON) into a page."""
    body = "\n".join(filter(None, sections))
    title = f"{escape(title)} · sae-train"
    held = "\n".join(f'<script type="application/json" id="{name}">{text}</script>' for name, text in data.items())
    script = _asset("script.js") + _asset("latents.js")
    return SHELL.format(title=title, style=_asset("style.css"), script=script, data=held, body=body)


def section(title: str, body: str, css: str = "", lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section class="{css}"><h2>{title}</h2>{lead}{body}</section>'


def paragraphs(sentences: list[str], css: str = "") -> str:
    return "".join(f'<p class="{css}">{sentence}</p>' for sentence in sentences)


def tiles(cells: list[tuple[str, str, str]]) -> str:
    """Large figures: (name, value, note) each."""
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in cells)
    return f'<dl class="tiles">{boxes}</dl>'


def figure(title: str, note: str, svg: str) -> str:
    """A drawing under its caption; note is HTML."""
    note = f"<small>{note}</small>" if note else ""
    return f"<figure><figcaption><h3>{escape(title)}</h3>{note}</figcaption>{svg}</figure>"


def table(head: list[str], rows: list[list[str]], css: str = "", tall: bool = False) -> str:
    """Wrap ready cells (already HTML) in a table that scrolls sideways on a narrow screen, and down if it is tall."""
    header = "".join(cell if cell.startswith("<th") else f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    inside = f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll{" tall" if tall else ""}"><table class="{css}">{inside}</table></div>'


def folded(summary: str, rows: list[list[str]], opened: bool = False) -> str:
    """Facts under a line that opens them: rows of (name, HTML)."""
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    facts = f'<div class="scroll"><table class="facts">{body}</table></div>'
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{facts}</details>"


def flat(value: object) -> str:
    """A dictionary as 'key value' pairs in one flowing cell."""
    if not isinstance(value, dict):
        return escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)
    pairs = ((key, ", ".join(map(str, v)) if isinstance(v, list | tuple) else v) for key, v in value.items())
    return " ".join(f"<span><b>{escape(k)}</b> {escape('–' if v is None else v)}</span>" for k, v in pairs)


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _asset(name: str) -> str:
    return resources.files("sae_train.report").joinpath(name).read_text(encoding="utf-8")
