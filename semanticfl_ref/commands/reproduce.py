"""`reproduce`: a published cell, run and printed beside its number."""

import tomllib
from pathlib import Path

from semanticfl_ref.config.settings import Config
from semanticfl_ref.commands import compare
from semanticfl_ref.commands.settings_flags import add_settings, given
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.config import resolve as config
from semanticfl_ref.errors import DownloadError, UserError, unknown

HELP = "a published cell of the paper: run it, and print its number beside ours"
PRESETS = Path(__file__).parent.parent / "configs" / "paper"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument(
        "table", nargs="?", metavar="TABLE", help="which cell; without it, the list of them"
    )
    compare.add_grid_flags(parser, Path("runs/reproduce"))
    add_settings(parser, argv)


def run(arguments) -> int:
    from semanticfl_ref.tools.compare.grid import scenario_settings

    cells = tomllib.loads((PRESETS / "published.toml").read_text(encoding="utf-8"))
    if arguments.table is None:
        return show(cells, arguments.json, listing)
    if arguments.table not in cells:
        raise unknown("table", arguments.table, cells)
    if arguments.config is not None:
        raise UserError(
            "reproduce has a configuration of its own; change single settings with flags or --set"
        )
    cell, preset = cells[arguments.table], PRESETS / cells[arguments.table]["config"]
    compare.refuse(arguments)
    for name in sorted(
        compare.written(arguments)
        & {name for scenario in cell["scenarios"] for name in scenario_settings(scenario)}
    ):
        raise UserError(
            f"{name} is what the cell {arguments.table} is of: leave it out, or take `compare`"
        )
    arguments.config, arguments.out = preset, arguments.out / arguments.table
    need_all(
        config.resolve(
            {**given(arguments), "federation.method": "semanticfl"}, preset, arguments.set
        ),
        arguments.offline,
    )
    result = compare.run_grid(
        arguments,
        list(cell["accuracy"]),
        cell["scenarios"],
        baseline=next(iter(cell["accuracy"])),
        part="test",
    )
    document = {
        "table": arguments.table,
        **cell,
        "ours": ours(result),
        "seeds": len(result["seeds"]),
        "rounds": result["rounds"],
        "changed": sorted(compare.written(arguments)),
    }
    return show(document, arguments.json, beside)


def need_all(settings: Config, offline: bool) -> None:
    """Fetch the data set and the diffusion model before anything is trained.

    Raises:
        DownloadError: one of them, or both, cannot be had; the message names each.
    """
    say(f"{settings.data.name}, {settings.diffusion.source}: looking for both ...")
    from semanticfl_ref.diffusion import model_files as weights
    from semanticfl_ref.run import setup as prepare

    missing = []
    for what, fetch in (
        (settings.data.name, lambda: prepare.load_images(settings, offline)),
        (
            settings.diffusion.source,
            lambda: weights.locate(settings.diffusion.source, offline=offline),
        ),
    ):
        try:
            fetch()
        except DownloadError as error:
            missing.append(f"{what} cannot be had: {error}")
    if missing:
        raise DownloadError("; and ".join(missing))


def ours(result: dict) -> dict[str, dict[str, list[float]]]:
    """Method -> its accuracies of every run, over all scenarios: of the last round, and the mean of
    the last five.
    """
    scope = "all" if len(result["curves"]) > 1 else next(iter(result["curves"]))
    return {
        cell["arm"]: {"last": cell["last"], "last_five": cell["last_five"]}
        for cell in result["cells"]
        if cell["scenario"] == scope
    }


def listing(cells: dict) -> str:
    """The cells that can be asked for."""
    return "\n".join(
        f"{name:<18}{cell['title']}: "
        + ", ".join(f"{method} {value}" for method, value in cell["accuracy"].items())
        for name, cell in cells.items()
    )


def beside(document: dict) -> str:
    """Published and ours, their difference, and what differs in the set-up."""
    from semanticfl_ref.tools.compare.tables import mean

    lines = [
        f"**{document['title']}**",
        "",
        "| method | published | ours, last round | ours, mean of last five | difference |",
        "|" + " --- |" * 5,
    ]
    for method, published in document["accuracy"].items():
        mine = document["ours"][method]
        difference = sum(mine["last_five"]) / len(mine["last_five"]) - published
        lines.append(
            f"| {method} | {published:.2f} | {mean(mine['last'])} | {mean(mine['last_five'])} | {difference:+.2f} |"
        )
    lines += [
        "",
        f"Accuracy in %; ours over {document['seeds']} seeds, {document['rounds']} rounds, never the best round. The published numbers are from a second-hand summary.",
    ]
    lines += ["Not known of the published set-up: " + "; ".join(document["unknown"]) + "."]
    if document["changed"]:
        lines.append("Changed from the preset: " + ", ".join(document["changed"]) + ".")
    return "\n".join(lines)
