"""The tables of docs/results.md and README.md, from the files in results/digit-scenes.

    python scripts/results_tables.py

Rewrites what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in both pages; NAME is a
function of TABLES. Every number in these tables comes from a compare.json (or probe.json).
"""

import json
import re
from pathlib import Path
from statistics import fmean

from gain_by_teacher import points

from semanticfl_ref.formatting import format_bytes
from semanticfl_ref.tools.compare.grid import method_settings, short_name
from semanticfl_ref.tools.compare.statistics import POOLED
from semanticfl_ref.tools.compare.tables import mean_and_deviation

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
RESULTS = ROOT / "results" / "digit-scenes"
SHORT = {
    "fedavg": "FedAvg",
    "semanticfl": "SemanticFL",
    "shuffled": "SemanticFL, anchors of shuffled images",
    "one-hot": "SemanticFL, one-hot anchors: the class alone",
}


def compared(folder: str) -> list[dict]:
    """The results of a comparison, each with its short name."""
    results = json.loads((RESULTS / folder / "compare.json").read_text())["results"]
    for result in results:
        result["name"] = short_name(result["method"])
    return results


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def gain(result: dict) -> list[str]:
    """The difference to the baseline in points, its 95 % interval, p after Holm's adjustment."""
    found = result["gain"]
    if found is None:
        return ["", "", ""]
    p = found["p_adjusted"]
    interval = f"{found['low']:+.1f} to {found['high']:+.1f}"
    return [f"{found['mean']:+.1f}", interval, "< 0.001" if p < 0.001 else f"{p:.2g}"]


def gain_head(results: list[dict]) -> list[str]:
    """The head above what `gain` returns; the baseline is the one without a difference."""
    reference = next(r["name"] for r in results if r["gain"] is None)
    return [f"minus `{reference}`", "95 % interval", "p, Holm"]


def search() -> str:
    """What was chosen for each method, and the mean over seeds on the validation images."""
    found = json.loads((RESULTS / "search" / "search.json").read_text())
    rows = []
    for method, chosen in found["chosen"].items():
        means = {entry: fmean(values) for entry, values in found["accuracy"][method].items()}
        own = ", ".join(
            f"`{setting.partition('.')[2]}={value}`"
            for setting, value in method_settings(chosen).items()
            if setting != "federation.method"
        )
        tried = f"{min(means.values()):.1f} to {max(means.values()):.1f}"
        rows.append([method, own, f"{means[chosen]:.1f}", tried])
    return markdown(["method", "chosen", "validation accuracy", "of its four"], rows)


def main() -> str:
    """Means of the last five in each scenario; over all of them, the rest."""
    results = compared("main")
    pooled = [r for r in results if r["scenario"] == POOLED]
    scenarios = [s for s in dict.fromkeys(r["scenario"] for r in results) if s != POOLED]
    means = {(r["scenario"], r["name"]): mean_and_deviation(r["mean_of_last"]) for r in results}
    rows = [
        [
            r["name"],
            *(means[scenario, r["name"]] for scenario in scenarios),
            *gain(r),
            mean_and_deviation(r["worst_client"]),
            format_bytes(r["bytes_sent"]),
        ]
        for r in pooled
    ]
    head = ["method", *scenarios, *gain_head(pooled), "worst client", "communication"]
    return markdown(head, rows)


def accuracies(result: dict) -> list[str]:
    """Of the last round, and the mean of the last five."""
    return [mean_and_deviation(result[name]) for name in ("last", "mean_of_last")]


def one_scenario(folder: str) -> str:
    results = compared(folder)
    rows = [[r["name"], *accuracies(r), *gain(r)] for r in results]
    head = ["condition", "last round", "mean of the last five", *gain_head(results)]
    return markdown(head, rows)


def short() -> str:
    """Of the controls: the accuracies of a few."""
    results = compared("controls")
    rows = [[SHORT[r["name"]], *accuracies(r)] for r in results if r["name"] in SHORT]
    return markdown(["condition", "last round", "mean of the last five"], rows)


def two_methods(first: str, pairs: dict[int, list[dict]]) -> str:
    """FedAvg and SemanticFL side by side, and their difference.

    Args:
        first: head of the first column.
        pairs: its values -> the results of FedAvg and of SemanticFL.
    """
    rows = [
        [str(value), *(mean_and_deviation(r["mean_of_last"]) for r in pair), *gain(pair[1])]
        for value, pair in pairs.items()
    ]
    head = [first, "FedAvg", "SemanticFL", "difference", "95 % interval", "p"]
    return markdown(head, rows)


def longer() -> str:
    results = compared("longer")
    rounds = sorted({r["rounds"] for r in results})
    return two_methods("rounds", {n: [r for r in results if r["rounds"] == n] for n in rounds})


def labels() -> str:
    counts = sorted(int(f.name.removeprefix("labels-")) for f in RESULTS.glob("labels-*"))
    return two_methods("images", {n: compared(f"labels-{n}") for n in counts})


def teachers() -> str:
    results = compared("teachers")
    probe = json.loads((RESULTS / "teachers" / "probe.json").read_text())
    by_name = {result["name"]: result for result in results}
    rows = []
    for point in points({"results": results}, probe):
        result = by_name[f"t{point['timestep']}"]
        means = mean_and_deviation(result["mean_of_last"])
        rows.append([str(point["timestep"]), f"{point['probe']:.1f}", means, *gain(result)[:2]])
    head = ["t", "linear probe, %", "mean of the last five", "minus FedAvg", "95 % interval"]
    return markdown(head, rows)


TABLES = {
    "search": search,
    "main": main,
    "short": short,
    "controls": lambda: one_scenario("controls"),
    "held-out": lambda: one_scenario("held-out"),
    "longer": longer,
    "labels": labels,
    "teachers": teachers,
    "unmatched": lambda: one_scenario("unmatched"),
}


def renewed(page: str) -> str:
    """The page with its tables made anew."""

    def fill(match: re.Match) -> str:
        begin, name, end = match.groups()
        return f"{begin}\n{TABLES[name]()}\n{end}"

    return re.sub(r"(<!-- ([\w-]+) -->)\n.*?(<!-- end of \2 -->)", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(renewed(path.read_text()))
