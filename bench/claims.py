"""A GPU's measurements against the targets, from the rows of one result file.

What was not measured says so.
"""

from bench.harness import BOTH, FORWARD, OURS, as_graph
from bench.peers import COPY, EAGER, ON_THE_HOST

WITH_DIAGNOSTICS = "ours, with diagnostics"
UNKNOWN = "not measured"
CLIENTS, KEYS = 10, 200  # the largest shape that K1 is about


def claims(result: dict) -> list[str]:
    """Rows of a Markdown table: target, claim, number to reach, measured."""
    rows = result.get("rows", [])
    table = [
        (
            "K1",
            f"InfoNCE, loss and d(queries), as a CUDA-graph node, fp32, up to {KEYS} anchors",
            "<= 15 us",
            node_time(rows),
        ),
        (
            "K1",
            "the same launched from Python, against eager, client by client",
            ">= 4x",
            ratios(rows, EAGER, OURS, BOTH),
        ),
        ("K2", "launches for loss and d(queries)", "1, and 1 for the scaling", launched(rows)),
        (
            "K3",
            "captured in a CUDA graph, against eager in one",
            "captured",
            ratios(rows, as_graph(EAGER), as_graph(OURS), BOTH),
        ),
        ("K8", "bitwise the same result twice", "always", repeatable(rows)),
        ("A1", "average: share of the copy's bandwidth", ">= 85 %", bandwidth(rows, OURS)),
        (
            "A1",
            "average with non-finite counts and update norms: the same",
            ">= 85 %",
            bandwidth(rows, WITH_DIAGNOSTICS),
        ),
        ("A3", "average against Flower's arithmetic on the host", ">= 5x", against_flower(rows)),
    ]
    return [f"| {' | '.join(line)} |" for line in table]


def node_time(rows: list[dict]) -> str:
    """Microseconds of the replayed call, for no more clients than the device works on at once."""
    found = []
    for row in measured(rows, as_graph(OURS), BOTH):
        shape = row["shape"]
        if row["dtype"] == "fp32" and shape["G"] <= CLIENTS and shape["N"] <= KEYS:
            found.append(1e3 * row["median_ms"])
    return span(found, "{:.0f} us")


def launched(rows: list[dict]) -> str:
    """Every different set of launches that was seen."""
    seen = set()
    for row in measured(rows, OURS, BOTH):
        if row.get("launches"):
            seen.add(", ".join(f"{name} x{count}" for name, count in row["launches"].items()))
    return "; ".join(sorted(seen)) or UNKNOWN


def repeatable(rows: list[dict]) -> str:
    found = [row["repeatable"] for row in rows if "median_ms" in row and "repeatable" in row]
    return f"{sum(found)} of {len(found)} cases" if found else UNKNOWN


def bandwidth(rows: list[dict], contender: str) -> str:
    """A contender's bytes per second over those of the copy in the same case."""
    rates = [
        (ours["bytes"] / ours["median_ms"]) / (copy["bytes"] / copy["median_ms"])
        for copy, ours in pairs(rows, COPY, contender, FORWARD)
    ]
    return span(rates, "{:.0%}")


def against_flower(rows: list[dict]) -> str:
    names = sorted({row["contender"] for row in rows if row["contender"].endswith(ON_THE_HOST)})
    return "; ".join(f"{ratios(rows, name, OURS, FORWARD)} ({name})" for name in names) or UNKNOWN


def ratios(rows: list[dict], slow: str, fast: str, direction: str) -> str:
    """Time of one contender over that of another, in each case that has both."""
    both = pairs(rows, slow, fast, direction)
    return span([a["median_ms"] / b["median_ms"] for a, b in both], "{:.2f}x")


def pairs(rows: list[dict], first: str, second: str, direction: str) -> list[tuple[dict, dict]]:
    """Rows of two contenders in the same case and dtype."""

    def place(row: dict) -> tuple:
        return row["kernel"], row["case"], row["dtype"]

    others = {place(row): row for row in measured(rows, second, direction)}
    firsts = measured(rows, first, direction)
    return [(row, others[place(row)]) for row in firsts if place(row) in others]


def measured(rows: list[dict], contender: str, direction: str) -> list[dict]:
    """A contender's measured and correct rows: a wrong result has no speed."""
    return [
        row
        for row in rows
        if row["contender"] == contender
        and row["direction"] == direction
        and "median_ms" in row
        and row["correct"]
    ]


def span(values: list[float], form: str) -> str:
    """The smallest and the largest of some values, or the one that they share."""
    if not values:
        return UNKNOWN
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} ... {most}"
