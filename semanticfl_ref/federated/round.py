"""One round of federated learning on one screen: server, clients, server, server.

Letters: K clients in the round, M clients in all, P entries of a row, C classes.
"""

from dataclasses import replace

import torch

from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated.aggregation import Aggregator
from semanticfl_ref.federated.client import train_client
from semanticfl_ref.federated.evaluation import evaluate
from semanticfl_ref.federated.flat import load_row, to_row
from semanticfl_ref.federated.ledger import RoundLedger
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.state import FederatedState
from semanticfl_ref.federated.world import World
from semanticfl_ref.randomness import generator


def play_round(state: FederatedState, world: World) -> tuple[FederatedState, dict]:
    """Play one round: the next state, and one line of metrics.

    Raises:
        NonFiniteError: a client came back with NaN or infinity and `federation.non_finite` is "stop", or all did.
    """
    options, model, round = world.config.federation, world.model, state.round + 1
    method, ledger = METHODS[options.method], RoundLedger(world, state)
    batch_norm = state.batch_norm.clone()

    # 1. Server: choose the round's clients; hand each the global row, and its anchors the first time.
    everyone_M = torch.randperm(world.config.partition.clients, generator=generator(world.config.run.seed, "clients", round))
    chosen_K = sorted(everyone_M[: options.clients_per_round].tolist())
    weights_K = method.weights(torch.tensor([len(world.partition.indices[k]) for k in chosen_K]))
    average = Aggregator(world.layout.entries, world.device)

    for client, weight in zip(chosen_K, weights_K.tolist(), strict=True):
        # 2. Client: load the global row, train locally, return a row.
        load_row(model, with_own_batch_norm(state, world, client))
        report = train_client(world, model, client, round)
        row_P = to_row(model)
        ledger.count(client, report)

        # 3. Server: add the client's row to the weighted average.
        if bool(torch.isfinite(row_P).all()) and bool(torch.isfinite(torch.as_tensor(report.loss))):
            average.add(client, row_P, weight)
            if len(batch_norm):
                batch_norm[client] = row_P[world.layout.batch_norm]
        elif options.non_finite == "stop":
            raise NonFiniteError(f"round {round}, client {client}: {ledger.culprit(report)} became NaN or infinite. Lower federation.learning_rate, or set federation.non_finite=drop")
        else:
            ledger.dropped.append(client)
    if not average.clients:
        raise NonFiniteError(f"round {round}: every client returned NaN or infinity. Lower federation.learning_rate")
    served = state.served.clone()
    served[chosen_K] = True
    state = replace(state, round=round, row=average.finish(), served=served, batch_norm=batch_norm)

    # 4. Server: evaluate the new global row, and write one line of metrics.
    load_row(model, state.row)
    return state, {"round": round, "clients": chosen_K, **evaluate(model, world), **ledger.line()}


def with_own_batch_norm(state: FederatedState, world: World, client: int) -> torch.Tensor:
    """The global row [P]; under the policy "local" with the client's own BatchNorm entries in it."""
    if not len(state.batch_norm):
        return state.row
    return state.row.index_copy(0, world.layout.batch_norm, state.batch_norm[client])
