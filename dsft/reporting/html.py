"""A report as one HTML page that needs nothing else: no script, no network, light and dark."""

from collections.abc import Container, Sequence
from html import escape as html_escape

from dsft.reporting.curves import RUN_COLORS
from dsft.reporting.document import (
    Beside,
    Block,
    Document,
    Figure,
    Folded,
    Heading,
    Lines,
    Mono,
    Table,
    Text,
)
from dsft.text import printable

# The page forbids itself what it does not need, so that no answer in it could load or run anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024; --faint: #5c6570; --line: #d5dae0;
  --grid: #e6e9ed; --soft: #f4f6f8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e8ea; --faint: #9aa4ae; --line: #3a4149; --grid: #2a3036; --soft: #1d2125; DARK }
}
@media print { details > * { display: block } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin-bottom: 0.4rem }
p, h1, h2, h3 { overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 0.9rem }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td { overflow-wrap: break-word; max-width: 40rem } th { color: var(--faint); font-weight: 600 }
.number { text-align: right; font-variant-numeric: tabular-nums }
code, pre { font: 0.85rem/1.45 ui-monospace, monospace }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0.7rem; margin: 0.3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext }
.charts, .beside { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
figure svg * { stroke-linejoin: round }
figure svg text { font-family: system-ui, sans-serif !important }
summary { cursor: pointer; color: var(--faint); margin: 0.5rem 0 }
"""


def as_html(document: Document) -> str:
    """The file's text."""
    body: list[str] = [_block(Heading(1, document.title))]
    figures: list[str] = []
    for block in [*document.blocks, None]:
        if isinstance(block, Figure):
            figures.append(_block(block))
            continue
        if figures:  # neighbours share a row where there is room
            body.append(f'<div class="charts">\n{"".join(figures)}</div>')
            figures = []
        if block is not None:
            body.append(_block(block))
    style = STYLE
    for theme in ("light", "dark"):
        colors = " ".join(f"--run-{i}: {pair[theme]};" for i, pair in enumerate(RUN_COLORS))
        style = style.replace(theme.upper(), colors)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Plain text as HTML that shows it, in an element or an attribute."""
    return html_escape(printable(text), quote=True)


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table(head, rows, right):
            lines = [_row(head, right, "th"), *(_row(row, right, "td") for row in rows)]
            return f'<div class="scroll"><table>\n{"".join(lines)}</table></div>'
        case Lines(text, _):
            return f"<pre>{escape(text)}</pre>"
        case Figure(svg, words):
            return f'<figure role="img" aria-label="{escape(words)}">{svg}</figure>\n'
        case Beside(texts):
            parts = "".join(
                f"<div><strong>{escape(name)}</strong><pre>{escape(text)}</pre></div>" for name, text in texts
            )
            return f'<div class="beside">{parts}</div>'
        case Folded(summary, blocks):
            inner = "\n".join(map(_block, blocks))
            return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"


def _row(cells: Sequence[str], right: Container[int], tag: str) -> str:
    shown = []
    for column, cell in enumerate(cells):
        text = f"<code>{escape(cell)}</code>" if isinstance(cell, Mono) and cell else escape(cell)
        shown.append(f'<{tag} class="number">{text}</{tag}>' if column in right else f"<{tag}>{text}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>\n"
