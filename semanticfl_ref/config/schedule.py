"""The schedules of the clients' learning rate, and which settings each reads."""

from typing import TYPE_CHECKING

from semanticfl_ref.errors import UserError

if TYPE_CHECKING:
    from semanticfl_ref.config.settings import FederationSettings

# Schedule -> the settings that it reads, besides the learning rate.
SCHEDULES = {
    "constant": (),
    "step": ("decay", "decay_rounds"),
    "cosine": ("decay_rounds",),
    "exponential": ("decay",),
}


def check_schedule(settings: "FederationSettings") -> None:
    """Check that the settings of the schedule fit one another.

    Raises:
        UserError: a setting that the schedule does not read or lacks, or rounds without a rate.
    """
    kind, rounds = settings.schedule, settings.rounds
    for name in ("decay", "decay_rounds"):
        value = getattr(settings, name)
        if value and name not in SCHEDULES[kind]:
            readers = " or ".join(key for key, reads in SCHEDULES.items() if name in reads)
            raise UserError(
                f"federation.{name} = {value} has no effect with federation.schedule = {kind}: "
                f"leave it out, or choose the schedule {readers}"
            )
    if "decay_rounds" not in SCHEDULES[kind]:
        return
    if not settings.decay_rounds:
        example = rounds if kind == "cosine" else -(-rounds // 3)
        raise UserError(
            f"federation.schedule = {kind} needs federation.decay_rounds: set it, for these "
            f"{rounds} rounds for example to {example}"
        )
    if kind == "cosine" and rounds > settings.decay_rounds:
        raise UserError(
            f"federation.decay_rounds = {settings.decay_rounds} is less than federation.rounds = "
            f"{rounds}: after it the cosine's rate is 0; set it to at least {rounds}"
        )
