"""A search in which every method has the same budget: as many configurations, seeds and rounds.

What is chosen is the configuration with the highest validation accuracy, the mean over seeds and
scenarios of the mean of the last rounds. The test part is not read, and the seeds are others than
those of the comparison that uses the result.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from semanticfl_ref.config.registry import is_foreign
from semanticfl_ref.errors import DataError, UserError
from semanticfl_ref.formatting import Say
from semanticfl_ref.randomness import generator
from semanticfl_ref.run.environment import command_line
from semanticfl_ref.storage import write_atomic
from semanticfl_ref.tools.compare.experiment import run_grid
from semanticfl_ref.tools.compare.grid import Grid, method_settings, short_name, with_settings
from semanticfl_ref.tools.compare.tables import mean_and_deviation

RESULT = "search.json"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search found.

    Attributes:
        chosen: method -> the entry of the best configuration.
        accuracy: method -> entry of every configuration -> its accuracy in %, a value per seed.
        configurations: their number, the same for every method.
        seeds: of the runs.
        rounds: of each run.
        scenarios: over which an accuracy is the mean.
        dataset: whose validation part was used.
        command: that made it.
    """

    chosen: dict[str, str]
    accuracy: dict[str, dict[str, list[float]]]
    configurations: int
    seeds: list[int]
    rounds: int
    scenarios: list[str]
    dataset: str
    command: str


def candidates(method: str, varied: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """The configurations to try of a method: so many combinations of the values.

    They are drawn at random, each next one from those whose values were tried least so far: of four
    learning rates, four configurations have each once. The draw depends on the method and the
    values alone.

    Args:
        method: an entry such as "semanticfl[anchors.control=shuffled]".
        varied: dotted name -> values. Settings of another method's section do not count.
        count: number of configurations.

    Raises:
        UserError: fewer combinations than `count`: the method would have a smaller budget.
    """
    name = method_settings(method)["federation.method"]
    own = {setting: values for setting, values in varied.items() if not is_foreign(setting, name)}
    combinations = list(product(*own.values()))
    if len(combinations) < count:
        raise UserError(
            f"{method} has {len(combinations)} combinations of the values of --vary, fewer than "
            f"the {count} configurations of every method: give it more values, or lower "
            f"--configurations"
        )
    drawn = torch.randperm(len(combinations), generator=generator(0, f"search of {name}"))
    remaining, tried, chosen = [combinations[i] for i in drawn], Counter(), []
    for _ in range(count):
        least = min(remaining, key=lambda values: sum(tried[pair] for pair in enumerate(values)))
        remaining.remove(least)
        tried.update(enumerate(least))
        chosen.append(least)
    chosen.sort(key=combinations.index)
    return [with_settings(method, zip(own, values, strict=True)) for values in chosen]


def search(
    grid: Grid, varied: Mapping[str, Sequence[str]], configurations: int, say: Say
) -> Search:
    """Train every configuration and choose; writes search.json and search.md to the grid's folder.

    Args:
        grid: its methods are those that are tuned; on the validation part.
        varied: dotted name -> values.
        configurations: number of configurations of every method.
        say: takes one line of progress.

    Raises:
        UserError: and its kinds, see errors.py.
    """
    names = {method_settings(method)["federation.method"] for method in grid.methods}
    for setting in varied:
        if is_foreign(setting, *names):
            raise UserError(f"--vary {setting}: its method is not among --methods")
    entries = {method: candidates(method, varied, configurations) for method in grid.methods}
    methods = [entry for tried in entries.values() for entry in tried]
    comparison = run_grid(replace(grid, methods=methods, baseline=methods[0]), say)
    scenario = comparison.results[-1].scenario  # over all of them, if there are several
    found = {r.method: r for r in comparison.results if r.scenario == scenario}
    accuracy = {
        method: {entry: found[entry].mean_of_last for entry in tried}
        for method, tried in entries.items()
    }
    result = Search(
        chosen={
            method: max(tried, key=lambda entry, of=tried: fmean(of[entry]))
            for method, tried in accuracy.items()
        },
        accuracy=accuracy,
        configurations=configurations,
        seeds=comparison.seeds,
        rounds=comparison.results[-1].rounds,
        scenarios=list(comparison.curves),
        dataset=comparison.dataset,
        command=command_line(),
    )
    write_atomic(grid.out / RESULT, json.dumps(asdict(result), indent=1) + "\n")
    write_atomic(grid.out / "search.md", table(result) + "\n")
    say(f"wrote {RESULT} and search.md; the next step: compare --tuned {grid.out / RESULT}")
    return result


def table(result: Search) -> str:
    """The configurations of every method with their validation accuracies, as Markdown."""
    lines = [
        "| method | configuration | validation accuracy | chosen |",
        "| --- | --- | --- | --- |",
    ]
    for method, tried in result.accuracy.items():
        for entry, values in tried.items():
            mark = "yes" if entry == result.chosen[method] else ""
            lines.append(f"| {method} | `{entry}` | {mean_and_deviation(values)} | {mark} |")
    scenarios, seeds = ", ".join(result.scenarios), ", ".join(map(str, result.seeds))
    budget = (
        f"{result.dataset}, {scenarios}; every method: {result.configurations} configurations, "
        f"{result.rounds} rounds, seeds {seeds}. The mean of the last rounds in %; ± is the sample "
        f"standard deviation over seeds."
    )
    return "\n".join([*lines, "", budget, "", f"    {result.command}"])


def read_search(path: Path) -> dict:
    """The fields of `Search` in a file that `search` wrote.

    Raises:
        DataError: it cannot be read, or is not the result of a search.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return asdict(Search(**document))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError):
        raise DataError(f"{path} is not the {RESULT} of a search") from None


def tuned(grid: Grid, path: Path) -> Grid:
    """The grid with each of its methods as a search chose it; an entry's own settings stay.

    Raises:
        DataError: the file cannot be read.
        UserError: a method was not in the search, or a seed was.
    """
    found = read_search(path)
    chosen = found["chosen"]

    def as_chosen(entry: str) -> str:
        own = method_settings(entry)
        method = own.pop("federation.method")
        if method not in chosen:
            raise UserError(f"--tuned {path}: it has no {method}; it has {', '.join(chosen)}")
        name = short_name(entry)
        whole = with_settings(chosen[method], own.items())
        return whole if "[" in name else f"{name}={whole}"

    entries, baseline = [as_chosen(entry) for entry in grid.methods], as_chosen(grid.baseline)
    used = sorted(set(found["seeds"]) & set(grid.seed_numbers))
    if used:
        raise UserError(
            f"--tuned {path}: it used seed {used[0]}, so that results on this seed would favour "
            f"what was chosen on it; choose others with --first-seed {max(found['seeds']) + 1}"
        )
    return replace(grid, methods=entries, baseline=baseline, tuning=found)
