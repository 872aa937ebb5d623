"""A run's summary, from its metrics.jsonl: accuracies, communication cost, gradients, warnings.

Letters: M clients in all.
"""

from itertools import accumulate
from statistics import fmean, median, pstdev

LAST = 5  # rounds whose mean accuracy is reported
NEGLIGIBLE = 0.01  # share of the gradient norm below which a term gets a warning
DOMINANT = 100  # times the median norm of updates, from which on an update gets a warning
TARGETS = tuple(tenths / 10 for tenths in range(1, 10))  # accuracies whose cost is reported
# Entries of a round, by what the summary makes of them.
DISTRIBUTIONS = ("client_accuracy", "own_accuracy")
TOTALS = ("steps", "bytes_down", "bytes_up")
GRADIENTS = ("gradient_share", "gradient_norm", "gradient_cosine")


def summarise(rounds: list[dict], seconds: float, about: dict) -> dict:
    """The summary of a run.

    Args:
        rounds: lines of metrics.jsonl, rounds 1 to R in order, at least one evaluated.
        seconds: wall time of the rounds.
        about: further entries; a list under "warnings" is extended.

    Returns:
        `about` with accuracies in 0 ... 1, total bytes, gradients and drift as means over rounds,
        and warnings. Accuracies are those of the last round, the mean of the last five, and that of
        the round that was best on the validation images (None without); never of the round that was
        best on the test images.
    """
    tested = evaluated(rounds)
    last, best = tested[-1], best_round(rounds)
    accuracies = last["client_accuracy"]
    worst = min(accuracies)
    gradients = {name: mean_by_name([line[name] for line in rounds]) for name in GRADIENTS}
    drifts = (line["drift"] for line in rounds)
    drift = [{**drift, "update_norm": mean(drift["update_norm"])} for drift in drifts]
    return {
        **about,
        "rounds": rounds[-1]["round"],
        **{name: last.get(name) for name in ("test_accuracy", "test_loss", "macro_f1")},
        "test_accuracy_last_five": fmean(line["test_accuracy"] for line in tested[-LAST:]),
        "validation_accuracy": last["validation_accuracy"],
        "best_validation_round": best and best["round"],
        "test_accuracy_at_best_validation": best and best["test_accuracy"],
        "class_accuracy": last["class_accuracy"],
        **{name: distribution(last[name]) for name in DISTRIBUTIONS if name in last},
        "worst_client": accuracies.index(worst),
        "worst_client_accuracy": worst,
        "cost_to_accuracy": cost_to_accuracy(tested),
        "loss": rounds[-1]["loss"],
        "seconds": round(seconds, 3),
        **{name: sum(line[name] for line in rounds) for name in TOTALS},
        "bytes": {
            way: {kind: sum(line["bytes"][way][kind] for line in rounds) for kind in kinds}
            for way, kinds in last["bytes"].items()
        },
        **gradients,
        "drift": mean_by_name(drift),
        "warnings": [
            *about.get("warnings", []),
            *negligible_terms(gradients["gradient_share"]),
            *dominant_update(rounds),
        ],
    }


def evaluated(rounds: list[dict]) -> list[dict]:
    """The rounds with an evaluation; each has the totals of those since the one before it."""
    kept, totals = [], dict.fromkeys(TOTALS, 0)
    for line in rounds:
        totals = {name: total + line[name] for name, total in totals.items()}
        if line["test_accuracy"] is not None:
            kept.append({**line, **totals})
            totals = dict.fromkeys(TOTALS, 0)
    return kept


def best_round(rounds: list[dict]) -> dict | None:
    """The first round with the highest validation accuracy; None without."""
    validated = [line for line in rounds if line["validation_accuracy"] is not None]
    return max(validated, key=lambda line: line["validation_accuracy"], default=None)


def out_of_patience(rounds: list[dict], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than one before them; 0: never."""
    best = best_round(rounds)
    if not patience or best is None:
        return False
    return len(evaluated(rounds[best["round"] :])) >= patience


def distribution(accuracies: list[float | None]) -> dict[str, float]:
    """Mean, mean of the worst tenth (ceil(M / 10) clients), and standard deviation over clients.

    Args:
        accuracies: M values, None for a client without.
    """
    known = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    worst_tenth = known[: -(-len(known) // 10)]
    return {"mean": fmean(known), "worst_tenth": fmean(worst_tenth), "std": pstdev(known)}


def cost_to_accuracy(rounds: list[dict]) -> list[dict]:
    """For every target the first round that reached it, and the bytes sent by then, both ways.

    None where no round did.
    """
    sent = accumulate(line["bytes_down"] + line["bytes_up"] for line in rounds)
    costs = [{"accuracy": target, "round": None, "bytes": None} for target in TARGETS]
    for line, total in zip(rounds, sent, strict=True):
        for cost in costs:
            if cost["round"] is None and line["test_accuracy"] >= cost["accuracy"]:
                cost.update(round=line["round"], bytes=total)
    return costs


def mean_by_name(values: list[dict]) -> dict[str, float | None]:
    """Each name's mean over the rounds that have it."""
    return {name: mean([value.get(name) for value in values]) for name in names_in(values)}


def names_in(values: list[dict]) -> list[str]:
    """Every name that some round has: with mixed modalities, not every round has every term."""
    return list(dict.fromkeys(name for value in values for name in value))


def mean(values: list[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def negligible_terms(shares: dict[str, float | None]) -> list[str]:
    """A warning for every term that hardly moved the features."""
    return [
        f"the term {name!r} contributes {share:.2%} of the gradient norm; negligible: raise its "
        f"weight or lower its temperature"
        for name, share in shares.items()
        if share is not None and share < NEGLIGIBLE
    ]


def dominant_update(rounds: list[dict]) -> list[str]:
    """A warning for the first update far larger than those until then: it may ruin later ones."""
    norms = []
    for line in rounds:
        found = zip(line["drift"]["update_norm"], line["clients"], strict=True)
        own = [(norm, client) for norm, client in found if norm is not None]
        norms += [norm for norm, _ in own]
        largest, client = max(own, default=(0.0, 0))
        usual = median(norms) if norms else 0.0
        if largest > DOMINANT * usual:
            return [
                f"round {line['round']}, client {client}: the norm of the update is {largest:.2g}, "
                f"that of a usual one {usual:.2g}; what bounds a client's effect, if not in use: "
                f"federation.aggregation=multi-krum, server.clip_norm"
            ]
    return []
