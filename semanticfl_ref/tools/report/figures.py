"""The figures of recorded runs: who holds what, the accuracy reached and for whom, what the loss
terms did, how far clients drifted, what was sent.

Letters: M clients in all, K clients of a round, C classes, R rounds, T loss terms.
"""

from collections.abc import Sequence

import numpy as np

from semanticfl_ref.run.summary import names_in
from semanticfl_ref.tools.report.drawing import (
    COLOURS,
    STYLES,
    method_colour,
    new_figure,
    plain,
    readable_names,
)
from semanticfl_ref.tools.report.runs import Run

WIDTH, HEIGHT = 5.0, 3.3  # inches: two side by side on a desktop, one on a phone, still readable
MOST_CLIENTS, MOST_CLASSES = 40, 2 * len(COLOURS)  # that stacked bars can show; else a map
NAMED = 24  # bars that carry their names
NAMED_ROWS, ROW = 60, 0.15  # rows of a map that carry their names, and their height in inches
PERCENT = "{x:.0%}"
SHORT = 9  # letters of a class's name that fits below a column
SHARES = {"vmin": 0, "vmax": 1, "format": PERCENT}  # of a map
SENT = "sent so far, MiB"
TERM_FIGURES = {
    "terms": "value, unweighted",
    "gradient_share": "share of the gradient norm",
    "gradient_norm": "gradient norm at the features",
    "gradient_cosine": "cosine to cross-entropy's gradient",
}


def run_figures(run: Run) -> dict:
    """Name -> figure, of everything that the rounds of a run recorded."""
    parts = [(part, run, part) for part in ("test", "validation")]
    accuracies_RM = np.array([row["client_accuracy"] for row in run.rows])
    figures = {
        "accuracy": _accuracies("accuracy", parts, band=accuracies_RM),
        "bytes": _accuracies("test accuracy", [(run.method, run, "test")], SENT),
        "partition": partition_figure(run.partition, run.class_names),
        "classes": _accuracy_map(run, "class", readable_names(run.class_names)),
        "clients": _accuracy_map(run, "client", range(run.partition["clients"])),
        **_drift_figures(run),
        **_term_figures(run),
    }
    if "confusion" in run.summary:
        figures["confusion"] = _confusion_map(run)
    return {name: figure for name, figure in figures.items() if figure}


def comparison_figures(runs: dict[str, Run]) -> dict:
    """Name -> figure, of several runs by name; None without validation accuracies."""
    test = [(name, run, "test") for name, run in runs.items()]
    validation = [(name, run, "validation") for name, run in runs.items()]
    return {
        "test": _accuracies("test accuracy", test),
        "bytes": _accuracies("test accuracy", test, SENT),
        "validation": _accuracies("validation accuracy", validation),
    }


def partition_figure(manifest: dict, class_names: list[str]):
    """How many images of which class each client holds: stacked bars, or a map if there are too
    many clients or classes for them.

    Args:
        manifest: a partition's manifest, as in partition.json; corruptions and modalities are
            written below the clients.
        class_names: C names.
    """
    counts_CM = np.array(manifest["histograms"]).T
    classes, clients = counts_CM.shape
    if clients > MOST_CLIENTS or classes > MOST_CLASSES:
        axes = _panel("client", "class")
        return _map(axes, counts_CM, "images", readable_names(class_names), norm="log")
    axes = _panel("client", "images")
    names = readable_names(class_names)
    # One outline per class, with gaps of height zero between the clients: with a shape per bar, a
    # file would hold a thousand of them.
    edges = [m + side for m in range(clients) for side in (-0.42, 0.42)]
    heights = np.insert(counts_CM, range(1, clients), 0, axis=1)
    for c, top in enumerate(heights.cumsum(axis=0)):
        axes.stairs(
            top,
            edges,
            baseline=top - heights[c],
            fill=True,
            label=names[c],
            hatch="////" if c >= len(COLOURS) else None,
            edgecolor="white",
        )
    axes.set_xlim(-0.7, clients - 0.3)
    if clients <= NAMED:
        # Below a client's number: what else differs between clients.
        differing = filter(None, (manifest.get("corruptions"), manifest.get("modalities")))
        columns = zip(range(clients), *differing, strict=True)
        labels = ["\n".join(map(str, column)).replace(" ", "\n") for column in columns]
        axes.set_xticks(range(clients), labels, fontsize="x-small")
    axes.figure.legend(loc="outside right upper", fontsize="small", frameon=False, reverse=True)
    return axes.figure


def _accuracies(up: str, lines: list[tuple], across: str = "round", band=None):
    """A figure of accuracies with the chance level, 1/C.

    A line has the colour of its run's method; lines of one colour differ in style.

    Args:
        up: label of the accuracies.
        lines: label, run, and part of the data set ("test" or "validation").
        across: "round" or SENT.
        band: [R, M], whose range is drawn.
    """
    axes, methods = _panel(across, up), []
    for label, run, part in lines:
        values = [row[f"{part}_accuracy"] for row in run.rows]
        if values[-1] is None:
            continue
        style = STYLES[methods.count(run.method) % len(STYLES)]
        methods.append(run.method)
        x = run.sent if across == SENT else run.rounds
        axes.plot(x, values, color=method_colour(run.method), linestyle=style, label=plain(label))
    if not methods:
        return None
    if band is not None:
        _band(axes, lines[0][1].rounds, "worst to best client", band)
    _percent_axis(axes)
    for classes in sorted({len(run.class_names) for _, run, _ in lines}):
        label = f"chance level, 1/{classes}"
        axes.axhline(1 / classes, color="black", linestyle=(0, (1, 2)), linewidth=1, label=label)
    return _with_legend(axes)


