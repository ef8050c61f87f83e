"""A report's text in HTML and in Markdown: whatever it holds, readers see it as it is, and nothing else happens."""

from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dsft.reporting.document import Mono, as_markdown, code, escape, fenced, heading, paragraph, table
from dsft.reporting.html import figures, folded, marked, page, side_by_side
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
def test_every_reader_sees_any_text_in_a_heading_a_paragraph_and_a_cell(text):
    blocks = [paragraph(text or "x"), table(("head", "number"), [(text, "1"), (Mono(text), "2")])]
    expected = ["t", words(text or "x"), "head number", f"{words(text)} 1", f"{words(text)} 2"]
    html = MarkdownIt("gfm-like", {"linkify": False}).render(as_markdown([heading(1, "t"), *blocks]))
    for shown in (Shown(html), Shown(page("t", blocks).partition("<body>")[2])):
        assert words(shown.text) == words(" ".join(expected))
        assert set(shown.tags) <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td", "code"}


@settings(deadline=None)
@given(foul, foul)
def test_code_blocks_hold_any_text(text, other):
    shown = markdown_text(f"{fenced(text)}\n\n{fenced(other)}\n\nend")
    assert shown == f"{printable(text)}\n\n{printable(other)}\n\nend\n"
    blocks = marked([(text, True, False), (other, True, True), (text, False, False)])
    shown = Shown(blocks.html)
    assert shown.text == f"\n{printable(text)}{printable(other)}{printable(text)}\n"
    assert shown.tags == ["pre", "mark", "b"]


@pytest.mark.parametrize("text", FOUL)
def test_foul_text_in_every_kind_of_block(text):
    blocks = [heading(2, text), paragraph(text), fenced(text), side_by_side([(text, text)])]
    blocks += [folded(text, [fenced(text)]), figures([("<svg></svg>", text)])]
    as_markdown(blocks).encode()
    html = page(text, blocks)
    html.encode()
    tags = Shown(html).tags
    assert set(tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "code", "div", "strong", "details",
        "summary", "figure", "svg",
    }  # fmt: skip
    assert [tags.count(tag) for tag in ("pre", "details", "svg")] == [3, 1, 1]


def test_markdown_stays_readable_as_plain_text():
    assert escape("train_batch_size 128, 100.0% (61.0% to 100.0%)") == "train_batch_size 128, 100.0% (61.0% to 100.0%)"
    assert (code("--lr"), code(""), code("a`b")) == ("`--lr`", "", "`` a`b ``")
    assert table(("a", "long"), [("xyz", "1"), ("", "22")], right=(1,)).splitlines() == [
        "| a   | long |", "|-----|-----:|", "| xyz | 1    |", "|     | 22   |",
    ]  # fmt: skip


def test_numbers_align_on_the_right_and_charts_have_words():
    html = page("t", [table(("a", "b"), [("x", Mono("1"))], right=(1,)), figures([("<svg></svg>", "words")])])
    assert '<td>x</td>\n<td style="text-align:right"><code>1</code></td>' in html
    assert '<figure role="img" aria-label="words"><svg></svg></figure>' in html
