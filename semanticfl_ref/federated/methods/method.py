"""What a federated method is: a handful of functions, each with FedAvg's behaviour as its default.

Letters: B batch, C classes, D feature width, K clients of the round, M clients in all, P size of a
flat vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors

if TYPE_CHECKING:
    from semanticfl_ref.federated.context import RunContext
    from semanticfl_ref.federated.report import ClientReport

# name -> (weight, unweighted value)
Terms = dict[str, tuple[float, torch.Tensor]]
# name -> tensor, mostly flat vectors; on the CPU, since it may be M times the model
MethodState = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalUpdate:
    """One client in one round, from the moment it has received the model.

    Attributes:
        context: the constants of the run.
        client, round: which client, in which round.
        start_P: float32 [P], the parameters received.
        method_state: the method's state before the round; nothing of this round is in it.
    """

    context: "RunContext"
    client: int
    round: int
    start_P: torch.Tensor
    method_state: MethodState

    @property
    def config(self) -> Config:
        return self.context.config

    @property
    def settings(self):
        """The method's own settings."""
        return self.config.method


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What a local term may read: one batch of one client, after the forward pass.

    A term may depend on these tensors and on settings, but not on the round or on the client's
    number: on CUDA the step is captured as a graph and replayed with other clients' tensors.

    Attributes:
        update: the client's local update.
        model: the model in training.
        parameters: its parameters, each with the value received.
        features_BD: float32 [B, D].
        levels: float32 [B, width] of every level, for a method with `needs_levels`; else empty.
        references: name -> (reference model, its features [B, D] of the same images).
        labels_B: int64 [B].
        visual_BD: float32 [B, width], this batch's visual anchors; None without.
        text_CD: float32 [C, width], the text anchors, or [B, C, width] with `texts_per_image`; None
            without.
    """

    update: LocalUpdate
    model: nn.Module
    parameters: list[tuple[nn.Parameter, torch.Tensor]]
    features_BD: torch.Tensor
    levels: list[torch.Tensor]
    references: dict[str, tuple[nn.Module, torch.Tensor]]
    labels_B: torch.Tensor
    visual_BD: torch.Tensor | None
    text_CD: torch.Tensor | None

    @property
    def settings(self):
        """The method's own settings."""
        return self.update.settings


class SampledClients(NamedTuple):
    """The clients of a round, as the server weights them.

    Attributes:
        config: the run's configuration.
        histograms_KC: int64 [K, C], training images per class.
    """

    config: Config
    histograms_KC: torch.Tensor

    @property
    def counts_K(self) -> torch.Tensor:
        """int64 [K], training images."""
        return self.histograms_KC.sum(1)


class Payload(NamedTuple):
    """What travels beside the model.

    Attributes:
        visual, text: whether a client needs these anchors, once, if the method has any.
        vectors: vectors of parameters that travel each way in every round.
    """

    visual: bool = True
    text: bool = True
    vectors: int = 0


class SelectedModel(NamedTuple):
    """A model to average instead of a round's own: whose it is, its parameters [P], its weight."""

    client: int
    params_P: torch.Tensor
    weight: float


def by_sample_count(sampled: SampledClients) -> torch.Tensor:
    """Clients are weighted by their number of training images.

    Equation (sample-count) [S; FedAvg, Alg. 1]: w_k = n_k
    Test: tests/federated/test_method_equations.py::test_fedavg_weighs_by_images
    """
    return sampled.counts_K.double()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated method; every default is FedAvg's.

    Attributes:
        init_state: (config, initial parameters [P]) -> the state that is kept across rounds.
        update_state: (state, update, the client's parameters [P], its report) changes the round's
            copy of the state after a local update, in place.
        local_terms: (batch) -> terms that are added to the client's cross-entropy.
        correction: (update) -> a vector [P] that is added to every gradient, or None.
        corrects_step: (config) -> whether it is added after momentum instead, to the direction of
            every step.
        weights: (sampled) -> aggregation weights [K], not normalised.
        select_models: (context, the round's copy of the state, clients that returned, round) ->
            models to average instead of the round's own, in ascending client number; or None.
        heads: (config, anchors, feature width) -> widths of the model's heads besides the
            classifier, as arguments of the model.
        reference_models: (update) -> name -> parameters [P] of frozen models whose features of each
            batch the local terms read.
        payload: (config) -> what travels beside the model.
        client_state: names of the state's tensors [M, ...] of which row k is client k's own. Where
            clients are other machines, each keeps its row.
        sent_state: names of the state's tensors that a client reads besides: they travel to it.
        needs_anchors: whether the server makes anchors.
        texts_per_image: (config) -> whether text anchors are U-Net features of each image under
            every class's caption.
        needs_levels: whether local terms read the features of every level.
        capturable: whether a step with these terms can be captured as a CUDA graph: its operations
            and the shapes of its tensors do not depend on values.
    """

    init_state: Callable[[Config, torch.Tensor], MethodState] = lambda config, params_P: {}
    update_state: Callable[[MethodState, LocalUpdate, torch.Tensor, "ClientReport"], None] = (
        lambda state, update, params_P, report: None
    )
    local_terms: Callable[[LocalBatch], Terms] = lambda batch: {}
    correction: Callable[[LocalUpdate], torch.Tensor | None] = lambda update: None
    corrects_step: Callable[[Config], bool] = lambda config: False
    weights: Callable[[SampledClients], torch.Tensor] = by_sample_count
    select_models: Callable[
        ["RunContext", MethodState, list[int], int], list[SelectedModel] | None
    ] = lambda context, state, clients, round: None
    heads: Callable[[Config, Anchors | None, int], dict[str, int]] = (
        lambda config, anchors, features: {}
    )
    reference_models: Callable[[LocalUpdate], dict[str, torch.Tensor]] = lambda update: {}
    payload: Callable[[Config], Payload] = lambda config: Payload()
    client_state: tuple[str, ...] = ()
    sent_state: tuple[str, ...] = ()
    needs_anchors: bool = False
    texts_per_image: Callable[[Config], bool] = lambda config: False
    needs_levels: bool = False
    capturable: bool = True
