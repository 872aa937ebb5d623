"""The tables of docs/results.md and README.md, from the files in results/digit-scenes.

    python scripts/results_tables.py

Rewrites what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in both pages; NAME is a
function of TABLES. Every number in these tables comes from a compare.json (or probe.json).
"""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
RESULTS = ROOT / "results" / "digit-scenes"
ALL = "all scenarios"
SHORT = {
    "fedavg": "FedAvg",
    "semanticfl": "SemanticFL",
    "shuffled": "SemanticFL, anchors of shuffled images",
}
COUNTS = (100, 225, 450, 900)


def compared(folder: str) -> list[dict]:
    """The results of a comparison, each with its short name."""
    results = json.loads((RESULTS / folder / "compare.json").read_text())["results"]
    for result in results:
        result["name"] = re.split(r"[=\[]", result["method"])[0]
    return results


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: list[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def gain(result: dict) -> list[str]:
    """The difference to the baseline in points, its 95 % interval, p after Holm's adjustment."""
    found = result["gain"]
    if found is None:
        return ["", "", ""]
    p = found["p_adjusted"]
    interval = f"{found['low']:+.1f} to {found['high']:+.1f}"
    return [f"{found['mean']:+.1f}", interval, "< 0.001" if p < 0.001 else f"{p:.2g}"]


def search() -> str:
    """What was chosen for each method, and the mean over seeds on the validation images."""
    found = json.loads((RESULTS / "search" / "search.json").read_text())
    rows = []
    for method, chosen in found["chosen"].items():
        means = {entry: fmean(values) for entry, values in found["accuracy"][method].items()}
        settings = re.split(r"[\[;\]]", chosen)[1:-1]
        own = ", ".join(f"`{setting.split('.', 1)[1]}`" for setting in settings)
        tried = f"{min(means.values()):.1f} to {max(means.values()):.1f}"
        rows.append([method, own, f"{means[chosen]:.1f}", tried])
    return markdown(["method", "chosen", "validation accuracy", "of its four"], rows)


def nine_methods() -> str:
    results = compared("main")
    scenarios = [s for s in dict.fromkeys(r["scenario"] for r in results) if s != ALL]
    rows = []
    for overall in (r for r in results if r["scenario"] == ALL):
        own = {r["scenario"]: r for r in results if r["method"] == overall["method"]}
        means = [spread(own[s]["mean_of_last"]) for s in scenarios]
        cost = f"{overall['bytes_sent'] / 2**20:.0f} MiB"
        worst = f"{fmean(overall['worst_client']):.0f}"
        rows.append([overall["name"], *means, *gain(overall), worst, cost])
    head = [
        "method",
        *scenarios,
        "minus FedAvg",
        "95 % interval",
        "p, Holm",
        "worst client",
        "sent",
    ]
    return markdown(head, rows)


def one_scenario(folder: str) -> str:
    results = compared(folder)
    rows = [[r["name"], spread(r["last"]), spread(r["mean_of_last"]), *gain(r)] for r in results]
    reference = next(r["name"] for r in results if r["gain"] is None)
    head = ["condition", "last round", "mean of the last five", f"minus `{reference}`"]
    return markdown([*head, "95 % interval", "p, Holm"], rows)


def short() -> str:
    """Of the controls: the accuracies of a few."""
    head, line, *rows = (row.split(" | ")[:3] for row in one_scenario("controls").splitlines())
    shown = [[f"| {SHORT[row[0][2:]]}", *row[1:]] for row in rows if row[0][2:] in SHORT]
    return "\n".join(f"{' | '.join(row)} |" for row in [head, line, *shown])


def labels() -> str:
    rows = []
    for count in COUNTS:
        plain, guided = compared(f"labels-{count}")
        means = [spread(plain["mean_of_last"]), spread(guided["mean_of_last"])]
        rows.append([str(count), *means, *gain(guided)[:2]])
    return markdown(["images", "FedAvg", "SemanticFL", "difference", "95 % interval"], rows)


def teachers() -> str:
    probe = json.loads((RESULTS / "teachers" / "probe.json").read_text())["rows"]
    accuracy = {f"t{row['timestep']}": 100 * row["linear_probe"] for row in probe}
    rows = [
        [r["name"][1:], f"{accuracy[r['name']]:.1f}", spread(r["mean_of_last"]), *gain(r)[:2]]
        for r in compared("teachers")
        if r["name"] in accuracy
    ]
    head = ["t", "linear probe, %", "mean of the last five", "minus FedAvg", "95 % interval"]
    return markdown(head, rows)


TABLES = {
    "search": search,
    "main": nine_methods,
    "short": short,
    "controls": lambda: one_scenario("controls"),
    "held-out": lambda: one_scenario("held-out"),
    "unlabelled": lambda: one_scenario("unlabelled"),
    "labels": labels,
    "teachers": teachers,
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
