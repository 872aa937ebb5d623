"""`export`: the trained model of a run as a file."""

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.storage import user_path

HELP = "write the trained model of a run to a file that other programs can load"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("run_folder", type=user_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        metavar="FILE",
        help="file to write: model.safetensors (named tensors) or model.pt2 (torch.export program)",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="the model of the best validation round, which a run with run.patience keeps",
    )


def run(arguments) -> int:
    say(f"{arguments.run_folder}: loading torch ...")
    from semanticfl_ref.run.trained import export_model

    file = export_model(arguments.run_folder, arguments.out, best=arguments.best)
    return show({"model": str(file)}, arguments.json, lambda document: document["model"])
