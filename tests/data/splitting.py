"""A partition by the fields of the section `partition`."""

import torch

from semanticfl_ref.config.settings import PartitionSettings
from semanticfl_ref.data.partition import Partition, make_partition


def split(
    labels: torch.Tensor,
    scenario: str = "nid1",
    *,
    classes: int = 10,
    seed: int = 0,
    minimum: int = 2,
    data_sha256: str = "",
    natural_N: torch.Tensor | None = None,
    client_names: tuple[str, ...] = (),
    **settings,
) -> Partition:
    """`make_partition` with these settings."""
    return make_partition(
        labels,
        PartitionSettings(scenario=scenario, minimum=minimum, **settings),
        classes=classes,
        seed=seed,
        data_sha256=data_sha256,
        natural_N=natural_N,
        client_names=client_names,
    )
