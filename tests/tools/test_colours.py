"""One colour per method, whatever else is drawn."""

from semanticfl_ref.config.registry import METHODS, register_method
from semanticfl_ref.tools.colours import BUILT_IN, method_colour
from semanticfl_ref.tools.report.drawing import COLOURS


def test_the_methods_of_the_package_differ():
    assert len({method_colour(name) for name in BUILT_IN}) == len(BUILT_IN)
    assert (method_colour("fedavg"), method_colour("semanticfl")) == COLOURS[:2]


def test_other_methods_take_the_palette_again_in_order(monkeypatch):
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    register_method("first-of-mine", object())
    register_method("second-of-mine", object())
    others = [name for name in METHODS if name not in BUILT_IN]
    for place, name in enumerate(others):
        assert method_colour(name) == COLOURS[place % len(COLOURS)]
    assert method_colour("not registered") == COLOURS[len(others) % len(COLOURS)]
