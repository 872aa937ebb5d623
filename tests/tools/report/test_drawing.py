"""One colour per method, whatever else is drawn."""

from semanticfl_ref.config.registry import METHODS, register_method
from semanticfl_ref.tools.report.drawing import COLOURS, method_colour


def test_the_methods_of_the_package_differ():
    own = list(METHODS)[: len(COLOURS)]
    assert len({method_colour(name) for name in own}) == len(own) == 9
    assert (method_colour("fedavg"), method_colour("semanticfl")) == COLOURS[:2]


def test_more_methods_take_the_palette_again(monkeypatch):
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    before = len(METHODS)
    register_method("mine", "mine:METHOD")
    assert method_colour("mine") == COLOURS[before % len(COLOURS)]
    assert method_colour("not registered") == COLOURS[(before + 1) % len(COLOURS)]
