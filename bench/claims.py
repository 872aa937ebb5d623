"""A GPU's measurements against the targets, from the rows of one result file.

What was not measured says so, and so does what missed its target or was measured with an earlier
kernel.
"""

from collections import defaultdict
from collections.abc import Callable

from bench.harness import BOTH, FORWARD, OURS, as_graph
from bench.peers import COPY, EAGER, ON_THE_HOST
from bench.record import kernels_digest

WITH_DIAGNOSTICS = "ours, with diagnostics"
UNKNOWN = "not measured"
EARLIER = "earlier kernel"
CLIENTS, KEYS = 10, 200  # the largest shape that K1 is about
BARE, SIDE_BY_SIDE = "bare eager loop", "ours, 5 replicas"
REPLAYED = ("ours, 1 replicas", SIDE_BY_SIDE)
MOST_MS = {64: 1.0, 16: 0.45}  # width -> of a client-step


def claims(result: dict) -> list[str]:
    """Rows of a Markdown table: number, claim, target, measured, whether it was met."""
    rows = result.get("rows", [])
    table = [
        (
            "K1",
            f"InfoNCE, loss and d(queries), as a CUDA-graph node, fp32, up to {KEYS} anchors",
            "<= 15 us",
            *judged(node_times(rows), "{:.0f} us", lambda time: time <= 15),
        ),
        (
            "K1",
            "the same launched from Python, against eager, client by client",
            ">= 4x",
            *judged(ratios(rows, EAGER, OURS, BOTH), "{:.2f}x", lambda ratio: ratio >= 4),
        ),
        (
            "K2",
            "launches for loss and d(queries): kernel, sum of its tiles, scaling; a 16-bit cast",
            "<= 3; 16 bits 4",
            *launched(rows),
        ),
        (
            "K3",
            "captured in a CUDA graph, against eager in one",
            "captured",
            *judged(ratios(rows, as_graph(EAGER), as_graph(OURS), BOTH), "{:.2f}x"),
        ),
        ("K8", "bitwise the same result twice", "always", *repeatable(rows)),
        (
            "A1",
            "average: share of the copy's bandwidth",
            ">= 85 %",
            *bandwidth(rows, "weighted_average", OURS),
        ),
        (
            "A1",
            "average with non-finite counts and update norms: the same",
            ">= 85 %",
            *bandwidth(rows, "weighted_average", WITH_DIAGNOSTICS),
        ),
        ("A3", "average against Flower's arithmetic on the host", ">= 5x", *against_flower(rows)),
        (
            "N1",
            "GroupNorm and SiLU, as a CUDA-graph node: share of the copy's bandwidth, two reads "
            "and one write",
            ">= 70 %",
            *bandwidth(rows, "group_norm_silu", as_graph(OURS), 0.7),
        ),
    ]
    mark = f", {EARLIER}" if is_earlier(result) else ""
    lines = [f"| {' | '.join(line)}{mark if line[-1] else ''} |" for line in table]
    return lines + [f"| {' | '.join(line)} |" for line in claims_of_the_loop(result)]


def claims_of_the_loop(result: dict) -> list[tuple[str, ...]]:
    """As `claims`, of the stage `loop`."""
    rows, rounds = result.get("loop", []), [result["round"]] if "round" in result else []
    times = defaultdict(dict)
    for row in rows:
        times[row["contender"]][row["method"], row["width"]] = row["ms_per_client_step"]
    ours, bare = times[SIDE_BY_SIDE], times[BARE]
    gains = [time / ours[case] for case, time in bare.items()]
    shares = [ours[case] / MOST_MS[case[1]] for case in ours if case[0] in ("fedavg", "semanticfl")]
    equal = [row["equals_eager"] for row in rows if row["contender"] in REPLAYED]
    return [
        (
            "G1",
            "client-steps side by side, visits of 20 steps, against the bare eager loop",
            ">= 10x",
            *judged(gains, "{:.1f}x", lambda gain: gain >= 10),
        ),
        (
            "G1",
            "the same, FedAvg and SemanticFL: time over 1.0 ms (width 64) or 0.45 ms (width 16)",
            "<= 1x",
            *judged(shares, "{:.1f}x", lambda share: share <= 1),
        ),
        (
            "G1",
            "replayed and eager steps end in the same bits",
            "always",
            f"{sum(equal)} of {len(equal)} cases" if equal else UNKNOWN,
            met(equal),
        ),
        (
            "G3",
            "share of a round, visits of 20 steps, in which the device works",
            ">= 70 %",
            *judged([r["device_share"] for r in rounds], "{:.0%}", lambda share: share >= 0.7),
        ),
    ]


