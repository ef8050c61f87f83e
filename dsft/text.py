"""Text of rows, answers and damaged files, as every terminal, page and file can show it."""

import unicodedata

TURNS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")  # of the direction of writing


def visible_text(text: str) -> str:
    """Text that moves no terminal's cursor and turns no direction: such a character is shown as its code.

    So is what is no character: a surrogate, a byte order mark, and the code points that Unicode has none at.
    """
    return "".join(f"\\u{ord(c):04x}" if _is_control(c) else c for c in text)


def printable(text: str) -> str:
    """The same, with lines that end in one way: of answers, which may have been written on any system."""
    return visible_text(text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(error: object) -> str:
    """An error's message as part of a line of ours."""
    return " ".join(str(error).split()).rstrip(".")


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    code = ord(character)
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in TURNS
        or code == 0xFEFF
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )
