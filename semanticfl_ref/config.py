"""The whole configuration: one tree of frozen dataclasses, each field with its help, unit, source
and range beside it.

Sources: [A] the paper's abstract, [S] a second-hand summary of the paper, [N] the nearest published
    system (FedDifRC, arXiv
2507.06482), [O] our own reading where nothing is published: `Choice:` in the README's table of
deviations.

Values are settled in this order, later ones winning: the field's default, the data set's preset,
the embedded diffusion model's where it is the source, the method's, a TOML file, flags, `--set
a.b=c`."""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

from semanticfl_ref.errors import DataError, UserError, unknown
from semanticfl_ref.method_settings import (
    FedCDA,
    FedDifRC,
    FedDisco,
    FedProx,
    FedRCL,
    Moon,
    Scaffold,
    Semantic,
    Server,
)
from semanticfl_ref.schema import Section, option, toml_value, typed

DATASETS = ("digit-scenes", "digits", "cifar10", "cifar100", "tinyimagenet", "folder")
METHODS = [
    "fedavg",
    "fedprox",
    "scaffold",
    "moon",
    "fedrcl",
    "feddisco",
    "fedcda",
    "feddifrc",
    "semanticfl",
]  # a list: see add_method
SCENARIOS = ("iid", "nid1", "nid2", "pathological", "quantity")
CONTROLS = ("sd", "shuffled", "permuted", "random", "onehot")
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Where things lie and how often to save: a checkpoint may be resumed with these changed. What they
# point to is in the identity by its content.
NOT_IDENTITY = (
    "data.dir",
    "data.sha256",
    "partition.file",
    "diffusion.source",
    "anchors.images",
    "run.checkpoint_every",
)
SMALLEST_IMAGE = (
    9  # pixels a side: below, BatchNorm would meet one pixel of one image in the last stage
)


@dataclass(frozen=True, kw_only=True)
class Data(Section):
    name: str = option("digit-scenes", "data set", choices=DATASETS)
    dir: str = option(
        "", "folder of the data files, or of the class folders; empty = the download cache"
    )
    sha256: str = option(
        "", "accept a local file that differs from the published one, by its SHA-256"
    )
    image_size: int = option(
        0, "side to resize images to; 0 = as published", low=0, high=512, unit="pixels"
    )
    validation_share: float = option(
        0.0, "part of the training images set aside for tuning", low=0.0, high=0.5
    )
    augment: bool = option(
        True, "random flips and crops; the digits' preset turns it off", source="O"
    )


@dataclass(frozen=True, kw_only=True)
class Partition(Section):
    scenario: str = option(
        "nid1",
        "how the images are spread over clients: nid1, nid2, pathological skew the labels, quantity the sizes",
        choices=SCENARIOS,
        source="S",
    )
    alpha: float = option(
        0.2, "Dirichlet concentration of nid1 and quantity: small = skewed", above=0.0, source="S"
    )
    classes_per_client: int = option(
        2, "k of pathological: every client holds k classes", low=1, source="McMahan et al. 2017: 2"
    )
    imbalance: float = option(
        1.0,
        "long tail: the first class has so many times the last one's training images; the others belong to nobody; 1 = none",
        low=1.0,
        source="N",
    )
    features: str = option(
        "none",
        "camera = each client's images pass a camera of its own; train images make anchors as the clients hold them",
        choices=("none", "camera"),
        source="O",
    )
    modality: str = option(
        "none",
        "mixed = clients get both kinds of anchors, text alone, visual alone, or neither, in turn",
        choices=("none", "mixed"),
        source="O",
    )
    file: str = option(
        "",
        "JSON of each client's images, in the scenario's place, as `partition show --save` writes it",
    )
    clients: int = option(10, "clients in all", low=1, high=100_000, source="N")
    held_out_share: float = option(
        0.0, "part of each client's images that it keeps for a test of its own", low=0.0, high=0.5
    )


@dataclass(frozen=True, kw_only=True)
class Diffusion(Section):
    source: str = option(
        STABLE_DIFFUSION,
        "hub id or folder of a frozen Stable Diffusion; 'tiny' = the embedded one",
        source="S",
    )
    taps: str = option(
        "up.1,up.2,up.3",
        "tapped layers, separated by commas: vae, down.0, mid, up.3, up.1.resnets.0, up.1.attentions.2 ...; all = vae and every block",
        source="N",
    )
    timestep: int = option(150, "noise level of the U-Net pass", low=0, high=999, source="S")
    pool: int = option(
        1, "pooled grid per tap: 1 = global average, 2 = 2x2", low=1, high=4, source="S"
    )
    prompt: str = option("a photo of a {}", "text template; {} is the class name", source="S")
    condition: str = option(
        "null",
        "prompt of an image's U-Net pass; own-class writes the label into the anchor",
        choices=("null", "own-class"),
        source="O",
    )
    input_size: int = option(
        224,
        "side to which images are resized before the VAE; 0 = as they are",
        low=0,
        high=1024,
        source="N",
        unit="pixels",
    )
    latent: str = option(
        "mean",
        "of the VAE's distribution: its mean, or a sample keyed by the image's content",
        choices=("mean", "sample"),
        source="O",
    )
    precision: str = option(
        "auto",
        "of the U-Net: auto = fp16 on CUDA, bf16 on a CPU that has it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True, kw_only=True)
class Anchors(Section):
    control: str = option(
        "sd", "whose meaning the anchors carry; the others are controls", choices=CONTROLS
    )
    images: str = option(
        "train",
        "whose images make the visual anchors: train, heldout:n (n a class), or a folder of class folders",
        source="O",
    )
    per: str = option(
        "image", "one visual anchor per image, or per class", choices=("image", "class"), source="N"
    )
    width: int = option(512, "entries of a visual anchor", low=2, high=4096, source="S")
    aggregation: str = option(
        "256-128-128",
        "entries per tap, in the order of the taps; equal splits the width; separability too, and weights levels by their Fisher ratio",
        source="N",
    )
    whiten: bool = option(True, "scale every PCA component to unit variance", source="O")
    text: str = option(
        "clip",
        "text anchors: clip = the text encoder's; unet = mean U-Net features of a class's images under its caption",
        choices=("clip", "unet"),
        source="S",
    )
    text_images: int = option(
        16, "images a class that make its text anchor, where that is unet's", low=1, source="O"
    )


@dataclass(frozen=True, kw_only=True)
class Model(Section):
    width: int = option(
        64,
        "channels of ResNet-10's first stage; features have 8x as many",
        low=1,
        high=256,
        source="N",
    )
    batch_norm: str = option(
        "average",
        "BatchNorm across clients: average = like any weight, local = each client keeps its own, and accuracies are those of the average all the same",
        choices=("average", "local"),
        source="O",
    )


@dataclass(frozen=True, kw_only=True)
class Federation(Section):
    method: str = option("semanticfl", "federated method", choices=METHODS)
    rounds: int = option(100, "communication rounds", low=1, source="O")
    clients_per_round: int = option(5, "clients that train in a round", low=1, source="N")
    local_epochs: int = option(10, "passes over a client's images in a round", low=1, source="N")
    batch_size: int = option(64, "images a step", low=1, source="S")
    learning_rate: float = option(0.01, "of SGD", above=0.0, source="N")
    momentum: float = option(
        0.9, "of SGD; starts at zero for every client and round", low=0.0, high=0.9999, source="N"
    )
    weight_decay: float = option(1e-5, "of SGD", low=0.0, source="N")
    aggregation: str = option(
        "mean",
        "weighted mean of the clients' rows; or unweighted median or trimmed-mean of every entry, against hostile clients",
        choices=("mean", "median", "trimmed-mean"),
    )
    server_optimizer: str = option(
        "none",
        "makes the next model of the clients' average: fedavgm = momentum, fedadam = Adam",
        choices=("none", "fedavgm", "fedadam"),
    )
    non_finite: str = option(
        "stop",
        "a client that returns NaN or infinity: stop the run, or drop the client from the round",
        choices=("stop", "drop"),
    )


@dataclass(frozen=True, kw_only=True)
class Run(Section):
    seed: int = option(0, "of everything random", low=0, high=2**31 - 1)
    precision: str = option(
        "auto",
        "of the clients' training: auto = bf16 where the processor has it natively",
        choices=("auto", "fp32", "bf16"),
    )
    threads: int = option(
        0,
        "processor threads; 0 = as torch finds them. Results repeat bit for bit at equal threads",
        low=0,
        high=1024,
    )
    device: str = option("auto", "auto = CUDA when there is one", choices=("auto", "cpu", "cuda"))
    checkpoint_every: int = option(1, "rounds between checkpoints", low=1)


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Data = dataclasses.field(default_factory=Data)
    partition: Partition = dataclasses.field(default_factory=Partition)
    diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
    anchors: Anchors = dataclasses.field(default_factory=Anchors)
    model: Model = dataclasses.field(default_factory=Model)
    federation: Federation = dataclasses.field(default_factory=Federation)
    server: Server = dataclasses.field(default_factory=Server)
    semantic: Semantic = dataclasses.field(default_factory=Semantic)
    fedprox: FedProx = dataclasses.field(default_factory=FedProx)
    scaffold: Scaffold = dataclasses.field(default_factory=Scaffold)
    moon: Moon = dataclasses.field(default_factory=Moon)
    fedrcl: FedRCL = dataclasses.field(default_factory=FedRCL)
    feddisco: FedDisco = dataclasses.field(default_factory=FedDisco)
    fedcda: FedCDA = dataclasses.field(default_factory=FedCDA)
    feddifrc: FedDifRC = dataclasses.field(default_factory=FedDifRC)
    run: Run = dataclasses.field(default_factory=Run)

    def __post_init__(self):
        if self.federation.clients_per_round > self.partition.clients:
            raise UserError(
                f"federation.clients_per_round = {self.federation.clients_per_round} exceeds partition.clients = {self.partition.clients}: "
                f"lower --clients-per-round or raise --clients"
            )
        if (
            self.federation.aggregation == "trimmed-mean"
            and math.floor(round(self.server.trim * self.federation.clients_per_round, 9)) < 1
        ):
            raise UserError(
                f"server.trim = {self.server.trim} of federation.clients_per_round = {self.federation.clients_per_round} cuts nobody: "
                f"raise --clients-per-round or server.trim to at least {1 / self.federation.clients_per_round:.3g}, or take --set federation.aggregation=median"
            )
        if 0 < self.data.image_size < SMALLEST_IMAGE:
            raise UserError(
                f"data.image_size = {self.data.image_size}: must be 0 or at least {SMALLEST_IMAGE}: ResNet-10 halves the side three times, and one pixel has no variance"
            )


# What differs from the fields' defaults, by diffusion model and by data set. Choices for the
# embedded sets were made on their validation part.
TINY_MODEL = {  # its layers are fewer and narrower than Stable Diffusion's
    "diffusion.taps": "mid",
    "diffusion.timestep": 20,
    "diffusion.input_size": 0,
    "diffusion.precision": "fp32",
    "anchors.width": 96,
    "anchors.whiten": False,
    "anchors.aggregation": "equal",
}
TINY = {
    **TINY_MODEL,
    "data.augment": False,
    "partition.alpha": 0.3,
    "diffusion.source": "tiny",
    "model.width": 16,
    "federation.rounds": 40,
    "federation.local_epochs": 10,
    "federation.batch_size": 32,
    "federation.learning_rate": 0.1,
    "semantic.consistency": "cosine",
    "semantic.lambda_kd": 20.0,
    "semantic.lambda_con": 0.1,
    "fedcda.warm_up": 10,
}
PRESETS: dict[str, dict[str, object]] = {
    "digit-scenes": TINY,
    "digits": TINY,
    "cifar10": {},
    "cifar100": {"federation.weight_decay": 1e-4},
    "tinyimagenet": {"federation.weight_decay": 1e-4},
    "folder": {"data.image_size": 32},
}

METHOD_PRESETS: dict[str, dict[str, object]] = {
    "feddifrc": {"anchors.text": "unet"}
}  # as its publication has it


def build(
    settings: dict[str, object] | None = None, file: Path | None = None, assignments: list[str] = ()
) -> Config:
    """Settle the configuration: presets of the data set, the embedded model and the method < TOML
    file < `settings` (flags) < `assignments` (`a.b=c`).

    Args:
        settings: dotted name -> value, typed.
        file: a TOML file whose tables are the sections.
        assignments: texts `section.field=value`.

    Raises:
        UserError: an unknown section, field or name (the nearest is offered), a wrong type, a value
            out of range.
        DataError: the file is missing or is not TOML.
    """
    given: dict[str, object] = {}
    if file is not None:
        given.update(read_toml(file))
    given.update(settings or {})
    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(
                f"--set {text!r}: expected section.field=value, for example --set semantic.tau=0.07"
            )
        given[name.strip()] = value.strip()
    name = str(
        given.get("data.name", Data.__dataclass_fields__["name"].default)
    )  # str: a TOML file may hold a list, which from_flat refuses by name
    if name not in PRESETS:
        raise unknown("dataset", name, DATASETS)
    model = TINY_MODEL if given.get("diffusion.source") == "tiny" else {}
    return from_flat(
        {
            **PRESETS[name],
            **model,
            **METHOD_PRESETS.get(str(given.get("federation.method")), {}),
            **given,
        }
    )


def add_method(name: str, section: type[Section] | None = None) -> None:
    """Make a further federated method known to every command: its name and, in a section of that
    name, its settings.
    """
    global Config
    METHODS.append(name)
    if section is not None:
        own = (name, section, dataclasses.field(default_factory=section))
        Config = dataclasses.make_dataclass(
            "Config", [own], bases=(Config,), frozen=True, kw_only=True
        )


def settings() -> dict[str, dataclasses.Field]:
    """Dotted name -> field of every setting, in the order of declaration."""
    return {
        f"{s.name}.{f.name}": f
        for s in dataclasses.fields(Config)
        for f in dataclasses.fields(s.type)
    }


def from_flat(values: dict[str, object]) -> Config:
    """A Config from dotted names; texts are converted to the field's type."""
    fields = settings()
    for name in values:
        if name not in fields:
            raise _unknown_setting(name, fields)
    sections = {}
    for section in dataclasses.fields(Config):
        inside = {
            n.split(".")[1]: typed(n, fields[n], v)
            for n, v in values.items()
            if n.split(".")[0] == section.name
        }
        sections[section.name] = section.type(**inside)
    return Config(**sections)


def to_flat(config: Config) -> dict[str, object]:
    """Dotted name -> value, every field, in the order of declaration."""
    return {
        f"{s.name}.{k}": v
        for s in dataclasses.fields(config)
        for k, v in dataclasses.asdict(getattr(config, s.name)).items()
    }


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `build(file=...)` reads back to an equal Config."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for key, value in dataclasses.asdict(getattr(config, section.name)).items():
            lines.append(f"{key} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def held_out_images(config: Config) -> int:
    """n of `anchors.images = heldout:n`: images a class that no client gets, as the anchors are
    made of them; else 0.

    Raises:
        UserError: n is not a whole number of at least 1.
    """
    kind, sign, number = config.anchors.images.partition(":")
    if kind != "heldout":
        return 0
    if not sign or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise UserError(
            f"anchors.images = {config.anchors.images!r}: expected heldout:n with n images a class, for example heldout:20"
        )
    return int(number)


def read_toml(file: Path) -> dict[str, object]:
    """Dotted name -> value of a TOML file."""
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the configuration {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not TOML: {error}") from None
    flat = {}
    for section, values in tables.items():
        if not isinstance(values, dict):
            raise UserError(
                f"{file}: {section!r} stands outside a section; write it as [section] and a line {section} = ..."
            )
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    return flat


def _unknown_setting(name: str, fields) -> UserError:
    near = [f for f in fields if f.endswith("." + name)] or difflib.get_close_matches(
        name, fields, n=1, cutoff=0.5
    )
    hint = (
        f"; did you mean {' or '.join(map(repr, near))}?"
        if near
        else "; `train --help` lists the settings"
    )
    return UserError(f"unknown setting {name!r}{hint}")
