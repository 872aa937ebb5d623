"""The sections `data` and `partition`: which images there are, and which client holds which.

The tags of sources are explained in settings.py.
"""

from dataclasses import dataclass

from semanticfl_ref.config.registry import DATASETS, SCENARIOS
from semanticfl_ref.config.schema import Section, option
from semanticfl_ref.errors import UserError

SMALLEST_IMAGE = 9  # pixels per side: below, the last stage would normalise over a single pixel


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    name: str = option("digit-scenes", "data set", choices=DATASETS)
    dir: str = option(
        "", "your own data, or a local copy of a published data set (empty: download)"
    )
    sha256: str = option(
        "", "SHA-256 of a local file to accept although it differs from the published one"
    )
    image_size: int = option(
        0, "side to which images are resized; 0: as published", low=0, high=512, unit="pixels"
    )
    validation_share: float = option(
        0.0, "share of the training images set aside for tuning", low=0.0, high=0.5
    )
    augment: bool = option(
        True, "random horizontal flips and crops of the training images", source="O"
    )
    class_names: str = option(
        "", "text file with the names of the classes, a line each, instead of the data's own"
    )
    image_column: str = option("", "column of the images of parquet; empty: the only one")
    label_column: str = option(
        "", "column of the labels of parquet; empty: `label`, or the only one"
    )
    clients_from: str = option(
        "",
        "column (parquet) or array (npz) that names each image's client, for --scenario natural; "
        "image_folder: `folder`, for class folders in a folder per client",
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.image_column or self.label_column) and self.name != "parquet":
            raise UserError(
                f"{self.name} has no columns: leave data.image_column, .label_column out"
            )
        if 0 < self.image_size < SMALLEST_IMAGE:
            raise UserError(
                f"data.image_size = {self.image_size}: must be 0 or at least {SMALLEST_IMAGE}, "
                f"since ResNets halve the side three times and a single pixel has no variance"
            )


@dataclass(frozen=True, kw_only=True)
class PartitionSettings(Section):
    scenario: str = option(
        "nid1",
        "how training images are partitioned across clients: iid; nid1, nid2, pathological, "
        "extended (label skew); quantity (size skew); natural (the data's own clients)",
        choices=SCENARIOS,
        source="S",
    )
    alpha: float = option(
        0.2,
        "Dirichlet concentration of nid1, extended and quantity; small values are skewed",
        low=1e-6,
        high=1e6,
        source="S",
    )
    equal_sizes: bool = option(
        False, "nid1 with clients of equal size, as FedDifRC's code has them", source="N"
    )
    classes_per_client: int = option(
        2, "classes per client of pathological and extended", low=1, source="McMahan et al. 2017: 2"
    )
    minimum: int = option(
        2,
        "training images that every client gets at least; short ones get them from the largest "
        "(not with natural)",
        low=2,
        source="O",
    )
    imbalance: float = option(
        1.0,
        "long tail: ratio of the training images of the first class to those of the last; 1: none",
        low=1.0,
        source="N",
    )
    feature_shift: str = option(
        "none",
        "corruption: a fixed image corruption per client, also in the images that make anchors",
        choices=("none", "corruption"),
        source="O",
    )
    modality: str = option(
        "none",
        "mixed: clients receive both kinds of anchors, text only, visual only, or neither, in turn",
        choices=("none", "mixed"),
        source="O",
    )
    file: str = option(
        "",
        "JSON file with the image indices of each client, as `partition show --save` writes it; "
        "replaces the scenario",
    )
    clients: int = option(10, "total number of clients", low=1, high=100_000, source="N")
    held_out_share: float = option(
        0.0, "share of each client's images reserved as its own test set", low=0.0, high=0.5
    )
