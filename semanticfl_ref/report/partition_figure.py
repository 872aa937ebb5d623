"""Who holds what, drawn: a stacked bar for every client, a colour for every class. Needs matplotlib, which is imported when it is used.

Letters: M clients in all, C classes.
"""

import importlib.util
from pathlib import Path

from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import PART, writing

# Paul Tol's "muted" scheme, whose neighbours colour-blind readers can tell apart, and black for a tenth.
MUTED = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#111111")
NAMED = 25  # clients whose number, camera and anchors are written; of more, every so many-th


def refuse_without_matplotlib() -> None:
    """Raises UserError, before any work is done for a figure that cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--figure needs matplotlib: pip install matplotlib, or leave the flag out: the table needs nothing")


def draw(manifest: dict, class_names: tuple[str, ...], file: Path) -> None:
    """A partition's manifest as a PNG; written whole or not at all.

    Up to ten classes have colours of their own and a legend; more share a scale from dark to light (cividis), in the classes' order.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, clients, classes = manifest["histograms"], len(manifest["histograms"]), len(class_names)
    few = classes <= len(MUTED)
    colours = MUTED if few else [colormaps["cividis"](c / (classes - 1)) for c in range(classes)]
    chart = Figure(figsize=(min(16, max(7, 3 + 0.55 * clients)), 5), layout="constrained")
    FigureCanvasAgg(chart)
    axes = chart.add_subplot(1, 1, 1, xlabel="client", ylabel="training images")
    step = -(-clients // NAMED)
    half, edge = (0.43, {"edgecolors": "white", "linewidths": 0.4}) if step == 1 else (0.5, {"antialiaseds": False})  # bars that touch would show seams
    held = [(m, c, sum(row[:c]), sum(row[: c + 1])) for m, row in enumerate(rows) for c in range(classes) if row[c]]
    corners = [((m - half, low), (m - half, high), (m + half, high), (m + half, low)) for m, _, low, high in held]
    axes.add_collection(PolyCollection(corners, facecolors=[colours[c] for _, c, _, _ in held], **edge))  # one artist: a bar each would take minutes
    axes.set_ylim(0, 1.03 * max(manifest["sizes"]))
    marks = [[str(m)] + [manifest[key][m].replace(" ", "\n") for key in ("cameras", "modalities") if manifest[key]] for m in range(0, clients, step)]
    axes.set_xticks(range(0, clients, step), ["\n".join(mark if step == 1 else mark[:1]) for mark in marks], fontsize="small")
    axes.set_xlim(-0.6, clients - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    if few:
        patches = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, class_names)]
        axes.legend(handles=patches[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="class")  # as the bars are stacked
    else:
        chart.colorbar(ScalarMappable(Normalize(0, classes - 1), "cividis"), ax=axes, label="class, by its number")
    alpha = "" if manifest["alpha"] is None else f", alpha {manifest['alpha']:g}"
    dropped = f", {sum(manifest['dropped'])} images belong to nobody" if manifest["dropped"] else ""
    axes.set_title(f"{manifest['scenario']}{alpha}, seed {manifest['seed']}: skew {manifest['skew']:.2f}, KL {manifest['kl']:.2f}{dropped}", loc="left", fontsize="medium")
    temporary = file.with_name(file.name + PART)
    with writing(file, "choose another --figure"):
        chart.savefig(temporary, format="png", dpi=120)
        temporary.replace(file)
