"""One colour per method, the same in every figure."""

from collections import Counter
from collections.abc import Iterable

from semanticfl_ref.config.registry import METHODS
from semanticfl_ref.tools.report.drawing import COLOURS

# The methods of the package, in the order in which they take the palette's colours.
BUILT_IN = (
    *("fedavg", "semanticfl", "scaffold", "moon", "fedprox", "fedrcl", "feddisco", "fedcda"),
    "feddifrc",
)
LINES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))


def method_colour(method: str) -> str:
    """The colour of a method: fixed for those of the package.

    Others take the palette from its start again, in the order of their registration.

    Args:
        method: its name; settings in brackets do not change the colour.
    """
    name = method.partition("[")[0]
    order = list(dict.fromkeys((*BUILT_IN, *METHODS, name)))
    return COLOURS[order.index(name) % len(COLOURS)]


def method_lines(methods: Iterable[str]) -> list[dict]:
    """Colour and line style of every method's curve: those of one colour differ in style."""
    drawn: Counter[str] = Counter()
    lines = []
    for colour in map(method_colour, methods):
        lines.append({"color": colour, "linestyle": LINES[drawn[colour] % len(LINES)]})
        drawn[colour] += 1
    return lines
