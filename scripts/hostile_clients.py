"""One client of five returns something else than its model: what do rules of aggregation bear?

    ATTACK=opposite python -m semanticfl_ref compare --import scripts/hostile_clients.py \
        --methods "semanticfl,semanticfl[federation.aggregation=median]" --seeds 3

ATTACK is a name of `ATTACKS`; without it all clients are honest. Results: docs/reliability.md.
"""

import os

import torch

from semanticfl_ref.errors import unknown
from semanticfl_ref.federated import replicas
from semanticfl_ref.federated.flat import flatten_params, load_params

# What a hostile client returns, from what it trained and what it had received: float32 [P].
ATTACKS = {
    "honest": lambda own_P, start_P: own_P,
    "nan": lambda own_P, start_P: own_P * float("nan"),
    "infinity": lambda own_P, start_P: own_P * 0 + float("inf"),
    "1e30": lambda own_P, start_P: own_P * 0 + 1e30,
    "opposite": lambda own_P, start_P: start_P - 5 * (own_P - start_P),
    "million": lambda own_P, start_P: start_P + 1e6 * (own_P - start_P),
}


def install(attack: str) -> None:
    """Let clients 2, 7, 12, ... return what `attack` makes of their models."""
    if attack not in ATTACKS:
        raise unknown("attack", attack, ATTACKS)
    honest = replicas.train_client

    def train(update, replica):
        report = honest(update, replica)
        if update.client % 5 == 2:
            with torch.no_grad():
                own_P = flatten_params(replica.model)
                load_params(replica.model, ATTACKS[attack](own_P, update.start_P))
        return report

    replicas.train_client = train


if "ATTACK" in os.environ:
    install(os.environ["ATTACK"])
