"""A GPU's measurements against the targets: one line each, from the rows of one result file. What
was not measured says so.
"""

from collections.abc import Callable

OURS, ONE_BY_ONE, LARGE = "ours", "eager, client by client", "65536 x 65536"
BOTH, FORWARD = "forward and backward", "forward"
UNKNOWN = "not measured"


def claims(result: dict) -> list[str]:
    """Rows of a Markdown table: id, claim, target, measured."""
    table = [
        (
            "K1",
            "training shape, forward + backward, against eager client by client",
            ">= 4x",
            training_speed,
        ),
        (
            "K2",
            "launches of loss and d(queries), keys frozen",
            "one, and one that scales by the upstream gradient",
            training_launches,
        ),
        (
            "K3",
            "captured in a CUDA graph, and then against eager client by client captured too",
            "yes",
            training_graph,
        ),
        (
            "K4",
            "64k x 64k, D 512, bf16, forward, of the matrix library's rate",
            ">= 55 %",
            large_rate,
        ),
        (
            "K5",
            "the same, forward + backward, against Inf-CL",
            ">= 3x",
            lambda result: large_speed(result, "Inf-CL"),
        ),
        (
            "K5",
            "the same, against a chunked, checkpointed torch loss",
            ">= 1.3x",
            lambda result: large_speed(result, "torch, chunked and checkpointed"),
        ),
        (
            "K6",
            "extra memory of the same, beyond the loss and the gradients",
            "<= 256 MiB",
            large_memory,
        ),
        ("K8", "the same result twice, bit for bit", "always", repeatable),
        ("A1", "average, of the copy's bandwidth in the same case", ">= 85 %", average_bandwidth),
        ("A3", "average against Flower's arithmetic on the host", ">= 5x", average_speed),
    ]
    return [
        f"| {name} | {claim} | {target} | {measured(result)} |"
        for name, claim, target, measured in table
    ]


def training_speed(result: dict) -> str:
    return ratios(
        result, lambda row: "clients" in row["case"] and row["direction"] == BOTH, ONE_BY_ONE, OURS
    )


def training_launches(result: dict) -> str:
    """Every different set of launches that was seen."""
    rows = chosen(result, OURS, lambda row: "clients" in row["case"] and row["direction"] == BOTH)
    seen = {
        ", ".join(f"{name} x{count}" for name, count in row["launches"].items())
        for row in rows
        if row.get("launches")
    }
    return "; ".join(sorted(seen)) or UNKNOWN


def training_graph(result: dict) -> str:
    return ratios(
        result,
        lambda row: "clients" in row["case"] and row["direction"] == BOTH,
        f"{ONE_BY_ONE}, as a CUDA graph",
        f"{OURS}, as a CUDA graph",
    )


def large_rate(result: dict) -> str:
    rows = chosen(
        result,
        OURS,
        lambda row: row["case"] == LARGE and row["dtype"] == "bf16" and row["direction"] == FORWARD,
    )
    ceiling = result.get("ceilings", {}).get("bf16")
    return (
        f"{rows[0]['flop'] / rows[0]['median_ms'] / 1e9 / ceiling['tflop_s']:.0%}"
        if rows and ceiling
        else UNKNOWN
    )


def large_speed(result: dict, peer: str) -> str:
    rows = [
        row
        for row in result.get("rows", [])
        if row["case"] == LARGE and row["contender"] == peer and row["direction"] == BOTH
    ]
    reason = next(
        (row.get("failed") or row.get("skipped") for row in rows if "median_ms" not in row), None
    )
    return (
        f"{UNKNOWN}: {peer} {reason}"
        if reason
        else ratios(
            result, lambda row: row["case"] == LARGE and row["direction"] == BOTH, peer, OURS
        )
    )


def large_memory(result: dict) -> str:
    rows = chosen(result, OURS, lambda row: row["case"] == LARGE and row["direction"] == BOTH)
    return f"{max(row['peak_bytes'] for row in rows) / 2**20:.0f} MiB" if rows else UNKNOWN


def repeatable(result: dict) -> str:
    found = [
        row["repeatable"]
        for row in result.get("rows", [])
        if "median_ms" in row and "repeatable" in row
    ]
    return f"{sum(found)} of {len(found)} cases" if found else UNKNOWN


def average_bandwidth(result: dict) -> str:
    both = pairs(
        result, lambda row: row["kernel"] == "weighted_average", "plain copy of the rows", OURS
    )
    shares = [
        copy["median_ms"] / copy["bytes"] * ours["bytes"] / ours["median_ms"] for copy, ours in both
    ]
    return span(shares, "{:.0%}") if shares else UNKNOWN


def average_speed(result: dict) -> str:
    names = {
        row["contender"]
        for row in result.get("rows", [])
        if row["contender"].endswith("on the host")
    }
    return (
        "; ".join(
            f"{ratios(result, lambda row: True, name, OURS)} ({name})" for name in sorted(names)
        )
        or UNKNOWN
    )


def ratios(result: dict, wanted: Callable[[dict], bool], slow: str, fast: str) -> str:
    """Time of one contender over that of another, in each case that has both: the least and the
    most.
    """
    found = [a["median_ms"] / b["median_ms"] for a, b in pairs(result, wanted, slow, fast)]
    return span(found, "{:.2f}x") if found else UNKNOWN


def pairs(
    result: dict, wanted: Callable[[dict], bool], first: str, second: str
) -> list[tuple[dict, dict]]:
    """Rows of two contenders in the same case, dtype and direction."""
    others = {key(row): row for row in chosen(result, second, wanted)}
    return [(row, others[key(row)]) for row in chosen(result, first, wanted) if key(row) in others]


def chosen(result: dict, contender: str, wanted: Callable[[dict], bool]) -> list[dict]:
    """Measured and correct rows of a contender: a wrong result has no speed."""
    return [
        row
        for row in result.get("rows", [])
        if row["contender"] == contender and "median_ms" in row and row["correct"] and wanted(row)
    ]


def key(row: dict) -> tuple:
    return row["kernel"], row["case"], row["dtype"], row["direction"]


def span(values, form: str) -> str:
    """The least and the most of some values, or the one that they share."""
    least, most = form.format(min(values)), form.format(max(values))
    return least if least == most else f"{least} ... {most}"
