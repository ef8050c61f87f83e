"""A report as one self-contained HTML page: no script, no network, light and dark."""

from collections.abc import Iterable, Sequence
from html import escape as escape_html
from itertools import groupby

from markdown_it import MarkdownIt

from dsft.reporting.curves import RUN_COLORS
from dsft.reporting.document import Block, Spliced, as_markdown, escape, fenced, heading, paragraph
from dsft.text import printable

# Raw HTML, links and images stay text: reports hold answers of models and rows of data.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "link", "autolink", "reference"])
# The page forbids itself what it does not need, so that nothing in it could load or run anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2024; --faint: #5c6570; --line: #d5dae0;
  --grid: #e6e9ed; --soft: #f4f6f8; --mark: #c9ecc4; --bold: #7a3aa8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e8ea; --faint: #9aa4ae; --line: #3a4149; --grid: #2a3036; --soft: #1d2125;
    --mark: #1f4a26; --bold: #cf9bf5; DARK }
}
@media print { details > * { display: block } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin-bottom: 0.4rem }
p, h1, h2, h3 { overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td { overflow-wrap: break-word; max-width: 40rem } th { color: var(--faint); font-weight: 600 }
code, pre { font: 0.85rem/1.45 ui-monospace, monospace }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0.7rem; margin: 0.3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext }
mark { background: var(--mark); color: inherit; border-left: 3px solid #2a7d1f } pre b { color: var(--bold) }
.charts, .beside { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
figure svg * { stroke-linejoin: round }
figure svg text { font-family: system-ui, sans-serif !important }
summary { cursor: pointer; color: var(--faint); margin: 0.5rem 0 }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """The whole page; its first heading is the title."""
    style = STYLE
    for theme in ("light", "dark"):
        colors = " ".join(f"--run-{i}: {pair[theme]};" for i, pair in enumerate(RUN_COLORS))
        style = style.replace(theme.upper(), colors)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_shown(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_shown(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_render([heading(1, title), *blocks])}</body>\n</html>\n"
    )


def figures(drawings: Sequence[tuple[str, str]]) -> Spliced:
    """Drawings side by side where there is space: each an <svg> element, and what it shows in words."""
    parts = "".join(f'<figure role="img" aria-label="{_shown(words)}">{svg}</figure>\n' for svg, words in drawings)
    return Spliced(f'<div class="charts">\n{parts}</div>\n', "\n\n".join(paragraph(words) for _, words in drawings))


def side_by_side(texts: Sequence[tuple[str, str]]) -> Spliced:
    """Texts to compare, each under its name."""
    parts = "".join(f"<div><strong>{_shown(name)}</strong>\n{_render([fenced(text)])}</div>\n" for name, text in texts)
    markdown = "\n\n".join(f"{paragraph(name)}:\n\n{fenced(text)}" for name, text in texts)
    return Spliced(f'<div class="beside">\n{parts}</div>\n', markdown)


def folded(summary: str, blocks: Sequence[Block]) -> Spliced:
    """Blocks that are shown when their summary is clicked."""
    html = f"<details><summary>{_shown(summary)}</summary>\n{_render(blocks)}</details>\n"
    return Spliced(html, as_markdown([f"**{escape(summary)}**", *blocks]).rstrip("\n"))


def marked(spans: Iterable[tuple[str, bool, bool]]) -> Spliced:
    """A code block of spans (text, highlighted, bold); neighbours that are highlighted share one <mark>."""
    spans = list(spans)
    parts = []
    for is_marked, group in groupby(spans, key=lambda span: span[1]):
        inner = "".join(f"<b>{_shown(text)}</b>" if bold else _shown(text) for text, _, bold in group)
        parts.append(f"<mark>{inner}</mark>" if is_marked else inner)
    return Spliced(f"<pre>\n{''.join(parts)}</pre>\n", fenced("".join(text for text, _, _ in spans)))


def _render(blocks: Sequence[Block]) -> str:
    """HTML of blocks. Each is rendered by itself, so that no block's Markdown can reach into another."""
    return "".join(block.html if isinstance(block, Spliced) else MARKDOWN.render(block) for block in blocks)


def _shown(text: str) -> str:
    """Plain text as HTML that shows it, in an element or an attribute."""
    return escape_html(printable(text), quote=True)
