"""MOON: a client's features are drawn to those of the model it received and driven from those of
its own last model.

    l_con = -log  exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) /
    tau)) l = l_sup + mu l_con

Source: Li, He, Song: Model-Contrastive Federated Learning. CVPR 2021, Eqs. 3-4, Algorithm 1; sim is
    the cosine, tau = 0.5, a projection head of
two layers onto 256 entries; mu = 5, 1, 1 for CIFAR-10, CIFAR-100, Tiny-ImageNet, of 0.1 ... 10
tried. The two frozen models run in evaluation mode, as in the authors' code; before a client's
first round its last model is the initial one.

`Choice:` here the head is a branch: its classifier reads the features, so that at mu = 0 this is
FedAvg, bit for bit; the authors' classifier stands behind the head. moon.projection = 0 contrasts
the features themselves. In round one z_glob = z_prev, the term is log 2 and its gradient zero. A
large mu holds the model at the one received. Each step costs two more forward passes, and the
server keeps M rows."""

import torch

from semanticfl_ref.config import Config
from semanticfl_ref.diffusion.anchors import Anchors
from semanticfl_ref.federated.losses import model_contrast
from semanticfl_ref.federated.methods.method import LocalBatch, Memory, Method, Terms, Visit


def projection_head(config: Config, anchors: Anchors | None, features: int) -> dict[str, int]:
    """The head onto the space of the contrast."""
    return {"projection_width": config.moon.projection}


def last_rows(config: Config, row_P: torch.Tensor) -> Memory:
    """Each client's last model [M, P], the initial one at the start."""
    return (
        {"moon.last": row_P.cpu().repeat(config.partition.clients, 1)} if config.moon.mu > 0 else {}
    )


def keep_row(memory: Memory, visit: Visit, row_P: torch.Tensor, report) -> None:
    """The client's new model becomes its last one."""
    if visit.config.moon.mu > 0:
        memory["moon.last"][visit.client] = row_P.cpu()


def received_and_last(visit: Visit) -> dict[str, torch.Tensor]:
    """The rows of the two models that the client's model is compared with."""
    return (
        {"received": visit.start_P, "last": visit.memory["moon.last"][visit.client]}
        if visit.config.moon.mu > 0
        else {}
    )


def model_contrastive_term(batch: LocalBatch) -> Terms:
    """mu * l_con."""
    options = batch.config.moon
    if options.mu == 0:
        return {}
    with torch.no_grad():
        received_BE, last_BE = (_projected(*batch.frozen[name]) for name in ("received", "last"))
    return {
        "model_contrast": (
            options.mu,
            model_contrast(
                _projected(batch.model, batch.features_BD), received_BE, last_BE, options.tau
            ),
        )
    }


def _projected(model, features_BD: torch.Tensor) -> torch.Tensor:
    return features_BD if model.projection_head is None else model.projection_head(features_BD)


MOON = Method(
    keeps=last_rows,
    remember=keep_row,
    frozen=received_and_last,
    local_terms=model_contrastive_term,
    heads=projection_head,
)
