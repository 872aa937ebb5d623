"""The federated methods of the package and each method's own settings, with published defaults.

The tags of sources are explained in settings.py.
"""

from dataclasses import dataclass

from semanticfl_ref.config.registry import register_method
from semanticfl_ref.config.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class SemanticFLSettings(Section):
    """The paper's ablations: lambda_kd = 0 is "without visual anchors", lambda_con = 0 "without
    text anchors"; `anchors.levels` selects the VAE alone, the U-Net alone, or both."""

    lambda_kd: float = option(
        1.0, "weight of the consistency with the visual anchors", low=0.0, source="S"
    )
    lambda_con: float = option(
        0.02, "weight of the contrast with the text anchors", low=0.0, source="O; S: 0.01"
    )
    tau: float = option(0.05, "temperature of the contrast", low=0.005, high=10.0, source="S")
    consistency: str = option(
        "kl-unit",
        "form of the consistency: kl-unit (KL between softmaxes of unit vectors), kl-raw (of the "
        "vectors as they are), cosine (1 - cosine similarity)",
        choices=("kl-unit", "kl-raw", "cosine"),
        source="S",
    )
    kd_temperature: float = option(
        0.1,
        "temperature of the consistency's softmaxes; at 1, unit vectors give a negligible gradient",
        above=0.0,
        source="O",
    )
    kd_squared: bool = option(
        False,
        "multiply the KL divergence by the square of its temperature, which takes the effect of a "
        "low temperature away again",
        source="O",
    )
    visual_head: bool = option(
        True,
        "linear map from features to the space of the visual anchors; without it, the widths must "
        "be equal",
        source="O",
    )
    mu: float = option(0.0, "weight mu of FedProx's proximal term beside them", low=0.0, source="O")


@dataclass(frozen=True, kw_only=True)
class FedProxSettings(Section):
    mu: float = option(
        0.01,
        "weight mu of the proximal term; 0 is FedAvg",
        low=0.0,
        source="Li et al. 2020: tuned in 0.001 ... 1",
    )


@dataclass(frozen=True, kw_only=True)
class ScaffoldSettings(Section):
    control_scale: float = option(
        1.0,
        "factor of the correction c - c_i; 0 is FedAvg, and no control variates are kept",
        low=0.0,
        high=1.0,
        source="Karimireddy et al. 2020: 1",
    )
    steps: str = option(
        "effective",
        "K in the update of the control variates with scaffold.place = gradient: effective (steps "
        "of plain SGD that move as far) or made (literally the number of steps; with momentum, "
        "control variates are too large and the run may diverge)",
        choices=("effective", "made"),
        source="O",
    )
    place: str = option(
        "gradient",
        "where the correction is added: to the gradient, inside momentum, as published for plain "
        "SGD; or to the step, after momentum, where K is the number of steps made",
        choices=("gradient", "step"),
        source="O",
    )


@dataclass(frozen=True, kw_only=True)
class MoonSettings(Section):
    mu: float = option(
        1.0,
        "weight mu of the model-contrastive term; 0 is FedAvg",
        low=0.0,
        source="Li et al. 2021: tuned in 0.1 ... 10",
    )
    tau: float = option(
        0.5, "temperature tau of the cosine similarities", low=0.005, source="Li et al. 2021"
    )
    projection: int = option(
        256,
        "output width of the projection head; 0 contrasts the features themselves",
        low=0,
        high=4096,
        source="Li et al. 2021",
    )


@dataclass(frozen=True, kw_only=True)
class FedRCLSettings(Section):
    contrast: float = option(
        1.0, "weight of the supervised contrast", low=0.0, source="Seo et al. 2024"
    )
    beta: float = option(
        1.0, "weight beta of the divergence penalty", low=0.0, source="Seo et al. 2024"
    )
    tau: float = option(
        0.05, "temperature tau of the cosine similarities", low=0.005, source="Seo et al. 2024"
    )
    threshold: float = option(
        0.7,
        "cosine similarity lambda above which two images of one class are pushed apart",
        low=-1.0,
        high=1.0,
        source="Seo et al. 2024",
    )
    positives: int = option(
        1,
        "hardest positives (same class, least similar) per image",
        low=1,
        source="Seo et al. 2024",
    )
    negatives: int = option(
        2,
        "hardest negatives (other classes, most similar) per image",
        low=1,
        source="Seo et al. 2024",
    )


