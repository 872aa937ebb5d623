"""`export`: the trained model of a run as a file."""

HELP = "write the trained model of a run as a file"


def add_flags(parser, argv: list[str]) -> None:
    pass


def run(arguments) -> int:
    return 0
