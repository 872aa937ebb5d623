"""A figure: the gain of guidance against what a linear probe reads from the teacher.

    python scripts/gain_by_teacher.py runs/evidence/teachers

The folder is that of bench/gpu_evidence.sh's stage "teachers": compare.json has FedAvg and
SemanticFL with anchors of several timesteps, called t20 and so on; probe.json has the probe's
accuracy on each. Draws gain-by-teacher.png there.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from semanticfl_ref.tools.compare.grid import short_name
from semanticfl_ref.tools.report.drawing import new_figure, save_figure


def points(comparison: dict, probe: dict) -> list[dict]:
    """Per timestep the probe's accuracy and the gain over FedAvg of every seed, in points."""
    accuracy = {f"t{row['timestep']}": 100 * row["linear_probe"] for row in probe["rows"]}
    return [
        {"timestep": int(name[1:]), "probe": accuracy[name], "gains": result["gain"]["values"]}
        for result in comparison["results"]
        if (name := short_name(result["method"])) in accuracy
    ]


def main(folder: Path) -> None:
    comparison, probe = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("compare", "probe")
    )
    rows = points(comparison, probe)
    figure, (axis,) = new_figure(1, width=5, height=3.6)
    for row in rows:
        axis.plot([row["probe"]] * len(row["gains"]), row["gains"], "o", color="0.6", ms=4)
        place = row["probe"], fmean(row["gains"])
        axis.annotate(
            f"t = {row['timestep']}",
            place,
            textcoords="offset points",
            xytext=(-7, 4),
            ha="right",
            fontsize=8,
        )
    axis.plot([r["probe"] for r in rows], [fmean(r["gains"]) for r in rows], "s-", color="C0")
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xlim(-8, 100)
    axis.set(xlabel="linear probe on the teacher's features, %", ylabel="gain over FedAvg, points")
    save_figure(figure, folder / "gain-by-teacher.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
