"""Makes text of rows, answers and damaged files safe to print."""

import unicodedata

BIDI_CONTROLS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")  # bidirectional control characters


def visible_text(text: str) -> str:
    """Text with control characters, bidirectional controls, surrogates and noncharacters escaped."""
    return "".join(f"\\u{ord(c):04x}" if _is_control(c) else c for c in text)


def printable(text: str) -> str:
    """The same, with Unix line endings; model answers may have any."""
    return visible_text(text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(error: object) -> str:
    """An error's message, to be part of a longer line."""
    return " ".join(str(error).split()).rstrip(".")


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    code = ord(character)
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in BIDI_CONTROLS
        or code == 0xFEFF
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )
