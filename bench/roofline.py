"""The roofline: what a device's copy and matrix rates allow, and how near the kernels come to it.

A call that moves b bytes and does f floating-point operations takes at least max(b / copy rate, f /
matrix rate) seconds, at the rates measured in the same run."""

from pathlib import Path

SLOPE, MATRICES = "copy", ("bf16", "fp16", "tf32", "fp32")


def share_of_roofline(row: dict, ceilings: dict) -> float | None:
    """The least time over the time taken; None where the device's rates are not known, or the call
    ran elsewhere.
    """
    if row.get("ceiling") is None or SLOPE not in ceilings:
        return None
    least_ms = row["bytes"] / ceilings[SLOPE]["gb_s"] / 1e6
    if row["ceiling"] in MATRICES:
        if row["ceiling"] not in ceilings:
            return None
        least_ms = max(least_ms, row["flop"] / ceilings[row["ceiling"]]["tflop_s"] / 1e9)
    return least_ms / row["median_ms"]


def points(result: dict) -> list[tuple[float, float, dict]]:
    """(floating-point operations per byte, TFLOP/s, row) of what can be drawn: measured on the
    device, and doing arithmetic at all.
    """
    rows = [
        row
        for row in result.get("rows", [])
        if "median_ms" in row and row["ceiling"] and row["bytes"] and row["flop"]
    ]
    return [(row["flop"] / row["bytes"], row["flop"] / row["median_ms"] / 1e9, row) for row in rows]


def draw(result: dict, path: Path) -> str:
    """Write the figure of a device, and say what was done; matplotlib is an extra."""
    ceilings, marks = result.get("ceilings", {}), points(result)
    if SLOPE not in ceilings or not marks:
        return f"{result['device']}: no figure, its rates or its measurements are missing"
    try:
        import matplotlib
    except ImportError:
        return "no figure: matplotlib is missing (pip install -e '.[plots]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    slope = ceilings[SLOPE]["gb_s"] / 1e3  # TFLOP/s for each operation per byte
    least, most = 0.5 * min(x for x, _, _ in marks), 2 * max(x for x, _, _ in marks)
    for name in MATRICES:
        if name in ceilings:
            roof = ceilings[name]["tflop_s"]
            knee = roof / slope
            axes.plot(
                [least, knee, max(most, 2 * knee)],
                [slope * least, roof, roof],
                color="grey",
                linewidth=1,
            )
            axes.annotate(
                f"{name} products, {roof:.0f}",
                (max(most, 2 * knee), roof),
                fontsize=7,
                ha="right",
                va="bottom",
                color="grey",
            )
    for kernel, marker in (("info_nce", "o"), ("weighted_average", "s")):
        for ours, colour in ((False, "tab:orange"), (True, "tab:blue")):
            some = [
                (x, y)
                for x, y, row in marks
                if row["kernel"] == kernel and row["contender"].startswith("ours") == ours
            ]
            if some:
                axes.scatter(
                    *zip(*some, strict=True),
                    marker=marker,
                    s=22,
                    alpha=0.7,
                    color=colour,
                    label=f"{kernel}, {'ours' if ours else 'peers'}",
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="floating-point operations per byte that must be moved",
        ylabel="TFLOP/s",
    )
    axes.set_title(f"{result['device']}: copy {ceilings[SLOPE]['gb_s']:.0f} GB/s")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return f"{path}: written"
