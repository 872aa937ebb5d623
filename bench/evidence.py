"""The evidence on the embedded default: SemanticFL, FedAvg, each term alone, each control.  `python
-m bench.evidence`

Every condition runs with the same seeds: the same split, clients, initial weights and batch order.
A finished run is reused, so an interrupted call goes on where it stopped. `--search` tries settings
instead, alike for both methods, judged on the validation part."""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

FEDAVG, WITHOUT_KD, WITHOUT_CON = (
    ["--method", "fedavg"],
    ["--set", "semantic.lambda_kd=0"],
    ["--set", "semantic.lambda_con=0"],
)
CONDITIONS = {
    "FedAvg": FEDAVG,
    "SemanticFL": [],
    "SemanticFL, images' anchors shuffled": ["--anchors", "shuffled"],
    "SemanticFL, classes permuted": ["--anchors", "permuted"],
    "SemanticFL, random anchors": ["--anchors", "random"],
    "SemanticFL, one-hot anchors": ["--anchors", "onehot"],
    "consistency alone": WITHOUT_CON,
    "contrast alone": WITHOUT_KD,
}
# Local epochs, learning rate and width alike for both methods; then SemanticFL's own two weights.
# Judged on the validation part.
POINTS = (
    (2, 0.1, 16),
    (5, 0.05, 16),
    (5, 0.1, 16),
    (5, 0.2, 16),
    (5, 0.4, 16),
    (5, 0.1, 32),
    (10, 0.1, 16),
    (10, 0.2, 16),
)
OWN = {"semantic.lambda_kd": (5, 50), "semantic.lambda_con": (0, 0.1, 1)}
SEARCH = {
    f"{name}, {epochs} epochs, rate {rate:g}, width {width}": [
        *flags,
        "--local-epochs",
        str(epochs),
        "--set",
        f"federation.learning_rate={rate:g}",
        "--set",
        f"model.width={width}",
    ]
    for epochs, rate, width in POINTS
    for name, flags in (("FedAvg", FEDAVG), ("SemanticFL", []))
} | {
    f"SemanticFL, {key} = {value:g}": ["--set", f"{key}={value:g}"]
    for key, values in OWN.items()
    for value in values
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--at", type=int, nargs="+", help="rounds to report at; the last one if left out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--search",
        action="store_true",
        help="settings instead of conditions, judged on the validation part",
    )
    parser.add_argument("--only", nargs="+", help="conditions by name; * stands for anything")
    options = parser.parse_args()
    conditions = SEARCH if options.search else CONDITIONS
    conditions = {
        name: flags
        for name, flags in conditions.items()
        if not options.only or any(fnmatch(name, pattern) for pattern in options.only)
    }
    part = "validation_accuracy" if options.search else "test_accuracy"
    jobs = [(seed, name) for seed in range(options.seeds) for name in conditions]
    with ThreadPoolExecutor(options.workers) as pool:
        lines = dict(
            zip(
                jobs,
                pool.map(lambda job: run(*job, conditions[job[1]], options), jobs),
                strict=True,
            )
        )
    for at in sorted({min(at, options.rounds) for at in options.at or [options.rounds]}):
        print(f"\n{part}, %, after {at} rounds, seeds 0 to {options.seeds - 1}\n")
        print(table(conditions, {job: rows[:at] for job, rows in lines.items()}, part))
    print(f"\n{part}, %, mean of every ten rounds and all seeds\n")
    print(curve(conditions, lines, part))


def table(conditions, lines: dict, part: str) -> str:
    """A row a condition: the last round, the mean of the last five, and the paired difference to
    FedAvg, over seeds.
    """
    rows = [
        "| condition | last round | mean of last five | minus FedAvg, paired |",
        "| --- | --- | --- | --- |",
    ]
    for name in conditions:
        seeds = [seed for seed, condition in lines if condition == name]
        last, five = (
            [100 * lines[seed, name][-1][part] for seed in seeds],
            [last_five(lines[seed, name], part) for seed in seeds],
        )
        gains = [
            a - last_five(lines[seed, "FedAvg"], part)
            for a, seed in zip(five, seeds, strict=True)
            if name != "FedAvg" and (seed, "FedAvg") in lines
        ]
        rows.append(
            f"| {name} | {spread(last)} | {spread(five)} | {spread(gains) if gains else ''} |"
        )
    return "\n".join(rows)


def curve(conditions, lines: dict, part: str) -> str:
    """A row a condition, a column for every ten rounds: where a method levels off."""
    rounds = min(len(rows) for rows in lines.values())
    tens = range(0, rounds - 9, 10)
    rows = [
        "| condition | " + " | ".join(f"{t + 1}-{t + 10}" for t in tens) + " |",
        "| --- |" + " --- |" * len(tens),
    ]
    for name in conditions:
        means = [
            statistics.mean(
                100 * row[part]
                for (_, n), run in lines.items()
                if n == name
                for row in run[t : t + 10]
            )
            for t in tens
        ]
        rows.append(f"| {name} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(rows)


def run(seed: int, name: str, flags: list[str], options) -> list[dict]:
    """The metrics of one run, which is trained unless it, or a longer one, is finished."""
    stem = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    longer = [
        f
        for f in sorted(options.out.glob(f"{stem}-[0-9]*-{seed}"))
        if (f / "summary.json").exists() and int(f.name.split("-")[-2]) >= options.rounds
    ]
    folder = longer[0] if longer else options.out / f"{stem}-{options.rounds}-{seed}"
    if not (folder / "summary.json").exists():
        place = (
            ["--resume", str(folder)]
            if folder.exists()
            else [
                "--out",
                str(folder),
                "--seed",
                str(seed),
                "--rounds",
                str(options.rounds),
                *flags,
                "--set",
                "run.threads=1",
            ]
        )
        done = subprocess.run(
            [sys.executable, "-m", "semanticfl_ref", "train", *place],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{name}, seed {seed}: {done.stderr.splitlines()[-1]}")
        print(f"# done: {name}, seed {seed}", file=sys.stderr, flush=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][
        : options.rounds
    ]  # a round does not know how many follow


def last_five(lines: list[dict], part: str) -> float:
    """Mean accuracy of the last five rounds, in per cent."""
    return 100 * statistics.mean(line[part] for line in lines[-5:])


def spread(values: list[float]) -> str:
    """Mean and, of more than one, standard deviation."""
    return f"{statistics.mean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


if __name__ == "__main__":
    main()
