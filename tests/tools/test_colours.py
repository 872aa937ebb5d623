"""One colour per method, whatever else is drawn."""

from semanticfl_ref.config.registry import METHODS, register_method
from semanticfl_ref.tools.colours import BUILT_IN, method_colour, method_lines
from semanticfl_ref.tools.report.drawing import COLOURS


def test_the_methods_of_the_package_differ():
    assert set(BUILT_IN) >= {name for name in METHODS if name in BUILT_IN}
    assert len({method_colour(name) for name in BUILT_IN}) == len(BUILT_IN)
    assert (method_colour("fedavg"), method_colour("semanticfl")) == COLOURS[:2]


def test_settings_do_not_change_the_colour_but_the_line():
    entries = ["moon", "semanticfl", "moon[moon.mu=5]", "moon[moon.mu=1]"]
    lines = method_lines(entries)
    assert [line["color"] for line in lines] == [method_colour(e.split("[")[0]) for e in entries]
    assert [line["linestyle"] for line in lines] == ["-", "-", "--", ":"]
    assert method_colour(entries[2]) == method_colour("moon")


def test_other_methods_take_the_palette_again_in_order(monkeypatch):
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    register_method("first-of-mine", object())
    register_method("second-of-mine", object())
    others = [name for name in METHODS if name not in BUILT_IN]
    for place, name in enumerate(others):
        assert method_colour(name) == COLOURS[place % len(COLOURS)]
    assert method_colour("not registered") == COLOURS[len(others) % len(COLOURS)]
