"""A run's numbers, from its metrics.jsonl alone: what it reached, what it sent, which of its terms did nothing."""

from statistics import fmean

INERT = 0.01  # a term below this share of the gradient's norm, averaged over the run, is reported


def summarise(rows: list[dict], seconds: float, about: dict) -> dict:
    """The summary of a run.

    Args:
        rows: lines of metrics.jsonl, rounds 1 to R in order, R >= 1.
        seconds: wall time of the rounds.
        about: what the summary says of the run besides (names, folder, provenance); a list under "warnings" is added to.

    Returns:
        `about` with accuracies in 0 ... 1, bytes in all, the terms' mean shares of the gradient and the warnings. The accuracy is the
        last round's and the mean of the last five; the best round is not told, as it would be chosen on the test part.
    """
    last = rows[-1]
    accuracies = last["client_accuracy"]
    worst = min(range(len(accuracies)), key=accuracies.__getitem__)
    shares = gradient_shares(rows)
    return {
        **about,
        "rounds": last["round"],
        "test_accuracy": last["test_accuracy"],
        "test_accuracy_last_five": fmean(row["test_accuracy"] for row in rows[-5:]),
        "validation_accuracy": last["validation_accuracy"],
        "worst_client": worst,
        "worst_client_accuracy": accuracies[worst],
        "loss": last["loss"],
        "seconds": round(seconds, 3),
        "steps": sum(row["steps"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "gradient_share": shares,
        "warnings": [*about.get("warnings", []), *inert_terms(shares)],
    }


def gradient_shares(rows: list[dict]) -> dict[str, float]:
    """Each term's share of the gradient's norm at the features, averaged over the rounds."""
    names = rows[-1]["gradient_share"]
    return {name: fmean(row["gradient_share"].get(name, 0.0) for row in rows) for name in names}


def inert_terms(shares: dict[str, float]) -> list[str]:
    """A warning for every term that hardly moved the features."""
    return [
        f"the term {name!r} made {share:.2%} of the gradient on average: it is next to inert; raise its weight or lower its temperature"
        for name, share in shares.items()
        if share < INERT
    ]
