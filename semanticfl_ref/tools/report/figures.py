"""The figures of a run, from its files alone: who holds what, what it reached and for whom, what
its terms did, how far clients drifted, what was sent.

Letters: M clients in all, C classes, R rounds.
"""

from itertools import accumulate, cycle
from statistics import fmean

from semanticfl_ref.run.summary import recorded_names
from semanticfl_ref.tools.report.drawing import COLOURS, new_figure

WIDTH, HEIGHT = (
    5.0,
    3.3,
)  # inches: two side by side on a desktop, one on a phone with letters that can be read
STACKED = (
    100,
    2 * len(COLOURS),
)  # clients and classes that stacked bars can still show; a map of more
NAMED = 24  # rows of a map, or bars, that carry their names
GRADIENT = {
    "gradient_share": ("share of the gradient", (0, 1)),
    "gradient_norm": ("gradient's norm at the features", None),
    "gradient_cosine": ("cosine to cross-entropy's gradient", (-1, 1)),
}


def partition_figure(manifest: dict, class_names: list[str]):
    """Who holds how many images of which class: stacked bars, or a map where there are too many
    clients or classes for them.

    Args:
        manifest: a partition's, as in partition.json; corruptions and modalities stand under the
            clients.
        class_names: C names.
    """
    histograms = manifest["histograms"]
    if len(histograms) > STACKED[0] or len(class_names) > STACKED[1]:
        return _map(
            list(zip(*histograms, strict=True)),
            "client",
            class_names,
            "images of class",
            norm="log",
        )
    figure, axes = _panel("client", "images")
    # One outline a class, with gaps of no height between the clients: a shape for each bar would be
    # a thousand of them.
    edges = [client + side for client in range(len(histograms)) for side in (-0.42, 0.42)] + [
        len(histograms) - 0.42
    ]
    floor = [0] * len(histograms)
    for c, name in enumerate(class_names):
        top = [below + row[c] for below, row in zip(floor, histograms, strict=True)]
        heights, baseline = (
            [value for height in side for value in (height, 0)] for side in (top, floor)
        )
        look = {
            "color": COLOURS[c % len(COLOURS)],
            "hatch": None if c < len(COLOURS) else "////",
            "edgecolor": "white",
            "linewidth": 0,
        }
        axes.stairs(heights, edges, baseline=baseline, fill=True, label=plain(name), **look)
        floor = top
    axes.set_xlim(-0.7, len(histograms) - 0.3)
    if len(histograms) <= NAMED:
        marks = [
            [str(m)]
            + [
                manifest[key][m].replace(" ", "\n")
                for key in ("corruptions", "modalities")
                if manifest.get(key)
            ]
            for m in range(len(histograms))
        ]
        axes.set_xticks(
            range(len(histograms)), ["\n".join(lines) for lines in marks], fontsize="small"
        )
    figure.legend(loc="outside right upper", fontsize="small", frameon=False, reverse=True)
    return figure


def run_figures(
    rows: list[dict], partition: dict, class_names: list[str], confusion: list[list[int]] | None
) -> dict:
    """Name -> figure of everything that the rounds recorded.

    Args:
        rows: lines of metrics.jsonl, at least one.
        partition: partition.json.
        confusion: [C][C] counts, a true class a row, where the run is finished and has them.
    """
    rounds, last = [row["round"] for row in rows], rows[-1]
    accuracies = {
        key.split("_")[0]: (rounds, [row[key] for row in rows])
        for key in ("test_accuracy", "validation_accuracy")
        if last[key] is not None
    }
    band = ("worst to best client", [row["client_accuracy"] for row in rows])
    figures = {
        "accuracy": _curves("round", "accuracy", accuracies, band=band, limits=(0, 1)),
        "bytes": bytes_figure({"": rows}),
        "partition": partition_figure(partition, class_names),
    }
    for name, key, names in (
        ("classes", "class_accuracy", class_names),
        (
            "clients",
            "client_accuracy",
            [f"client {m}" for m in range(len(last["client_accuracy"]))],
        ),
    ):
        if last.get(key):
            extent = (0.5, len(rows) + 0.5, len(names) - 0.5, -0.5)  # rounds are counted from 1
            figures[name] = _map(
                list(zip(*(row[key] for row in rows), strict=True)),
                "round",
                names,
                key.replace("_", " "),
                vmin=0,
                vmax=1,
                extent=extent,
            )
    if confusion:
        shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
        figures["confusion"] = _map(
            shares, "predicted", class_names, "share of the true class", vmin=0, vmax=1
        )
    for key, (label, limits) in {"terms": ("value, unweighted", None), **GRADIENT}.items():
        recorded = [row.get(key) or {} for row in rows]
        if any(recorded):
            known = recorded_names(recorded)
            curves = {
                term.replace("_", " "): (rounds, [values.get(term) for values in recorded])
                if term in known
                else None
                for term in recorded_names([row["terms"] for row in rows])
            }
            figures[key] = _curves("round", label, curves, limits=limits, log=key == "terms")
    if last.get("drift"):
        known = [
            [norm for norm in row["drift"]["update_norm"] if norm is not None] or [float("nan")]
            for row in rows
        ]
        curves = {
            "mean of the clients'": (rounds, list(map(fmean, known))),
            "their average's": (rounds, [row["drift"]["mean_update_norm"] for row in rows]),
        }
        figures["drift"] = _curves(
            "round", "norm of the update", curves, band=("least to most", known), limits=(0, None)
        )
        figures["update_alignment"] = _curves(
            "round",
            "update_alignment of the updates",
            {"": (rounds, [row["drift"]["update_alignment"] for row in rows])},
            limits=(0, 1),
        )
    return figures