@dataclass(frozen=True, kw_only=True)
class FedDiscoSettings(Section):
    a: float = option(
        0.5,
        "factor a by which a client's label discrepancy lowers its aggregation weight",
        low=0.0,
        source="Ye et al. 2023",
    )
    b: float = option(0.1, "constant b added to every aggregation weight", source="Ye et al. 2023")


@dataclass(frozen=True, kw_only=True)
class FedCDASettings(Section):
    memory: int = option(
        3,
        "K, recent models that the server keeps per client; 1 is FedAvg",
        low=1,
        high=16,
        source="Wang et al. 2024",
    )
    batches: int = option(
        3,
        "B, groups into which a round's clients are split for the selection of models",
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
        50, "first rounds, in which FedAvg's average is taken", low=0, source="Wang et al. 2024"
    )
    absent: str = option(
        "remembered",
        "clients that are not sampled in a round: averaged with their last selected model "
        "(remembered), or left out",
        choices=("remembered", "left-out"),
        source="Wang et al. 2024",
    )
    weights: str = option(
        "even",
        "weights of the selected models: even, or their clients' numbers of images",
        choices=("even", "images"),
        source="Wang et al. 2024",
    )


@dataclass(frozen=True, kw_only=True)
class FedDifRCSettings(Section):
    lambda_noise: float = option(
        1.0, "weight of the consistency with noise-driven features", low=0.0, source="N"
    )
    lambda_text: float = option(
        1.0, "weight of the contrast with text-driven features", low=0.0, source="N"
    )
    keys: str = option(
        "per-image",
        "text-driven keys: per-image (the image's U-Net features under every class's caption, one "
        "pass each), class-mean (a key per class, from anchors.text_images images of it)",
        choices=("per-image", "class-mean"),
        source="N",
    )
    tau: float = option(0.04, "temperature tau of the contrast", low=0.005, high=10.0, source="N")
    consistency: str = option(
        "l2",
        "form of the consistency between unit vectors: l2 (squared distance, as in the paper), kl "
        "(KL between softmaxes, as in the public code)",
        choices=("l2", "kl"),
        source="N",
    )
    temperature: float = option(
        1.0,
        "temperature of kl's softmaxes; 1, as in the public code, gives a negligible gradient",
        above=0.0,
        source="N",
    )


PACKAGE = "semanticfl_ref.federated.methods"
register_method("fedavg", f"{PACKAGE}.fedavg:FEDAVG")
register_method("semanticfl", f"{PACKAGE}.semanticfl:SEMANTICFL", SemanticFLSettings)
register_method("fedprox", f"{PACKAGE}.fedprox:FEDPROX", FedProxSettings)
# Control variates are gradients only where a step is the learning rate times a gradient.
register_method("scaffold", f"{PACKAGE}.scaffold:SCAFFOLD", ScaffoldSettings, optimizers=("sgd",))
register_method("moon", f"{PACKAGE}.moon:MOON", MoonSettings)
register_method("fedrcl", f"{PACKAGE}.fedrcl:FEDRCL", FedRCLSettings)
register_method("feddisco", f"{PACKAGE}.feddisco:FEDDISCO", FedDiscoSettings)
register_method("fedcda", f"{PACKAGE}.fedcda:FEDCDA", FedCDASettings)
register_method(
    "feddifrc",
    f"{PACKAGE}.feddifrc:FEDDIFRC",
    FedDifRCSettings,
    preset={
        "anchors.text": "unet",
        "anchors.levels": "unet",
        "anchors.whiten": False,
        "diffusion.pooling": "norm",
        "diffusion.timestep": 300,
    },
)
