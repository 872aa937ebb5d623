"""The whole configuration: frozen sections, each field with its help, unit, source and range.

Sources: [A] the paper's abstract, [S] a second-hand summary of the paper, [N] the nearest published
system (FedDifRC, arXiv 2507.06482), [O] our own reading where nothing is published. docs/choices.md
gives the reasons.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from semanticfl_ref.config import methods, presets  # noqa: F401  (they register names)
from semanticfl_ref.config.anchor_settings import (  # noqa: F401  (also read from here)
    CONTROLS,
    STABLE_DIFFUSION,
    AnchorsSettings,
    DiffusionSettings,
)
from semanticfl_ref.config.data_settings import DataSettings, PartitionSettings
from semanticfl_ref.config.registry import METHODS, MODELS
from semanticfl_ref.config.schedule import SCHEDULES, check_schedule
from semanticfl_ref.config.schema import Section, convert, option
from semanticfl_ref.errors import UserError, unknown_setting

# Locations and bookkeeping: a run may be resumed with these changed. The content behind the paths
# is part of a run's identity.
NOT_IDENTITY = frozenset(
    {
        "data.dir",
        "data.sha256",
        "data.class_names",
        "partition.file",
        "diffusion.source",
        "diffusion.compile",
        "anchors.images",
        "federation.rounds",
        "run.checkpoint_every",
        "run.patience",
        "run.replicas",
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    name: str = option("resnet10", "client model", choices=MODELS, source="S")
    width: int = option(
        64,
        "width of the client model: channels of a ResNet's first stage; features have 8 times as "
        "many",
        low=1,
        high=256,
        source="N",
    )
    batch_norm: str = option(
        "average",
        "BatchNorm across clients: average (like any parameter) or local (each client keeps its "
        "own; the global model is evaluated with their average)",
        choices=("average", "local"),
        source="O",
    )
    norm: str = option(
        "batch",
        "normalisation layers: batch (BatchNorm), group (GroupNorm of two groups, which keeps no "
        "running statistics), none",
        choices=("batch", "group", "none"),
        source="O",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.norm != "batch" and self.batch_norm == "local":
            raise UserError(
                f"model.batch_norm = local: with model.norm = {self.norm} there is no BatchNorm to "
                f"keep; leave one of the two out"
            )


@dataclass(frozen=True, kw_only=True)
class FederationSettings(Section):
    method: str = option("semanticfl", "federated method", choices=METHODS)
    rounds: int = option(50, "number of communication rounds", low=1, source="N")
    clients_per_round: int = option(5, "clients sampled per round", low=1, source="N")
    local_epochs: int = option(10, "local epochs per round", low=1, source="N")
    batch_size: int = option(64, "batch size", low=1, source="S")
    optimizer: str = option(
        "sgd",
        "client optimizer; starts afresh with every client and round",
        choices=("sgd", "nesterov", "adam", "adamw"),
        source="N",
    )
    learning_rate: float = option(
        0.01, "client learning rate; adam and adamw: 0.001 by default", above=0.0, source="N"
    )
    schedule: str = option(
        "constant", "learning rate over the rounds", choices=tuple(SCHEDULES), source="N"
    )
    decay: float = option(
        0.0,
        "factor on the learning rate, in every round (exponential) or every decay_rounds rounds "
        "(step); 0: the schedule's default (exponential 0.998, step 0.1)",
        low=0.0,
        high=1.0,
        source="exponential: Seo et al. 2024",
    )
    decay_rounds: int = option(
        0, "rounds between two steps, or until a cosine ends at 0", low=0, unit="rounds"
    )
    momentum: float = option(
        0.9,
        "momentum of sgd and nesterov, beta_1 of adam and adamw",
        low=0.0,
        high=0.9999,
        source="N",
    )
    beta_2: float = option(
        0.999, "beta_2 of adam and adamw", low=0.0, high=0.999999, source="Kingma and Ba 2015"
    )
    weight_decay: float = option(
        1e-5, "weight decay; part of the gradient except with adamw", low=0.0, source="N"
    )
    aggregation: str = option(
        "mean",
        "aggregation of the clients' models: weighted mean; or, unweighted and robust, median or "
        "trimmed-mean of every parameter, or multi-krum (mean of the models nearest to each other)",
        choices=("mean", "median", "trimmed-mean", "multi-krum"),
    )
    server_optimizer: str = option(
        "none",
        "optimizer that turns the clients' average into the next global model: fedavgm (momentum), "
        "fedadam (Adam)",
        choices=("none", "fedavgm", "fedadam"),
    )
    non_finite: str = option(
        "stop",
        "reaction to a client that returns NaN or infinity: stop the run or drop the client from "
        "the round",
        choices=("stop", "drop"),
    )

    def __post_init__(self):
        super().__post_init__()
        check_schedule(self)
        if self.optimizer == "nesterov" and self.momentum == 0:
            raise UserError(
                "federation.optimizer = nesterov needs federation.momentum above 0; without "
                "momentum use sgd"
            )


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Section):
    """Settings of the server: its optimizers, trimming (trimmed-mean, multi-krum) and clipping."""

    learning_rate: float = option(
        0.0,
        "server learning rate eta; 0: the optimizer's default (fedavgm 1, fedadam 0.01)",
        low=0.0,
        source="Hsu et al. 2019; Reddi et al. 2021",
    )
    momentum: float = option(
        0.9,
        "beta of fedavgm, beta_1 of fedadam",
        low=0.0,
        high=0.9999,
        source="Hsu et al. 2019; Reddi et al. 2021",
    )
    beta_2: float = option(
        0.99, "beta_2 of fedadam", low=0.0, high=0.999999, source="Reddi et al. 2021"
    )
    tau: float = option(
        1e-3, "tau of fedadam, added to the square root", above=0.0, source="Reddi et al. 2021"
    )
    trim: float = option(
        0.2,
        "share of clients that trimmed-mean removes at each end, or multi-krum takes for hostile",
        low=0.0,
        high=0.4999,
        source="O",
    )
    clip_norm: float = option(
        0.0,
        "largest norm of a client's update; longer ones are scaled down to it; 0: no bound",
        low=0.0,
        source="Sun et al. 2019: no general value",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    seed: int = option(0, "seed for all random generators", low=0, high=2**31 - 1)
    precision: str = option(
        "auto",
        "training precision; auto: bf16 where the processor supports it natively",
        choices=("auto", "fp32", "bf16"),
    )
    threads: int = option(
        1, "CPU threads per client (affects last bits); 0: torch's default", low=0, high=1024
    )
    replicas: int = option(0, "clients trained side by side; 0: as many as fit", low=0)
    device: str = option("auto", "device; auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    checkpoint_every: int = option(1, "rounds between checkpoints", low=1)
    evaluate_every: int = option(1, "rounds between evaluations; divides the rounds", low=1)
    patience: int = option(
        0,
        "evaluations without a better validation accuracy after which a run stops; its best model "
        "is kept; 0: never",
        low=0,
    )
    init: str = option(
        "",
        "run folder, or file with a state dict (.safetensors, .pt), whose model the run starts "
        "from; empty: random weights",
    )


def _default_method_settings() -> Mapping[str, Section]:
    entries = METHODS.entries.items()
    return MappingProxyType({name: entry.settings() for name, entry in entries if entry.settings})


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. `methods`: method name -> its own settings, of every method."""

    data: DataSettings = field(default_factory=DataSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    anchors: AnchorsSettings = field(default_factory=AnchorsSettings)
    model: ModelSettings = ModelSettings()
    federation: FederationSettings = FederationSettings()
    server: ServerSettings = ServerSettings()
    run: RunSettings = RunSettings()
    methods: Mapping[str, Section] = field(default_factory=_default_method_settings)

    def __post_init__(self):
        optimizer, method = self.federation.optimizer, self.federation.method
        if (allowed := METHODS.entries[method].optimizers) and optimizer not in allowed:
            raise UserError(
                f"federation.optimizer = {optimizer}: the arithmetic of {method} holds for "
                f"{' and '.join(allowed)} only; choose it, or another method"
            )
        sampled, clients = self.federation.clients_per_round, self.partition.clients
        if sampled > clients:
            raise UserError(
                f"federation.clients_per_round = {sampled} exceeds partition.clients = {clients}: "
                f"lower --clients-per-round or raise --clients"
            )
        if self.data.clients_from and self.partition.scenario != "natural":
            raise UserError(
                f"data.clients_from = {self.data.clients_from} has no effect on scenario "
                f"{self.partition.scenario}: add --scenario natural, or leave it out"
            )
        rounds, every = self.federation.rounds, self.run.evaluate_every
        if rounds % every:
            raise UserError(
                f"federation.rounds = {rounds} is no multiple of run.evaluate_every = {every}: the "
                f"last round would not be evaluated; use {rounds - rounds % every + every} rounds"
            )
        rule, hostile = self.federation.aggregation, trimmed_clients(self.server.trim, sampled)
        if rule == "multi-krum" and sampled < 2 * hostile + 3:
            raise UserError(
                f"multi-krum bears {(sampled - 3) // 2} hostile clients of "
                f"federation.clients_per_round = {sampled}, server.trim = {self.server.trim} asks "
                f"for {hostile}: raise --clients-per-round, or lower server.trim"
            )
        if rule in ("trimmed-mean", "multi-krum") and hostile < 1:
            raise UserError(
                f"server.trim = {self.server.trim} of federation.clients_per_round = {sampled} "
                f"removes no client: raise --clients-per-round, raise server.trim to at least "
                f"{1 / sampled:.3g}, or use --set federation.aggregation=median"
            )

    @property
    def method(self) -> Section | None:
        """The settings of the method in use."""
        return self.methods.get(self.federation.method)

    @property
    def sections(self) -> dict[str, Section]:
        """name -> section, in the order of declaration."""
        general = {name: section for name, section in vars(self).items() if name != "methods"}
        return {**general, **self.methods}


def trimmed_clients(share: float, clients: int) -> int:
    """How many clients are removed at each end: floor(share * clients), where 0.29 * 100 is 29."""
    return math.floor(round(share * clients, 9))


def setting_fields() -> dict[str, dataclasses.Field]:
    """Dotted name -> field of every setting, in the order of declaration."""
    return {
        f"{section}.{f.name}": f
        for section, values in Config().sections.items()
        for f in dataclasses.fields(values)
    }


def from_flat(values: Mapping[str, object]) -> Config:
    """A configuration from dotted names; strings are converted to the field's type.

    Raises:
        UserError: an unknown name (the nearest is suggested), a wrong type, a value out of range.
    """
    fields = setting_fields()
    given = defaultdict(dict)
    for name, value in values.items():
        if name not in fields:
            raise unknown_setting(name, fields)
        section, _, key = name.partition(".")
        given[section][key] = convert(name, fields[name], value)
    made = {name: type(default)(**given[name]) for name, default in Config().sections.items()}
    by_method = {name: made.pop(name) for name in METHODS if name in made}
    return Config(**made, methods=MappingProxyType(by_method))


def to_flat(config: Config) -> dict[str, object]:
    """Dotted name -> value of every setting, in the order of declaration."""
    return {
        f"{section}.{key}": value
        for section, values in config.sections.items()
        for key, value in vars(values).items()
    }
