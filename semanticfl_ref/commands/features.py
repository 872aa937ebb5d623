"""`features`: the caches that training uses, and what each layer of the diffusion model knows."""

from pathlib import Path

from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.commands.output import say, show
from semanticfl_ref.errors import UserError

HELP = "build, info, verify: the diffusion features that training uses; probe: what each layer of the model knows of the classes"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["build", "info", "verify", "probe"])
    add_settings(parser, argv)
    parser.add_argument("--rebuild", action="store_true", help="build: throw away what is there")
    parser.add_argument(
        "--layers", metavar="A,B", help="probe: layers; by default the latent and every block"
    )
    parser.add_argument(
        "--timesteps",
        type=_numbers,
        default=[],
        metavar="T,T",
        help="probe: noise levels; by default the configured one",
    )
    parser.add_argument(
        "--probe-images",
        type=int,
        metavar="N",
        help="probe: at most so many to fit on and to judge on (2000)",
    )
    parser.add_argument(
        "--figure", type=Path, metavar="PNG", help="probe: draw the table; needs matplotlib"
    )


def run(arguments) -> int:
    settings = settings_of(arguments)
    only_for = {
        "rebuild": "build",
        "layers": "probe",
        "timesteps": "probe",
        "probe_images": "probe",
        "figure": "probe",
    }
    for name, what in only_for.items():
        if getattr(arguments, name) and what != arguments.what:
            raise UserError(
                f"--{name.replace('_', '-')} belongs to `features {what}`, not to `features {arguments.what}`"
            )
    say(f"{settings.data.name}, {settings.diffusion.source}: loading torch ...")
    from semanticfl_ref.tools import features

    where = {"offline": arguments.offline}
    if arguments.what == "build":
        return show(
            features.build(settings, rebuild=arguments.rebuild, say=say, **where),
            arguments.json,
            features.cache_words,
        )
    if arguments.what != "probe":
        return show(
            {"info": features.info, "verify": features.verify}[arguments.what](settings, **where),
            arguments.json,
            features.cache_words,
        )
    options = {
        "layers": arguments.layers or "all",
        "timesteps": arguments.timesteps,
        "images": arguments.probe_images or features.PROBE_IMAGES,
        "figure": arguments.figure,
    }
    return show(
        features.probe(settings, say=say, **options, **where), arguments.json, features.probe_words
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
