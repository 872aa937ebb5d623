"""What a reader sees: the table that ends a run, a partition's, a dry run's. No torch in here."""

import shlex

from semanticfl_ref.config import PRESETS, TINY, Config


def closing_words(summary: dict, config: Config) -> str:
    """The table, the warnings, and what to try next."""
    return "\n".join(
        [
            table(summary),
            *(f"warning: {text}" for text in summary["warnings"]),
            "",
            try_next(config),
        ]
    )


def try_next(config: Config) -> str:
    """Commands that can be typed as they stand."""
    command, method = "python -m semanticfl_ref train", config.federation.method
    named = {
        "--dataset": config.data.name,
        "--data-dir": config.data.dir,
        "--data-sha256": config.data.sha256,
    }
    dataset = "".join(
        f" {flag} {shlex.quote(value)}"
        for flag, value in named.items()
        if value not in ("", "digit-scenes")
    )
    why = (
        "the difference that the anchors make"
        if method in ("fedavg", "semanticfl")
        else "to compare"
    )
    lines = [
        f"try next: {command}{dataset} --method {'fedavg' if method != 'fedavg' else 'semanticfl'}    ({why})"
    ]
    if is_embedded(config):
        lines.append(f"          {command} --dataset cifar10    (the paper's setting)")
    return "\n".join(lines)


def table(summary: dict) -> str:
    """The short table that ends a run."""
    sent, best = (
        summary["bytes_down"] + summary["bytes_up"],
        summary["test_accuracy_at_best_validation"],
    )
    lines = [
        ("last accuracy", f"{summary['test_accuracy']:.2%}"),
        ("mean of the last five", f"{summary['test_accuracy_last_five']:.2%}"),
        *(
            [("best on validation", f"{best:.2%} (round {summary['best_validation_round']})")]
            if best is not None
            else []
        ),
        (
            "worst 10 % of clients",
            f"{summary['client_accuracy']['worst_tenth']:.2%} (the worst: client {summary['worst_client']}, {summary['worst_client_accuracy']:.2%})",
        ),
        ("time", f"{summary['seconds']:.0f} s for {summary['rounds']} rounds"),
        (
            "sent",
            f"{size(sent)} ({size(summary['bytes_down'])} to the clients, {size(summary['bytes_up'])} back)",
        ),
        ("run folder", summary["folder"]),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def sizes_table(sizes: dict) -> str:
    """The dry run's sizes for a reader."""
    images = ", ".join(f"{count} {part}" for part, count in sizes["images"].items())
    small, large = min(sizes["client_images"]), max(sizes["client_images"])
    return "\n".join(
        (
            f"data set       {sizes['dataset']}: {images}; {sizes['classes']} classes, {sizes['image_size']} pixels a side",
            f"clients        {sizes['clients']}, {small} to {large} images each; {sizes['clients_per_round']} a round, {sizes['rounds']} rounds",
            f"steps a round  {sizes['steps_per_round']} on average",
            f"row            {sizes['row_entries']} entries, {size(4 * sizes['row_entries'])}",
            f"sent a round   {size(sizes['bytes_down_per_round'])} down, {size(sizes['bytes_up_per_round'])} up; a client's anchors once besides",
        )
    )


def size(count: float) -> str:
    """A number of bytes for a reader: 1 536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def is_embedded(config: Config) -> bool:
    """Whether the data set is one of those in the package, which the embedded diffusion model was
    made for.
    """
    return PRESETS[config.data.name] is TINY