def is_earlier(result: dict) -> bool:
    """Whether the kernels have changed since they were measured."""
    return result.get("kernels") not in (None, kernels_digest())


def node_times(rows: list[dict]) -> list[float]:
    """Microseconds of the replayed call, for no more clients than the device works on at once."""
    found = []
    for row in measured(rows, as_graph(OURS), BOTH):
        shape = row["shape"]
        if row["dtype"] == "fp32" and shape["G"] <= CLIENTS and shape["N"] <= KEYS:
            found.append(1e3 * row["median_ms"])
    return found


def launched(rows: list[dict]) -> tuple[str, str]:
    """Every different set of launches that was seen."""
    seen, reached = set(), []
    for row in measured(rows, OURS, BOTH):
        if row.get("launches"):
            seen.add(", ".join(f"{name} x{count}" for name, count in row["launches"].items()))
            allowed = 3 if row["dtype"] == "fp32" else 4
            reached.append(sum(row["launches"].values()) <= allowed)
    return "; ".join(sorted(seen)) or UNKNOWN, met(reached)


def repeatable(rows: list[dict]) -> tuple[str, str]:
    found = [row["repeatable"] for row in rows if "median_ms" in row and "repeatable" in row]
    return f"{sum(found)} of {len(found)} cases" if found else UNKNOWN, met(found)


def bandwidth(
    rows: list[dict], kernel: str, contender: str, least: float = 0.85
) -> tuple[str, str]:
    """A contender's bytes per second over those of the copy in each case of a kernel."""
    rows = [row for row in rows if row["kernel"] == kernel]
    rates = [
        (ours["bytes"] / ours["median_ms"]) / (copy["bytes"] / copy["median_ms"])
        for copy, ours in pairs(rows, COPY, contender, FORWARD)
    ]
    return judged(rates, "{:.0%}", lambda rate: rate >= least)


def against_flower(rows: list[dict]) -> tuple[str, str]:
    """Flower's own aggregation where it was installed, else its arithmetic; the cell says which."""
    for name in sorted(
        {row["contender"] for row in rows if row["contender"].endswith(ON_THE_HOST)}
    ):
        found, verdict = judged(
            ratios(rows, name, OURS, FORWARD), "{:.2f}x", lambda ratio: ratio >= 5
        )
        return f"{found} ({name})", verdict
    return UNKNOWN, ""


def ratios(rows: list[dict], slow: str, fast: str, direction: str) -> list[float]:
    """Time of one contender over that of another, in each case that has both."""
    both = pairs(rows, slow, fast, direction)
    return [a["median_ms"] / b["median_ms"] for a, b in both]


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


def judged(
    values: list[float], form: str, reached: Callable[[float], bool] = bool
) -> tuple[str, str]:
    """The smallest and the largest of some values, or the one that they share; whether all reached
    the target."""
    if not values:
        return UNKNOWN, ""
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} ... {most}", met(list(map(reached, values)))


def met(reached: list[bool]) -> str:
    """Whether every case reached its target; nothing where none was measured."""
    if all(reached):
        return "yes" if reached else ""
    return f"missed in {reached.count(False)} of {len(reached)}"
