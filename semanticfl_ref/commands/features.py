"""`features`: the feature caches that training uses, and a probe of the model's layers."""

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import (
    add_settings,
    integers,
    positive,
    settings_of,
)
from semanticfl_ref.errors import UserError
from semanticfl_ref.storage import user_path
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
    parser.add_argument(
        "what", choices=["build", "info", "verify", "probe"], metavar="build|info|verify|probe"
    )
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
        type=positive,
        metavar="N",
        help="probe: maximum number of images to fit on, and to evaluate on (default: 2000)",
    )
    parser.add_argument(
        "--figure",
        type=user_path,
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
    if arguments.figure:
        need_matplotlib(arguments.figure)
    say(f"{config.data.name}, {config.diffusion.source}: loading torch ...")
    from semanticfl_ref.tools import features

    if what == "probe":
        document = features.probe(
            config,
            offline=arguments.offline,
            layers=arguments.layers or "all",
            timesteps=arguments.timesteps,
            images=arguments.probe_images or 2000,
            say=say,
        )
    else:
        document = features.caches(
            config, what, offline=arguments.offline, rebuild=arguments.rebuild, say=say
        )
    if arguments.figure:
        save_figure(features.probe_figure(document), arguments.figure)
        say(f"figure: {arguments.figure}")
    return show(document, arguments.json, features.table)
