"""A run's numbers, from its metrics.jsonl alone: what it reached, for whom, what it sent, which of
its terms did nothing.

Letters: M clients in all.
"""

from itertools import accumulate
from statistics import fmean, pstdev

INERT = 0.01  # a term below this share of the gradient's norm, averaged over the run, is reported
MARKS = tuple(tenths / 10 for tenths in range(1, 10))  # accuracies whose price is told


def summarise(rows: list[dict], seconds: float, about: dict) -> dict:
    """The summary of a run.

    Args:
        rows: lines of metrics.jsonl, rounds 1 to R in order, R >= 1.
        seconds: wall time of the rounds.
        about: what the summary says of the run besides (names, folder, provenance); a list under
            "warnings" is added to.

    Returns:
        `about` with accuracies in 0 ... 1, bytes in all, the terms' gradients and the clients'
        drift as means over rounds, and the warnings. The accuracy is the last round's and the mean
        of the last five, and that of the round which was best on the validation part, None without
        one; never the round that was best on the test part.
    """
    last = rows[-1]
    accuracies = last["client_accuracy"]
    worst = min(range(len(accuracies)), key=accuracies.__getitem__)
    validated = [row for row in rows if row["validation_accuracy"] is not None]
    best = max(
        validated, key=lambda row: row["validation_accuracy"], default=None
    )  # the first of equal ones
    shares = over_rounds(row["gradient_share"] for row in rows)
    return {
        **about,
        "rounds": last["round"],
        "test_accuracy": last["test_accuracy"],
        "test_accuracy_last_five": fmean(row["test_accuracy"] for row in rows[-5:]),
        "validation_accuracy": last["validation_accuracy"],
        "best_validation_round": best and best["round"],
        "test_accuracy_at_best_validation": best and best["test_accuracy"],
        "class_accuracy": last["class_accuracy"],
        "client_accuracy": spread(accuracies),
        **({"own_accuracy": spread(last["own_accuracy"])} if "own_accuracy" in last else {}),
        "worst_client": worst,
        "worst_client_accuracy": accuracies[worst],
        "to_accuracy": prices(rows),
        "loss": last["loss"],
        "seconds": round(seconds, 3),
        "steps": sum(row["steps"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes": {
            way: {kind: sum(row["bytes"][way][kind] for row in rows) for kind in kinds}
            for way, kinds in last["bytes"].items()
        },
        "gradient_share": shares,
        "gradient_norm": over_rounds(row["gradient_norm"] for row in rows),
        "gradient_cosine": over_rounds(row["gradient_cosine"] for row in rows),
        "drift": over_rounds(
            {**row["drift"], "update_norm": mean(row["drift"]["update_norm"])} for row in rows
        ),
        "warnings": [*about.get("warnings", []), *inert_terms(shares)],
    }


def spread(accuracies: list[float | None]) -> dict:
    """Of clients' accuracies [M], None for a client without: their mean, the mean of the worst
    tenth (ceil(M / 10) clients), their standard deviation (of all M).
    """
    known = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    return {
        "mean": fmean(known),
        "worst_tenth": fmean(known[: -(-len(known) // 10)]),
        "std": pstdev(known),
    }


def prices(rows: list[dict]) -> list[dict]:
    """For every mark the first round whose test accuracy reached it, and the bytes that were sent
    both ways by then; None where none did.
    """
    sent = accumulate(row["bytes_down"] + row["bytes_up"] for row in rows)
    reached = [
        (row["test_accuracy"], {"round": row["round"], "bytes": total})
        for row, total in zip(rows, sent, strict=True)
    ]
    never = {"round": None, "bytes": None}
    return [
        {
            "accuracy": mark,
            **next((price for accuracy, price in reached if accuracy >= mark), never),
        }
        for mark in MARKS
    ]


def over_rounds(values) -> dict[str, float | None]:
    """Each name's mean over the rounds that know it."""
    values = list(values)
    return {name: mean([value.get(name) for value in values]) for name in recorded_names(values)}


def recorded_names(values: list[dict]) -> list[str]:
    """Every name that a round has: where clients get different anchors, not every round has every
    term.
    """
    return list(dict.fromkeys(name for value in values for name in value))


def mean(values: list[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def inert_terms(shares: dict[str, float | None]) -> list[str]:
    """A warning for every term that hardly moved the features."""
    return [
        f"the term {name!r} made {share:.2%} of the gradient on average: it is next to inert; raise its weight or lower its temperature"
        for name, share in shares.items()
        if share is not None and share < INERT
    ]
