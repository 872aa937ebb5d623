"""A comparison for a reader: Markdown, CSV, and its figures."""

import csv
import io
from pathlib import Path
from statistics import fmean

from semanticfl_ref.tools.compare.statistics import spread
from semanticfl_ref.tools.report.drawing import COLOURS, new_figure, save_figure
from semanticfl_ref.formatting import format_bytes as size


def markdown(result: dict, command: str | None = None) -> str:
    """A table a scenario, then one over all; under them what was run, where."""
    seeds, machine = result["seeds"], result["machine"]
    lines, on_test = [], "" if result["part"] == "test" else ", test part"
    for scenario in dict.fromkeys(cell["scenario"] for cell in result["cells"]):
        lines += [f"**{'all scenarios' if scenario == 'all' else scenario}**", ""]
        lines += [
            f"| method | last round | mean of last five | worst client{on_test} | sent | minus {result['baseline']}, paired | wins |",
            "|" + " --- |" * 7,
        ]
        lines += [_row(cell) for cell in result["cells"] if cell["scenario"] == scenario] + [""]
    versions = ", ".join(
        f"{name} {version}" for name, version in machine["versions"].items() if version
    )
    lines += [
        f"{result['dataset']}, {result['part']} accuracy in %, {f'mean ± standard deviation over {len(seeds)} seeds' if len(seeds) > 1 else 'one seed'}, {result['rounds']} rounds. Runs of a seed share split, clients, "
        "initial weights and batches. In brackets the 95 % bootstrap interval of the mean paired difference: with few seeds it is narrower than the truth.",
        f"{machine['device']} ({machine['processor']}), {machine['precision']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a run, Python {machine['python']}, {versions}.",
    ]
    return "\n".join(lines + (["", f"    {command}"] if command else []))


def csv_text(result: dict) -> str:
    """A line a run: scenario, method, seed, its accuracies and its difference to the baseline."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["scenario", "method", "seed", "last_round", "last_five", "worst_client", "minus_baseline"]
    )
    for cell in result["cells"]:
        if cell["scenario"] != "all":
            gains = cell["gain"]["values"] if cell["gain"] else [0.0] * len(result["seeds"])
            for seed, *values in zip(
                result["seeds"],
                cell["last"],
                cell["last_five"],
                cell["worst_client"],
                gains,
                strict=True,
            ):
                writer.writerow(
                    [cell["scenario"], cell["arm"], seed, *(f"{v:.4f}" for v in values)]
                )
    return buffer.getvalue()


def draw_curves(result: dict, *paths: Path) -> None:
    """Accuracy over rounds, a panel a scenario, a line an arm, a band of one standard deviation
    over seeds.
    """
    figure, axes = new_figure(
        1, len(result["curves"]), width=4.6 * len(result["curves"]), height=4.2, sharey=True
    )
    for axis, (scenario, arms) in zip(axes[0], result["curves"].items(), strict=True):
        for i, (arm, curve) in enumerate(arms.items()):
            colour, rounds = COLOURS[i % len(COLOURS)], range(1, len(curve["mean"]) + 1)
            axis.plot(
                rounds,
                curve["mean"],
                label=arm,
                color=colour,
                linestyle="-" if i < len(COLOURS) else "--",
                linewidth=2.2 if arm == "semanticfl" else 1.3,
            )
            if curve["spread"][0] is not None:
                low, high = (
                    [m + sign * s for m, s in zip(curve["mean"], curve["spread"], strict=True)]
                    for sign in (-1, 1)
                )
                axis.fill_between(rounds, low, high, color=colour, alpha=0.08, linewidth=0)
        axis.set(title=scenario, xlabel="round")
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel(f"{result['part']} accuracy, %")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(5, len(arms)),
        frameon=False,
    )
    save_figure(figure, *paths)


def draw_gains(result: dict, *paths: Path) -> None:
    """Paired differences to the baseline, a panel a scenario, a bar an arm with its interval, a dot
    a seed.
    """
    groups = list(dict.fromkeys(cell["scenario"] for cell in result["cells"]))
    arms = list(dict.fromkeys(cell["arm"] for cell in result["cells"]))
    compared = [arm for arm in arms if arm != result["baseline"]]
    if not compared:
        return
    figure, axes = new_figure(
        1,
        len(groups),
        width=1.6 + 3.1 * len(groups),
        height=1.2 + 0.42 * len(compared),
        sharey=True,
        sharex=True,
    )
    for axis, group in zip(axes[0], groups, strict=True):
        cells = {cell["arm"]: cell["gain"] for cell in result["cells"] if cell["scenario"] == group}
        for place, arm in enumerate(compared):
            g = cells[arm]
            axis.barh(
                place,
                g["mean"],
                color=COLOURS[arms.index(arm) % len(COLOURS)],
                alpha=0.75,
                height=0.7,
            )
            axis.plot(
                g["values"], [place] * len(g["values"]), ".", color="black", markersize=4, alpha=0.6
            )
            if g["low"] is not None:
                axis.plot([g["low"], g["high"]], [place, place], color="black", linewidth=1.2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(
            title="all scenarios" if group == "all" else group,
            xlabel=f"points over {result['baseline']}",
        )
        axis.set_yticks(range(len(compared)), compared)
        axis.grid(axis="x", alpha=0.25)
    axes[0, 0].invert_yaxis()
    save_figure(figure, *paths)


def _row(cell: dict) -> str:
    gain = cell["gain"]
    interval = (
        f" [{gain['low']:+.1f}, {gain['high']:+.1f}]" if gain and gain["low"] is not None else ""
    )
    difference, wins = (
        (f"{gain['mean']:+.1f}{interval}", f"{gain['wins']} of {len(gain['values'])}")
        if gain
        else ("", "")
    )
    numbers = [mean(cell[name]) for name in ("last", "last_five", "worst_client")]
    return f"| {cell['arm']} | {' | '.join(numbers)} | {size(cell['bytes_sent'])} | {difference} | {wins} |"


def mean(values: list[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    deviation = spread(values)
    return f"{fmean(values):.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")
