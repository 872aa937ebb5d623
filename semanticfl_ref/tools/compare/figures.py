"""The figures of a comparison: accuracy over rounds, and differences to the baseline."""

import numpy as np

from semanticfl_ref.tools.compare.statistics import Comparison, Gain
from semanticfl_ref.tools.report.drawing import STYLES, method_colour, new_figure


def curves_figure(comparison: Comparison):
    """Accuracy over rounds: a panel per scenario, a line per method, a band of one standard
    deviation over seeds.
    """
    curves = comparison.curves
    figure, axes = new_figure(len(curves), width=4.6 * len(curves), height=4.2, sharey=True)
    for axis, (scenario, methods) in zip(axes, curves.items(), strict=True):
        drawn: list[str] = []
        for method, curve in methods.items():
            colour = method_colour(method)
            # A method has one colour; with several settings its lines differ in style.
            style = STYLES[drawn.count(colour) % len(STYLES)]
            drawn.append(colour)
            mean = np.array(curve["mean"])
            deviation = np.array(curve["deviation"], dtype=float)  # NaN draws no band
            rounds = range(1, len(mean) + 1)
            axis.plot(rounds, mean, label=method, color=colour, linestyle=style)
            band = mean - deviation, mean + deviation
            axis.fill_between(rounds, *band, color=colour, alpha=0.08, linewidth=0)
        axis.set(title=scenario, xlabel="round")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{comparison.part} accuracy, %\n(band: ± standard deviation over seeds)")
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False)
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
    figure, axes = new_figure(
        len(panels),
        width=1.6 + 3.1 * len(panels),
        height=1.2 + 0.42 * max(map(len, panels.values())),
        sharex=True,
        sharey=True,
    )
    for axis, (scenario, gains) in zip(axes, panels.items(), strict=True):
        for method, gain in gains.items():
            axis.barh(method, gain.mean, color=method_colour(method), alpha=0.75, height=0.7)
            axis.plot(gain.values, [method] * len(gain.values), "k.", markersize=4, alpha=0.6)
            if gain.low is not None:
                axis.plot([gain.low, gain.high], [method, method], "k-", linewidth=1.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=scenario, xlabel=f"percentage points over {comparison.baseline}")
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    return figure
