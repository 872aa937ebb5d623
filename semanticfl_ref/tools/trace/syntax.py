"""Python source in coloured pieces, by the standard library's tokenizer."""

import io
import itertools
import keyword
import tokenize
from collections.abc import Iterator

KINDS = {tokenize.NUMBER: "number", tokenize.COMMENT: "comment", tokenize.STRING: "string"}


def pieces(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of consecutive pieces that join to the source.

    Kinds are keyword, string, number and comment; "" for everything else. The source is a statement
    or the head of a compound one.
    """
    lengths = [len(line) for line in source.splitlines(keepends=True)]
    starts = list(itertools.accumulate(lengths, initial=0))
    done = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # Python 3.12 and later give the pieces of an f-string: FSTRING_START, ...
        is_string = tokenize.tok_name[token.type].startswith("FSTRING")
        kind = "string" if is_string else KINDS.get(token.type, "")
        if keyword.iskeyword(token.string):
            kind = "keyword"
        if kind:
            start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            yield "", source[done:start]
            yield kind, source[start:end]
            done = end
    yield "", source[done:]
