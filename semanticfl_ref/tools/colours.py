"""One colour per method, the same in every figure."""

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.tools.report.drawing import COLOURS

# The methods of the package, in the order in which they take the palette's colours.
BUILT_IN = (
    *("fedavg", "semanticfl", "scaffold", "moon", "fedprox", "fedrcl", "feddisco", "fedcda"),
    "feddifrc",
)


def method_colour(name: str) -> str:
    """The colour of a method: fixed for those of the package.

    Others take the palette from its start again, in the order of their registration.

    Args:
        name: as registered, without settings in brackets.
    """
    order = list(dict.fromkeys((*BUILT_IN, *METHODS, name)))
    return COLOURS[order.index(name) % len(COLOURS)]
