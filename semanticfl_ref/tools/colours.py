"""One colour per method, the same in every figure."""

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.tools.report.drawing import COLOURS


def method_colour(name: str) -> str:
    """The colour of a method: the palette's, in the order of registration, over and over.

    Args:
        name: as registered, without settings in brackets.
    """
    order = list(dict.fromkeys((*METHODS, name)))
    return COLOURS[order.index(name) % len(COLOURS)]
