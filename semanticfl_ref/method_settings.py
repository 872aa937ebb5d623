"""Each federated method's own settings, and the server optimiser's: symbols and defaults as
published. Tags of sources: see config.py.
"""

from dataclasses import dataclass

from semanticfl_ref.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class Semantic(Section):
    """SemanticFL's two terms. Its ablation: no visual anchor is lambda_kd = 0, no text anchor
    lambda_con = 0; which of the diffusion model's layers make the visual anchor (the VAE's latents
    alone, the U-Net alone) is `diffusion.taps`."""

    lambda_kd: float = option(
        1.0, "weight of the consistency with the visual anchor", low=0.0, source="S"
    )
    lambda_con: float = option(
        0.01, "weight of the contrast with the text anchors", low=0.0, source="S"
    )
    tau: float = option(0.05, "temperature of the contrast", low=0.005, high=10.0, source="S")
    consistency: str = option(
        "kl-unit",
        "kl-unit: KL of softmaxes of unit vectors; kl-raw: of raw features; cosine: 1 - cosine",
        choices=("kl-unit", "kl-raw", "cosine"),
        source="S",
    )
    kd_temperature: float = option(
        0.1,
        "temperature of the consistency's softmaxes; 1 on unit vectors is inert (0.002 nats)",
        above=0.0,
        source="O",
    )
    kd_squared: bool = option(
        True,
        "multiply the KL by the square of its temperature, so that its gradient keeps its scale",
        source="O",
    )
    visual_head: bool = option(
        True,
        "linear map from features to the visual anchors' space; without it their widths must agree",
        source="O",
    )


@dataclass(frozen=True, kw_only=True)
class FedProx(Section):
    mu: float = option(
        0.01,
        "mu, weight of the proximal term; 0 = FedAvg",
        low=0.0,
        source="Li et al. 2020: tuned in 0.001 ... 1",
    )


@dataclass(frozen=True, kw_only=True)
class Scaffold(Section):
    control_scale: float = option(
        1.0,
        "factor of the correction c - c_i; 0 = FedAvg, and no control is kept",
        low=0.0,
        high=1.0,
        source="Karimireddy et al. 2020: 1",
    )
    steps: str = option(
        "effective",
        "K of the controls' update: made = the SGD steps made; effective = these with momentum counted in, the same without momentum",
        choices=("effective", "made"),
        source="O",
    )


@dataclass(frozen=True, kw_only=True)
class Moon(Section):
    mu: float = option(
        1.0,
        "mu, weight of the model-contrastive term; 0 = FedAvg",
        low=0.0,
        source="Li et al. 2021: tuned in 0.1 ... 10",
    )
    tau: float = option(0.5, "tau, temperature of the cosines", low=0.005, source="Li et al. 2021")
    projection: int = option(
        256,
        "entries behind the projection head; 0 = contrast the features themselves",
        low=0,
        high=4096,
        source="Li et al. 2021",
    )


@dataclass(frozen=True, kw_only=True)
class FedRCL(Section):
    contrast: float = option(
        1.0, "weight of the supervised contrast", low=0.0, source="Seo et al. 2024"
    )
    beta: float = option(
        1.0, "beta, weight of the divergence penalty", low=0.0, source="Seo et al. 2024"
    )
    tau: float = option(
        0.05, "tau, temperature of the similarities", low=0.005, source="Seo et al. 2024"
    )
    threshold: float = option(
        0.7,
        "lambda, similarity from which a pair of one class is driven apart",
        low=-1.0,
        high=1.0,
        source="Seo et al. 2024",
    )
    positives: int = option(
        1,
        "least similar images of the own class that an image is drawn to",
        low=1,
        source="Seo et al. 2024",
    )
    negatives: int = option(
        2,
        "most similar images of other classes that an image is driven from",
        low=1,
        source="Seo et al. 2024",
    )


@dataclass(frozen=True, kw_only=True)
class FedDisco(Section):
    a: float = option(
        0.5,
        "a, how much a client's discrepancy lowers its weight",
        low=0.0,
        source="Ye et al. 2023",
    )
    b: float = option(0.1, "b, added to every client's weight", source="Ye et al. 2023")


@dataclass(frozen=True, kw_only=True)
class FedCDA(Section):
    memory: int = option(
        3,
        "K, models that the server keeps of each client; 1 = nothing outlives a round, FedAvg",
        low=1,
        high=16,
        source="Wang et al. 2024",
    )
    batches: int = option(
        3,
        "B, groups in which a round's clients are chosen for, one after another",
        low=1,
        source="Wang et al. 2024",
    )
    smoothness: float = option(
        1.0,
        "L, weight of the divergence against the local losses",
        low=0.0,
        source="Wang et al. 2024",
    )
    warm_up: int = option(
        50, "first rounds, averaged as by FedAvg", low=0, source="Wang et al. 2024", unit="rounds"
    )
    absent: str = option(
        "remembered",
        "clients that sit out a round: averaged by the model chosen last, or left out",
        choices=("remembered", "left-out"),
        source="Wang et al. 2024",
    )


@dataclass(frozen=True, kw_only=True)
class FedDifRC(Section):
    lambda_noise: float = option(
        1.0, "weight of the consistency with the image's noise-driven features", low=0.0, source="N"
    )
    lambda_text: float = option(
        1.0, "weight of the contrast with every class's text-driven features", low=0.0, source="N"
    )
    tau: float = option(0.04, "tau, temperature of the contrast", low=0.005, high=10.0, source="N")
    temperature: float = option(
        1.0,
        "of the consistency's softmaxes; the published 1 is next to inert",
        above=0.0,
        source="N",
    )


@dataclass(frozen=True, kw_only=True)
class Server(Section):
    """What `federation.server_optimizer` makes of the average, and what `federation.aggregation =
    trimmed-mean` cuts.
    """

    learning_rate: float = option(
        0.0,
        "eta; 0 = the optimiser's own: 1 for fedavgm, 0.01 for fedadam",
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
        "beta, share of clients that trimmed-mean cuts at each end of every entry",
        low=0.0,
        high=0.4999,
        source="O",
    )
