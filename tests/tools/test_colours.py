"""One colour per method."""

from semanticfl_ref.config.settings import METHODS
from semanticfl_ref.tools import colours


def test_every_built_in_method_has_a_colour_of_its_own():
    own = [name for name, entry in METHODS.entries.items() if isinstance(entry.target, str)]
    assert sorted(colours.BUILT_IN) == sorted(own)
    found = {colours.method_colour(name) for name in own}
    assert len(found) == len(own) and found <= set(colours.COLOURS)


def test_further_names_take_colours_in_the_order_of_first_use(monkeypatch):
    monkeypatch.setattr(colours, "_places", {name: n for n, name in enumerate(colours.BUILT_IN)})
    found = [colours.method_colour(name) for name in ("b", "a", "b")]
    assert found == [colours.COLOURS[0], colours.COLOURS[1], colours.COLOURS[0]]
