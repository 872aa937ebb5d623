"""Python source in coloured pieces."""

import keyword
import re
from collections.abc import Iterator

PIECE = re.compile(
    rf"""
    (?P<comment> \#.* )
    | (?P<string> (?:\b[bfru]+)? (?: "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' ) )
    | (?P<number> \b\d(?:[\w.]|(?<=e)-)* )
    | (?P<keyword> \b(?:{"|".join(keyword.kwlist)})\b )
    """,
    re.VERBOSE,
)


def pieces(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of consecutive pieces that join to the source.

    Kinds are keyword, string, number and comment; "" for everything else.
    """
    done = 0
    for piece in PIECE.finditer(source):
        yield "", source[done : piece.start()]
        yield piece.lastgroup, piece[0]
        done = piece.end()
    yield "", source[done:]
