"""MOON: a client's features are pulled to those of the model it received and pushed from those of
its own previous model.

    l     = l_sup + mu l_con
    l_con = -log  exp(sim(z, z_glob) / tau)
                  / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau))

Source: Li, He, Song: Model-Contrastive Federated Learning. CVPR 2021, Eqs. 3-4, Algorithm 1; sim is
the cosine similarity, tau = 0.5, with a projection head of two layers and 256 outputs; mu = 5, 1, 1
for CIFAR-10, CIFAR-100, Tiny-ImageNet, of 0.1 ... 10 tried. The two reference models run in
evaluation mode, as in the authors' code; before a client's first round, its previous model is the
initial one.

Choice: the head is a branch: the classifier reads the features, so that mu = 0 is FedAvg, bitwise;
the authors' classifier follows the head. moon.projection = 0 contrasts the features
themselves. In round one z_glob = z_prev, so the term is log 2 and its gradient zero. A large mu
holds the model at the one received. Each step costs two more forward passes, and the server keeps M
models.

Letters: B batch, D width of the contrast, M clients in all, P size of a flat vector.
"""

import torch
import torch.nn.functional as F

from semanticfl_ref.config.settings import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.methods.method import (
    LocalBatch,
    LocalUpdate,
    Method,
    MethodState,
    Terms,
)

PREVIOUS = "moon.previous"


def projection_head(config: Config, anchors: Anchors | None, features: int) -> dict[str, int]:
    """The head towards the space of the contrast."""
    return {"projection_width": config.method.projection}


def previous_models(config: Config, params_P: torch.Tensor) -> MethodState:
    """Each client's previous model [M, P], initially the initial one."""
    if config.method.mu == 0:
        return {}
    return {PREVIOUS: params_P.cpu().repeat(config.partition.clients, 1)}


def keep_model(state: MethodState, update: LocalUpdate, params_P: torch.Tensor, report) -> None:
    """The client's new model becomes its previous one."""
    if update.settings.mu > 0:
        state[PREVIOUS][update.client] = params_P


def received_and_previous(update: LocalUpdate) -> dict[str, torch.Tensor]:
    """The parameters of the two models with which the client's model is compared."""
    if update.settings.mu == 0:
        return {}
    previous_P = update.method_state[PREVIOUS][update.client]
    return {"received": update.start_P, "previous": previous_P}


def model_contrastive_term(batch: LocalBatch) -> Terms:
    """mu * l_con."""
    s = batch.settings
    if s.mu == 0:
        return {}
    received, received_BD = batch.references["received"]
    previous, previous_BD = batch.references["previous"]
    value = model_contrast(
        batch.model.projection_head(batch.features_BD),
        received.projection_head(received_BD),
        previous.projection_head(previous_BD),
        s.tau,
    )
    return {"model_contrast": (s.mu, value)}


def model_contrast(
    z_BD: torch.Tensor, received_BD: torch.Tensor, last_BD: torch.Tensor, tau: float
) -> torch.Tensor:
    """The model-contrastive term, mean over the batch.

    Equation (model-contrast) [MOON, Eq. 3]:
        -log  exp(cos(z, received) / tau)
              / (exp(cos(z, received) / tau) + exp(cos(z, last) / tau))
    Test: tests/federated/test_method_equations.py::test_moon_on_vectors

    Args:
        z_BD: float32 [B, D], of the model in training.
        received_BD, last_BD: float32 [B, D], constants: of the model received and of the client's
            previous one. Equal ones give log 2 and no gradient.
        tau: temperature.

    Source: MOON (Li et al. 2021), Eq. 3.
    """
    toward_B = F.cosine_similarity(z_BD, received_BD, dim=1)
    away_B = F.cosine_similarity(z_BD, last_BD, dim=1)
    return F.softplus((away_B - toward_B) / tau).mean()


MOON = Method(
    init_state=previous_models,
    update_state=keep_model,
    reference_models=received_and_previous,
    local_terms=model_contrastive_term,
    heads=projection_head,
    client_state=(PREVIOUS,),
)
