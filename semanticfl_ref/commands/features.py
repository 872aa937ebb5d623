"""`features`: the feature caches that training uses, and a probe of the model's layers."""

from pathlib import Path

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.errors import UserError
from semanticfl_ref.formatting import format_bytes, format_percent
from semanticfl_ref.tools.report.drawing import need_matplotlib, save_figure

HELP = (
    "build, info, verify: feature caches that training uses; probe: what each layer of the "
    "diffusion model says about the classes"
)
ONLY_FOR = {
    "rebuild": "build",
    "layers": "probe",
    "timesteps": "probe",
    "probe_images": "probe",
    "figure": "probe",
}


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["build", "info", "verify", "probe"])
    add_settings(parser, argv)
    parser.add_argument(
        "--rebuild", action="store_true", help="build: discard existing caches first"
    )
    parser.add_argument(
        "--layers",
        metavar="A,B",
        help="probe: layers, separated by commas (default: the latent and every block)",
    )
    parser.add_argument(
        "--timesteps",
        type=integers,
        metavar="T,T",
        help="probe: noise levels, separated by commas (default: diffusion.timestep)",
    )
    parser.add_argument(
        "--probe-images",
        type=int,
        metavar="N",
        help="probe: maximum number of images to fit on, and to evaluate on (default: 2000)",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="probe: PNG or SVG file for a figure of the table; needs matplotlib",
    )


def run(arguments) -> int:
    config, what = settings_of(arguments), arguments.what
    for name, command in ONLY_FOR.items():
        if getattr(arguments, name) and what != command:
            raise UserError(
                f"--{name.replace('_', '-')} belongs to `features {command}`, not to `features "
                f"{what}`: leave it out"
            )
    if arguments.figure is not None:
        need_matplotlib("--figure", arguments.figure)
    say(f"{config.data.name}, {config.diffusion.source}: loading torch ...")
    from semanticfl_ref.tools import features

    options = {}
    if what == "build":
        options = {"rebuild": arguments.rebuild, "say": say}
    elif what == "probe":
        options = {
            "layers": arguments.layers or "all",
            "timesteps": arguments.timesteps,
            "images": arguments.probe_images or 2000,
            "say": say,
        }
    # A function per choice of `what`, by its name.
    document = getattr(features, what)(config, offline=arguments.offline, **options)
    if arguments.figure is not None:
        save_figure(features.probe_figure(document), arguments.figure)
        say(f"figure: {arguments.figure}")
    return show(document, arguments.json, probe_table if what == "probe" else cache_table)


def cache_table(document: dict) -> str:
    """Where the caches are, what they contain, and how far they are built."""
    rows = []
    checked = ", every byte checked" if document.get("verified") else ""
    for cache in document["caches"]:
        rows += [
            (f"{cache['use']} cache", cache["path"]),
            (
                "",
                f"{cache['images_done']} of {cache['images']} images, "
                f"{format_bytes(cache['bytes'])} on disk{checked}",
            ),
            (
                "",
                f"{cache['source']}, {', '.join(cache['layers'])} at t = {cache['timestep']}, "
                f"condition {cache['condition']}, {cache['precision']}",
            ),
        ]
        rows += [("", f"note: {note}") for note in cache["notes"]]
    if not all(cache["complete"] for cache in document["caches"]):
        rows.append(("to build", document["command"]))
    return "\n".join(f"{name:<12}  {value}" for name, value in rows)


def probe_table(document: dict) -> str:
    """The five numbers of every layer, as a Markdown table."""
    lines = [
        f"{document['dataset']} by {document['source']}: fitted on {document['fitted_on']} "
        f"training images, evaluated on {document['evaluated_on']} {document['evaluated_part']} "
        f"images",
        *(f"note: {note}" for note in document["notes"]),
        "",
        "| t | layer | width | linear probe | nearest | Fisher ratio | effective rank | "
        "text alignment |",
        "|" + " --- |" * 8,
    ]
    for row in document["rows"]:
        timestep = "" if row["timestep"] is None else row["timestep"]
        text = "" if row["text_alignment"] is None else f"{row['text_alignment']:.2f}"
        lines.append(
            f"| {timestep} | {row['layer']} | {row['width']} "
            f"| {format_percent(row['linear_probe'])} | {format_percent(row['nearest'])} "
            f"| {row['fisher_ratio']:.3f} | {row['effective_rank']:.1f} | {text} |"
        )
    return "\n".join(lines)


def integers(text: str) -> list[int]:
    """The integers of a list such as "20,150"."""
    return [int(part) for part in text.split(",")]
