"""The figures of a comparison: accuracy over rounds, and differences to the baseline."""

import re
from collections.abc import Collection

import numpy as np

from semanticfl_ref.tools.compare.grid import short_name
from semanticfl_ref.tools.compare.statistics import Comparison, Gain
from semanticfl_ref.tools.report.drawing import (
    STYLES,
    method_colour,
    new_figure,
    readable_names,
)

OURS = "semanticfl"  # its first entry stands out; without one, the best does
LEAST = 5.0  # percentage points that an axis shows at least: less is noise of a seed or two
APART = 0.06  # of an axis's height: the distance of two labels


def curves_figure(comparison: Comparison):
    """Accuracy over rounds: a panel per scenario, a line per method, labelled at its end, a band of
    one standard deviation over seeds. Rivals are muted.
    """
    curves = comparison.curves
    names = names_of(next(iter(curves.values())))
    width = 4.2 + 0.08 * max(map(len, names.values()))
    figure, axes = new_figure(len(curves), width=width * len(curves), height=4.2, sharey=True)
    for axis, (scenario, methods) in zip(axes, curves.items(), strict=True):
        drawn: list[str] = []
        best = max(methods, key=lambda method: methods[method]["mean"][-1])
        ours = (method for method in methods if method_colour(method) == method_colour(OURS))
        first = next(ours, best)
        for method, curve in methods.items():
            colour = method_colour(method)
            # A method has one colour; with several settings its lines differ in style.
            style = STYLES[drawn.count(colour) % len(STYLES)]
            drawn.append(colour)
            mean = np.array(curve["mean"])
            deviation = np.array(curve["deviation"], dtype=float)  # NaN draws no band
            rounds = range(1, len(mean) + 1)
            stands_out = method == first
            (line,) = axis.plot(rounds, mean, label=names[method], color=colour, linestyle=style)
            line.set(linewidth=2.2 if stands_out else 1.1, alpha=1 if stands_out else 0.7)
            line.set_marker("" if len(mean) > 1 else "o")
            band = mean - deviation, mean + deviation
            axis.fill_between(rounds, *band, color=colour, alpha=0.08, linewidth=0)
        axis.set(title=scenario, xlabel="round")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.25)
    seeds = len(comparison.seeds)
    spread = f"mean of {seeds} seeds; band: ± standard deviation" if seeds > 1 else "one seed"
    axes[0].set_ylabel(f"{comparison.part} accuracy, %\n({spread})")
    _widen(axes[0].set_ylim, *axes[0].get_ylim())
    for axis in axes:
        _label_ends(axis)
    return figure


def gains_figure(comparison: Comparison):
    """Paired differences to the baseline after the last round: a panel per scenario, a bar per
    method, a dot per seed, and the interval of the mean if there is one. None for a single method.
    """
    panels: dict[str, dict[str, Gain]] = {}
    for result in comparison.results:  # of several numbers of rounds, the last remains
        if result.gain:
            panels.setdefault(result.scenario, {})[result.method] = result.gain
    if not panels:
        return None
    names = names_of(next(iter(panels.values())))
    figure, axes = new_figure(
        len(panels),
        width=1 + 0.1 * max(map(len, names.values())) + 3.1 * len(panels),
        height=1.5 + 0.42 * max(map(len, panels.values())),
        sharex=True,
        sharey=True,
    )
    for axis, (scenario, gains) in zip(axes, panels.items(), strict=True):
        for y, (method, gain) in enumerate(gains.items()):
            axis.barh(y, gain.mean, color=method_colour(method), alpha=0.75, height=0.7)
            axis.plot(gain.values, [y] * len(gain.values), "k.", markersize=4, alpha=0.6)
            if gain.low is not None:
                axis.plot([gain.low, gain.high], [y, y], "k-", linewidth=1.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(scenario)
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(names)), list(names.values()))
    _widen(axes[0].set_xlim, *axes[0].get_xlim())
    axes[0].invert_yaxis()
    (baseline,) = names_of([comparison.baseline]).values()
    figure.supxlabel(
        f"percentage points over {baseline} (seeds: {len(comparison.seeds)}, a dot each)",
        fontsize="medium",
    )
    return figure


def names_of(entries: Collection[str]) -> dict[str, str]:
    """Entry of the grid -> name in figures."""
    # fedprox[fedprox.mu=1] -> fedprox[mu=1]
    short = [re.sub(r"(?<=[\[;])\s*\w+\.", "", short_name(entry)) for entry in entries]
    return dict(zip(entries, readable_names(short), strict=True))


def _widen(set_limits, low: float, high: float) -> None:
    """Show at least LEAST percentage points."""
    missing = max(0.0, LEAST - (high - low))
    set_limits(low - missing / 2, high + missing / 2)


def _label_ends(axis) -> None:
    """A line's label beside its last point; labels that would overlap are moved apart."""
    low, high = axis.get_ylim()
    gap, places = APART * (high - low), []
    lines = sorted(axis.get_lines(), key=lambda line: line.get_ydata()[-1])
    for line in lines:
        places.append(max([line.get_ydata()[-1], *(place + gap for place in places[-1:])]))
    for line, place in zip(reversed(lines), reversed(places), strict=True):
        place = min(place, high)
        axis.text(
            1.02,
            place,
            line.get_label(),
            transform=axis.get_yaxis_transform(),
            color=line.get_color(),
            fontweight="bold" if line.get_linewidth() > 2 else "normal",
            fontsize="small",
            verticalalignment="center",
        )
        high = place - gap
