"""Coverage of the 95 % interval that `compare` reports, for differences of several distributions.

    python scripts/coverage.py

Each entry is the share of 20 000 simulated experiments whose interval contains the true mean
difference, in per cent; its standard error is 0.2 where the coverage is 95 %, 0.3 where it is 80 %.
Needs SciPy.
"""

import numpy as np

from semanticfl_ref.tools.compare.statistics import Result, gains

EXPERIMENTS = 20_000
SEEDS = (5, 10, 20)
# Name -> function (generator, shape) -> differences, and their mean.
DISTRIBUTIONS = {
    "normal": (lambda generator, shape: generator.normal(0, 1, shape), 0.0),
    "uniform": (lambda generator, shape: generator.uniform(0, 1, shape), 0.5),
    "exponential (skewness 2)": (lambda generator, shape: generator.exponential(1, shape), 1.0),
    "log-normal (skewness 6.2)": (
        lambda generator, shape: generator.lognormal(0, 1, shape),
        np.exp(0.5),
    ),
    "nine of ten 0, one of ten 10": (
        lambda generator, shape: 10.0 * (generator.random(shape) < 0.1),
        1.0,
    ),
}


def main() -> None:
    print(f"| differences | {' | '.join(f'{seeds} seeds' for seeds in SEEDS)} |")
    print("| --- " * (len(SEEDS) + 1) + "|")
    for name, (sample, mean) in DISTRIBUTIONS.items():
        cells = []
        for seeds in SEEDS:
            differences = sample(np.random.default_rng(0), (EXPERIMENTS, seeds))
            cells.append(f"{100 * coverage(differences, mean):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def coverage(differences: np.ndarray, mean: float) -> float:
    """Share of experiments whose interval contains the mean.

    Args:
        differences: [experiments, seeds].
        mean: of their distribution.
    """
    zero = result([0.0] * differences.shape[1])
    found = gains([result(values) for values in differences.tolist()], zero)
    return sum(gain.low <= mean <= gain.high for gain in found) / len(found)


def result(values: list[float]) -> Result:
    """A method with these accuracies."""
    return Result(
        scenario="simulated",
        method="simulated",
        rounds=1,
        averaged=1,
        last=values,
        mean_of_last=values,
        best=values,
        worst_client=values,
        bytes_sent=0,
    )


if __name__ == "__main__":
    main()