def accuracy_figure(runs: dict[str, list[dict]], key: str = "test_accuracy"):
    """Several runs' curves in one picture. runs: name -> lines of metrics.jsonl."""
    return _curves(
        "round",
        key.replace("_", " "),
        {
            name: ([row["round"] for row in rows], [row[key] for row in rows])
            for name, rows in runs.items()
        },
        limits=(0, 1),
    )


def bytes_figure(runs: dict[str, list[dict]]):
    """Accuracy over what was sent, both ways, until then: what a point of accuracy costs."""
    sent = {
        name: [
            total / 2**20
            for total in accumulate(row["bytes_down"] + row["bytes_up"] for row in rows)
        ]
        for name, rows in runs.items()
    }
    return _curves(
        "sent so far, MiB",
        "test accuracy",
        {name: (sent[name], [row["test_accuracy"] for row in rows]) for name, rows in runs.items()},
        limits=(0, 1),
    )


def plain(name: str) -> str:
    """A name that fits beside a picture, and that matplotlib takes for text rather than for a
    formula.
    """
    return (name if len(name) <= 28 else f"{name[:27]}…").replace("$", r"\$")


def _curves(
    across: str,
    up: str,
    curves: dict,
    *,
    band: tuple[str, list] | None = None,
    limits=None,
    log: bool = False,
):
    """Lines: name -> (places, values), or None for a name whose colour stays free. `band`: its
    name, and of every round the values that it spans.
    """
    figure, axes = _panel(across, up)
    if band:
        axes.fill_between(
            range(1, len(band[1]) + 1),
            list(map(min, band[1])),
            list(map(max, band[1])),
            color=COLOURS[7],
            alpha=0.25,
            linewidth=0,
            label=band[0],
        )
    styles = cycle((line, colour) for line in ("-", "--", ":") for colour in COLOURS)
    for (name, curve), (line, colour) in zip(curves.items(), styles):
        if curve is not None:
            axes.plot(
                *curve,
                label=plain(name),
                color=colour,
                linestyle=line,
                marker="o" if len(curve[0]) == 1 else None,
            )
    if limits:
        axes.set_ylim(*limits)
    if log and all(
        value is not None and value > 0 for _, values in curves.values() for value in values
    ):
        axes.set_yscale("log", subs=())
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
    names = [name for name in axes.get_legend_handles_labels()[1] if name]
    if names:
        columns = 3 if max(map(len, names)) <= 20 else 1
        figure.set_figheight(HEIGHT + 0.2 * ((len(names) - 1) // columns))
        figure.legend(
            loc="outside upper left",
            ncols=columns,
            fontsize="small",
            frameon=False,
            columnspacing=1.2,
        )
    return figure


def _map(table, across: str, names: list[str], label: str, **options):
    """A matrix as colours, its scale beside it; a confusion has its names below too."""
    figure, axes = _panel(across, "")
    axes.grid(False)
    table = [[float("nan") if value is None else value for value in row] for row in table]
    figure.colorbar(
        axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest", **options),
        ax=axes,
        label=label,
    )
    if len(names) <= NAMED:
        axes.set_yticks(range(len(names)), list(map(plain, names)))
        if across == "predicted":
            axes.set_xticks(range(len(names)), list(map(plain, names)), rotation=90)
    return figure


def _panel(across: str, up: str):
    figure, ((axes,),) = new_figure(width=WIDTH, height=HEIGHT)
    axes.set(xlabel=across, ylabel=up, axisbelow=True)
    axes.xaxis.get_major_locator().set_params(integer=across in ("round", "client"))
    axes.grid(axis="y", linewidth=0.5)
    return figure, axes
