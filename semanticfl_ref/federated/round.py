"""One round of federated learning on one screen: server, clients, server, server.

Letters: K clients in the round, M clients in all, P entries of a row, C classes.
"""

from dataclasses import replace

import torch

from semanticfl_ref.errors import NonFiniteError
from semanticfl_ref.federated.aggregation import Aggregator, server_step
from semanticfl_ref.federated.client import train_client
from semanticfl_ref.federated.evaluation import evaluate
from semanticfl_ref.federated.flat import load_row, to_row
from semanticfl_ref.federated.ledger import RoundLedger, drift
from semanticfl_ref.federated.methods import METHODS
from semanticfl_ref.federated.methods.method import Participants, Visit
from semanticfl_ref.federated.state import FederatedState
from semanticfl_ref.federated.world import World
from semanticfl_ref.randomness import generator


def play_round(state: FederatedState, world: World) -> tuple[FederatedState, dict]:
    """Play one round: the next state, and one line of metrics.

    Raises:
        NonFiniteError: a client came back with NaN or infinity and `federation.non_finite` is
            "stop", or all did.
    """
    options, model, round = world.config.federation, world.model, state.round + 1
    method, ledger = METHODS[options.method], RoundLedger(world, state)
    # The round writes copies: whatever stops it, the state before it is whole.
    batch_norm, memory = (
        state.batch_norm.clone(),
        {name: rows.clone() for name, rows in state.memory.items()},
    )

    # 1. Server: choose the round's clients; hand each the global row, and its anchors the first
    # time.
    everyone_M = torch.randperm(
        world.config.partition.clients, generator=generator(world.config.run.seed, "clients", round)
    )
    chosen_K = sorted(everyone_M[: options.clients_per_round].tolist())
    weights_K = method.weights(participants(world, chosen_K))
    returned = average = new_aggregator(world, state)

    for client, weight in zip(chosen_K, weights_K.tolist(), strict=True):
        # 2. Client: load the global row, train locally, return a row.
        visit = Visit(
            world=world,
            client=client,
            round=round,
            start_P=with_own_batch_norm(state, world, client),
            memory=state.memory,
        )
        load_row(model, visit.start_P)
        report = train_client(visit)
        row_P = to_row(model)
        ledger.count(client, report)

        # 3. Server: add the client's row to the weighted average, and to what the method keeps.
        if bool(torch.isfinite(torch.as_tensor(report.loss))) and returned.add(
            client, row_P, weight
        ):
            method.remember(memory, visit, row_P, report)
            if len(batch_norm):
                batch_norm[client] = row_P[world.layout.batch_norm]
        elif options.non_finite == "stop":
            raise NonFiniteError(
                f"round {round}, client {client}: {ledger.culprit(report)} became NaN or infinite. Lower federation.learning_rate, or set federation.non_finite=drop"
            )
        else:
            ledger.dropped.append(client)
    if not returned.weight:
        raise NonFiniteError(
            f"round {round}: every client that has a weight returned NaN or infinity. Lower federation.learning_rate"
        )
    others = method.choose(world, memory, returned.clients, round)
    if others is not None:
        average = new_aggregator(world, state)
        for client, row_P, weight in others:
            average.add(client, row_P.to(world.device), weight)
    served = state.served.index_fill(
        0, torch.tensor(chosen_K), True
    )  # their anchors went out with the row
    state = replace(
        state,
        round=round,
        row=server_step(world.config, world.layout, memory, state.row, average.finish()),
        served=served,
        batch_norm=batch_norm,
        memory=memory,
    )

    # 4. Server: evaluate the new global row, and write one line of metrics.
    load_row(model, state.row)
    return state, {
        "round": round,
        "clients": chosen_K,
        **evaluate(model, world),
        **ledger.line(),
        "drift": drift(chosen_K, returned, average),
    }


def with_own_batch_norm(state: FederatedState, world: World, client: int) -> torch.Tensor:
    """The global row [P]; under the policy "local" with the client's own BatchNorm entries in it."""
    if not len(state.batch_norm):
        return state.row
    row_P = state.row.clone()
    row_P[world.layout.batch_norm] = state.batch_norm[client]
    return row_P


def participants(world: World, clients: list[int]) -> Participants:
    """The round's clients as the server weighs them."""
    counts_K = torch.tensor([world.partition.sizes[k] for k in clients])
    return Participants(
        config=world.config,
        counts_K=counts_K,
        histograms_KC=torch.tensor([world.partition.histograms[k] for k in clients]),
    )


def new_aggregator(world: World, state: FederatedState) -> Aggregator:
    """An empty aggregator of the configured rule. Norms of updates are over what descends and comes
    from the global row: no running averages, no entries of a client's own."""
    apart = world.layout.batch_norm if len(state.batch_norm) else world.layout.buffers
    return Aggregator(
        state.row, world.config.federation.aggregation, world.config.server.trim, apart
    )
