"""A report's text in HTML and in Markdown: whatever it holds, readers see it as it is, and nothing else happens."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dsft.reporting.document import (
    Beside,
    Document,
    Figure,
    Folded,
    Heading,
    Lines,
    Mono,
    Table,
    Text,
    aligned,
)
from dsft.reporting.html import as_html, escape
from dsft.reporting.markdown import as_markdown, code, fenced
from dsft.reporting.markdown import escape as markdown_escape
from dsft.text import printable

FOUL = [
    "<script>alert(1)</script>", "</pre></body>", "a|b", "`a` ``b``", "\\|", "**x** _y_ [z](u) ![i](j)", "# no heading",
    "1. no list", "- no list", "&amp; &#60;", "$x$", "~~x~~", "<!-- x", "a_b_c", "--lr 1e-4", "x\ud800y", "a\u202eb",
    "\x00\x1b[31m", "line\u2028line", "```\nfence\n```", "", "   ", "<https://example.com>", "https://example.com",
]  # fmt: skip
foul = st.one_of(
    st.sampled_from(FOUL), st.text(max_size=40), st.text(alphabet="`|\\<>&*_[]()#-+=~!$ \n1.a", max_size=30)
)


def markdown_text(markdown: str) -> str:
    """What a reader of Markdown sees."""
    return Shown(MarkdownIt("gfm-like", {"linkify": False}).render(markdown)).text


class Shown(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def words(text: str) -> str:
    return " ".join(printable(text).split())


@settings(deadline=None)
@given(foul)
def test_html_shows_any_text_and_makes_no_tag_of_it(text):
    shown = Shown(f"<p title='{escape(text)}'>{escape(text)}</p>")
    assert (shown.text, shown.tags) == (printable(text), ["p"])


@settings(deadline=None)
@given(foul)
def test_markdown_shows_any_text_in_a_heading_a_paragraph_and_a_cell(text):
    document = Document("t", [Text(text or "x"), Table(("head", "number"), [(text, "1"), (Mono(text), "2")])])
    markdown = as_markdown(document)
    shown = markdown_text(markdown)
    expected = ["t", words(text or "x"), "head number", f"{words(text)} 1", f"{words(text)} 2"]
    assert words(shown) == words(" ".join(expected))
    tags = set(Shown(MarkdownIt("gfm-like", {"linkify": False}).render(markdown)).tags)
    assert tags <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "code"}


@settings(deadline=None)
@given(foul, foul)
def test_a_code_block_holds_any_text(text, other):
    shown = markdown_text(f"{fenced(text)}\n\n{fenced(other)}\n\nend")
    assert shown == f"{printable(text)}\n\n{printable(other)}\n\nend\n"


@pytest.mark.parametrize("text", FOUL)
def test_foul_text_in_every_kind_of_block(text):
    blocks = [Heading(2, text), Text(text), Lines(text), Beside([(text, text)]), Folded(text, [Lines(text)])]
    document = Document(text, blocks)
    as_markdown(document).encode()
    page = as_html(document)
    page.encode()
    tags = Shown(page).tags
    assert set(tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "div", "strong", "details", "summary",
    }  # fmt: skip
    assert tags.count("pre") == 3


def test_tables_align_on_a_console():
    assert aligned(("a", "long"), [("xyz", "1"), ("", "22")]) == [
        "| a   | long |", "|-----|------|", "| xyz | 1    |", "|     | 22   |",
    ]  # fmt: skip


def test_markdown_stays_readable_as_plain_text():
    assert markdown_escape("train_batch_size 128, 100.0% (61.0% to 100.0%)") == (
        "train_batch_size 128, 100.0% (61.0% to 100.0%)"
    )
    assert (code("--lr"), code(""), code("a`b")) == ("`--lr`", "", "`` a`b ``")


def test_columns_of_numbers_are_aligned_on_the_right_and_charts_share_a_row():
    chart = Figure("<svg></svg>", "words")
    page = as_html(Document("t", [Table(("a", "b"), [("x", Mono("1"))], right=(1,)), chart, chart, Text("end"), chart]))
    assert '<tr><td>x</td><td class="number"><code>1</code></td></tr>' in page
    assert [part.count("<figure") for part in page.split('<div class="charts">')[1:]] == [2, 1]
    assert re.search(r'<figure role="img" aria-label="words"><svg></svg></figure>', page)
