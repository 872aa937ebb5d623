"""`partition show`: which client holds what; drawn or saved on request."""

import json

from semanticfl_ref.commands.output import say, show
from semanticfl_ref.commands.settings_flags import add_settings, settings_of
from semanticfl_ref.storage import user_path, write_atomic
from semanticfl_ref.tools.report.drawing import need_matplotlib, save_figure

HELP = "show: how training images are partitioned across clients"


def add_flags(parser, argv: list[str]) -> None:
    parser.add_argument("what", choices=["show"], metavar="show")
    add_settings(parser, argv)
    parser.add_argument(
        "--figure",
        type=user_path,
        metavar="FILE",
        help="PNG or SVG file for a figure of the classes per client; needs matplotlib",
    )
    parser.add_argument(
        "--save",
        type=user_path,
        metavar="FILE",
        help="JSON file for each client's image indices, for --set partition.file=FILE",
    )
    parser.add_argument(
        "--map",
        type=user_path,
        metavar="FILE",
        help='JSON file for other tools, {"0": [indices], ...}: what each client trains on',
    )


def run(arguments) -> int:
    config = settings_of(arguments)
    if arguments.figure:
        need_matplotlib(arguments.figure)
    say(f"{config.data.name}: loading torch ...")
    from semanticfl_ref.data.partition_file import save_partition
    from semanticfl_ref.run.setup import load_images, partition_images
    from semanticfl_ref.tools.report.figures import partition_figure

    dataset, _ = load_images(config, offline=arguments.offline)
    for note in dataset.notes:
        say(f"note: {note}")
    partition = partition_images(config, dataset)
    manifest = partition.manifest()
    if arguments.save:
        save_partition(partition, dataset, arguments.save)
        say(f"saved: {arguments.save}")
    if arguments.figure:
        save_figure(partition_figure(manifest, list(dataset.class_names)), arguments.figure)
        say(f"figure: {arguments.figure}")
    if arguments.map:
        lists = {str(client): own.tolist() for client, own in enumerate(partition.indices)}
        write_atomic(arguments.map, json.dumps(lists) + "\n", "choose another --map")
        say(f"saved: {arguments.map}")
    return show(manifest, arguments.json, lambda it: partition_table(it, dataset.class_names))


def partition_table(manifest: dict, class_names: tuple[str, ...]) -> str:
    """A line per client: images, number of classes, and the classes it holds most of."""
    alpha = f", alpha {manifest['alpha']:g}" if manifest["alpha"] is not None else ""
    unused = f" ({sum(manifest['dropped'])} unused)" if manifest["dropped"] else ""
    images = f"{sum(manifest['sizes'])} training images{unused}"
    columns = {"corruption": manifest["corruptions"], "anchors": manifest["modalities"]}
    columns["name"] = manifest["client_names"]
    columns = {name: values for name, values in columns.items() if values}
    lines = [
        f"{manifest['scenario']}{alpha}, seed {manifest['seed']}: {images}, {manifest['clients']} "
        f"clients",
        f"skew {manifest['skew']:.3f} (total variation), {manifest['kl']:.3f} nats (KL), sha256 "
        f"{manifest['sha256'][:16]}",
        "",
        "client  images  classes  " + "".join(f"{name:<17}" for name in columns) + "most of",
    ]
    for client, counts in enumerate(manifest["histograms"]):
        held = sorted((c for c, n in enumerate(counts) if n), key=lambda c: -counts[c])
        most = ", ".join(f"{class_names[c]} {counts[c]}" for c in held[:5])
        more = ", ..." if len(held) > 5 else ""
        cells = "".join(f"{values[client]:<17}" for values in columns.values())
        lines.append(f"{client:>6}  {sum(counts):>6}  {len(held):>7}  {cells}{most}{more}")
    return "\n".join(lines)
