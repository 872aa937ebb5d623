"""Who holds what, drawn: a stacked bar for every client, a colour for every class.

Letters: M clients in all, C classes.
"""

from pathlib import Path

from semanticfl_ref.report.drawing import COLOURS, new_figure, save_figure

BARS = (*COLOURS, "#F0E442")  # with the yellow of Okabe and Ito's, which is too light for a line
NAMED = 25  # clients whose number, camera and anchors are written; of more, every so many-th number


def draw(manifest: dict, class_names: tuple[str, ...], path: Path) -> None:
    """A partition's manifest as PNG or SVG.

    Up to ten classes have colours of their own and a legend; more share a scale from dark to light (cividis), in the classes' order.

    Raises:
        DataError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    rows, clients, classes = manifest["histograms"], len(manifest["histograms"]), len(class_names)
    few = classes <= len(BARS)
    colours = BARS if few else [colormaps["cividis"](c / (classes - 1)) for c in range(classes)]
    figure, axes = new_figure(width=min(16, max(7, 3 + 0.65 * clients)), height=5)
    axis, step = axes[0, 0], -(-clients // NAMED)
    half, edge = (0.43, {"edgecolors": "white", "linewidths": 0.4}) if step == 1 else (0.5, {"antialiaseds": False})  # bars that touch would show seams
    held = [(m, c, sum(row[:c]), sum(row[: c + 1])) for m, row in enumerate(rows) for c in range(classes) if row[c]]
    corners = [((m - half, low), (m - half, high), (m + half, high), (m + half, low)) for m, _, low, high in held]
    axis.add_collection(PolyCollection(corners, facecolors=[colours[c] for _, c, _, _ in held], **edge))  # one artist: a bar each would take minutes
    names = [[str(m)] + [manifest[key][m].replace(" ", "\n") for key in ("cameras", "modalities") if manifest[key] and step == 1] for m in range(0, clients, step)]
    axis.set_xticks(range(0, clients, step), ["\n".join(lines) for lines in names], fontsize="small")
    axis.set(xlabel="client", ylabel="training images", xlim=(-0.6, clients - 0.4), ylim=(0, 1.03 * max(manifest["sizes"])))
    if few:
        patches = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, class_names)]
        axis.legend(handles=patches[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="class")  # as the bars are stacked
    else:
        figure.colorbar(ScalarMappable(Normalize(0, classes - 1), "cividis"), ax=axis, label="class, by its number")
    alpha = "" if manifest["alpha"] is None else f", alpha {manifest['alpha']:g}"
    dropped = f", {sum(manifest['dropped'])} images belong to nobody" if manifest["dropped"] else ""
    axis.set_title(f"{manifest['scenario']}{alpha}, seed {manifest['seed']}: skew {manifest['skew']:.2f}, KL {manifest['kl']:.2f}{dropped}", loc="left", fontsize="medium")
    save_figure(figure, path)
