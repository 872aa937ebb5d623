"""`doctor`: check that a run with these settings can start."""

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of

HELP = "check that dependencies, data and weights are available, for the settings of train"


def add_flags(parser, argv: list[str]) -> None:
    add_settings(parser, argv)


def run(arguments) -> int:
    from semanticfl_ref.tools.doctor import examine

    config = settings_of(arguments)
    say("checking; this takes some seconds ...")
    findings = list(examine(config, arguments.offline))
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    document = {
        "ready": code == 0,
        "exit_code": code,
        "checks": [finding._asdict() for finding in findings],
    }
    show(document, arguments.json, findings_table)
    return code


def findings_table(document: dict) -> str:
    """A line per check, and the result."""
    checks = document["checks"]
    lines = [
        f"{check['state']:<4}  {check['item']:<15}  {' '.join(check['found'].split())}"
        for check in checks
    ]
    failed = ", ".join(check["item"] for check in checks if check["state"] == "FAIL")
    return "\n".join([*lines, "", f"not ready: {failed}" if failed else "ready"])
