"""The colours of all figures: a palette that the colour-blind can tell apart, and one colour per
method.
"""

# The palette of Okabe and Ito (2008), darkest last.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D1F",
    "#7F7F7F",
    "#000000",
)
BUILT_IN = (
    "semanticfl",
    "feddifrc",
    "fedprox",
    "scaffold",
    "moon",
    "fedrcl",
    "feddisco",
    "fedcda",
    "fedavg",
)
_places = {name: place for place, name in enumerate(BUILT_IN)}


def method_colour(name: str) -> str:
    """A method's colour, the same in every figure: fixed for the package's own methods; further
    names take the palette's colours in the order of their first use.
    """
    place = _places.setdefault(name, len(_places))
    return COLOURS[place % len(COLOURS)]
