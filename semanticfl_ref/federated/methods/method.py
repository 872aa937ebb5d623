"""What a federated method is: a handful of functions, each with FedAvg's behaviour as its default.

Letters: B batch, C classes, D feature width, K clients in the round, M clients in all, P entries of
    a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from semanticfl_ref.config import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.flat import beside_parameters

Terms = dict[str, tuple[float, torch.Tensor]]  # name -> (weight, unweighted value)
Memory = dict[
    str, torch.Tensor
]  # what outlives a round, by name: rows, mostly; on the CPU, since it may be M times the model


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One client's turn in one round, from the moment it has received the model.

    Attributes:
        world: the run's constants (see world.py).
        client, round: which client, in which round.
        start_P: float32 [P], the row received.
        memory: what the method keeps, as it was before the round: nothing of this round's other
            clients is in it.
    """

    world: object
    client: int
    round: int
    start_P: torch.Tensor
    memory: Memory

    @property
    def config(self) -> Config:
        return self.world.config

    @cached_property
    def parameters(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The model's parameters, each with its value on arrival."""
        return beside_parameters(self.world.model, self.start_P)


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What a local term may look at: one batch of one client, after the model's forward pass.

    Attributes:
        model: the client's model in training.
        features_BD: float32 [B, D].
        levels: float32 [B, width] of every level, for a method with `needs_levels`; else empty.
        frozen: name -> (model, its features [B, D] of the same images), for each row of the
            method's `frozen`.
        labels_B: int64 [B].
        visual_BD: float32 [B, width of a visual anchor], this batch's anchors; None for a method or
            a client without.
        text_CD: float32 [C, width of a text anchor]; None for a method or a client without.
    """

    visit: Visit
    model: nn.Module
    features_BD: torch.Tensor
    levels: tuple[torch.Tensor, ...]
    frozen: dict[str, tuple[nn.Module, torch.Tensor]]
    labels_B: torch.Tensor
    visual_BD: torch.Tensor | None
    text_CD: torch.Tensor | None

    @property
    def config(self) -> Config:
        return self.visit.config


@dataclass(frozen=True, kw_only=True)
class Participants:
    """The clients of a round, as the server weighs them. counts_K: int64 [K], images;
    histograms_KC: int64 [K, C], images of each class.
    """

    config: Config
    counts_K: torch.Tensor
    histograms_KC: torch.Tensor


def by_sample_count(participants: Participants) -> torch.Tensor:
    """Clients count by their images.

    Equation (sample-count) [S; FedAvg, Alg. 1]: w_k = n_k
    Test: tests/federated/test_method_equations.py::test_fedavg_weighs_by_images
    """
    return participants.counts_K.double()


def no_heads(config: Config, anchors: Anchors | None, features: int) -> dict[str, int]:
    """No head: features go to the classifier alone."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated method; every default is FedAvg's.

    Attributes, each a function unless said otherwise:
        keeps, remember: the rows it keeps across rounds: what they are at the start (from
            configuration and initial row), and how a finished visit changes them (the copy that the
            round is writing, the visit, the client's row, its report; in place).
        local_terms: what it adds to the client's cross-entropy.
        correction: a row [P] added to every gradient of a visit, or None.
        weights: the aggregation weights [K], not normalised.
        choose: (world, the memory that the round is writing, clients that returned, round) -> other
            rows to average than the round's own, as (client, row [P], weight) in ascending client
            number; or None.
        heads: the model's heads besides the classifier, as arguments of ResNet10: width by name.
        frozen: rows with which a second, frozen model looks at each batch, by name.
        needs_anchors: whether the server makes and sends anchors. A bool.
        reads_anchors: (configuration) -> whether a client needs its visual anchors, and the texts,
            for the ledger; those of a term of weight zero are not sent.
        needs_levels: whether local terms look at every level's features. A bool.
        control_rows: (configuration) -> rows of parameters that travel beside the model, each way,
            for the ledger.
    """

    keeps: Callable[[Config, torch.Tensor], Memory] = lambda config, row_P: {}
    remember: Callable[[Memory, Visit, torch.Tensor, object], None] = (
        lambda memory, visit, row_P, report: None
    )
    local_terms: Callable[[LocalBatch], Terms] = lambda batch: {}
    correction: Callable[[Visit], torch.Tensor | None] = lambda visit: None
    weights: Callable[[Participants], torch.Tensor] = by_sample_count
    choose: Callable[
        [object, Memory, list[int], int], list[tuple[int, torch.Tensor, float]] | None
    ] = lambda world, memory, clients, round: None
    heads: Callable[[Config, Anchors | None, int], dict[str, int]] = no_heads
    frozen: Callable[[Visit], dict[str, torch.Tensor]] = lambda visit: {}
    needs_anchors: bool = False
    reads_anchors: Callable[[Config], tuple[bool, bool]] = lambda config: (True, True)
    needs_levels: bool = False
    control_rows: Callable[[Config], int] = lambda config: 0