def _term_figures(run: Run) -> dict:
    """Figures with a line per loss term, which has one colour in all of them."""
    figures = {}
    for key, label in TERM_FIGURES.items():
        axes = _panel("round", label)
        for term in names_in(row["terms"] for row in run.rows):
            values_R = np.array([row[key].get(term) for row in run.rows], dtype=float)
            # A term that is not in this figure takes its colour without a label.
            name = term.replace("_", " ") if np.isfinite(values_R).any() else None
            axes.plot(run.rounds, values_R, label=name)
        if key == "gradient_share":
            _percent_axis(axes)
        elif key == "gradient_cosine":
            axes.set_ylim(-1, 1)
        elif key == "terms" and axes.dataLim.ymin > 0:
            axes.set_yscale("log", subs=())
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
        figures[key] = _with_legend(axes)
    return figures


def _drift_figures(run: Run) -> dict:
    """How far clients moved, and how much of that their average did."""
    drift = [row["drift"] for row in run.rows]
    # A client that was dropped has no norm.
    norms_RK = np.ma.masked_invalid(np.array([d["update_norm"] for d in drift], dtype=float))
    moved = _panel("round", "norm of the update")
    moved.plot(run.rounds, norms_RK.mean(axis=1), label="mean over clients")
    moved.plot(run.rounds, [d["mean_update_norm"] for d in drift], label="their average")
    _band(moved, run.rounds, "smallest to largest", norms_RK)
    moved.set_ylim(0, None)
    aligned = _panel("round", "update alignment")
    alignment = [d["update_alignment"] for d in drift]
    aligned.plot(run.rounds, alignment, label="update alignment")
    aligned.set_ylim(0, 1)
    return {"drift": _with_legend(moved), "update_alignment": _with_legend(aligned)}


def _accuracy_map(run: Run, what: str, names: Sequence):
    """Accuracies of classes or clients, one per row, over the rounds."""
    accuracies = np.array([row[f"{what}_accuracy"] for row in run.rows], dtype=float).T
    extent = (0.5, run.rounds[-1] + 0.5, len(accuracies) - 0.5, -0.5)  # rounds count from 1
    axes = _panel("round", what)
    return _map(axes, accuracies, f"{what} accuracy", names, extent=extent, **SHARES)


def _confusion_map(run: Run):
    axes, counts_CC = _panel("predicted class", "true class"), np.array(run.summary["confusion"])
    shares_CC = counts_CC / counts_CC.sum(axis=1, keepdims=True).clip(1)
    names, numbers = run.class_names, range(len(run.class_names))
    if max(map(len, names)) > SHORT:  # below the map, they would take its place
        axes.set_xlabel("predicted class, by number")
        names = readable_names(names, numbered=True)
    elif len(names) <= NAMED:
        names = readable_names(names)
        axes.set_xticks(numbers, names, rotation=90)
    return _map(axes, shares_CC, "share of the true class", names, **SHARES)


def _map(axes, values, label: str, names: Sequence, format: str = "{x:g}", **options):
    """The figure of a matrix as colours, with their scale and the names of its rows.

    Args:
        names: as they are to be written; a range for rows that are numbers.
    """
    image = axes.imshow(values, aspect="auto", cmap="cividis", **options)
    bar = axes.figure.colorbar(image, label=label, format=format)
    bar.ax.yaxis.set_minor_formatter(format)
    axes.grid(False)
    if len(names) <= (NAMED if isinstance(names, range) else NAMED_ROWS):
        axes.set_yticks(range(len(names)), list(map(str, names)), fontsize="small")
        axes.figure.set_figheight(max(HEIGHT, ROW * len(names) + 0.8))
    return axes.figure


def _panel(across: str, up: str):
    axes = new_figure(width=WIDTH, height=HEIGHT)[1][0]
    axes.set(xlabel=across, ylabel=up, axisbelow=True)
    axes.xaxis.get_major_locator().set_params(integer=across != SENT, min_n_ticks=1)
    axes.grid(axis="y", linewidth=0.5)
    return axes


def _band(axes, rounds: list[int], label: str, values: np.ndarray) -> None:
    """From the smallest to the largest value of every round; a row per round."""
    axes.fill_between(
        rounds,
        values.min(axis=1),
        values.max(axis=1),
        color=COLOURS[7],
        alpha=0.25,
        linewidth=0,
        label=label,
    )


def _percent_axis(axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PERCENT)


def _with_legend(axes):
    """The figure with a legend above, which makes it higher; None if nothing has a label."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return None
    for line in axes.lines:
        line.set_marker("o" if len(line.get_xdata()) == 1 else "")
    columns = 3 if max(map(len, labels)) <= 20 else 1
    axes.figure.set_figheight(HEIGHT + 0.2 * ((len(labels) - 1) // columns))
    axes.figure.legend(
        loc="outside upper left",
        ncols=columns,
        fontsize="small",
        frameon=False,
        columnspacing=1.2,
    )
    return axes.figure
