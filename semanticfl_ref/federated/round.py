"""One round of federated learning on one screen: server, clients, server, server.

Letters: S clients of a cohort, K clients of the round, M clients in all, P size of a flat vector, Q
entries of BatchNorm layers, C classes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from semanticfl_ref.config.settings import Config
from semanticfl_ref.federated.aggregate import average_selected, cohorts
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.evaluate import evaluate_round
from semanticfl_ref.federated.flat import load_params
from semanticfl_ref.federated.local_optimizer import learning_rate
from semanticfl_ref.federated.methods.method import LocalUpdate, SampledClients
from semanticfl_ref.federated.metrics import Drift, RoundMetrics
from semanticfl_ref.federated.report import ClientReport
from semanticfl_ref.federated.robust import clip_update, robust_aggregate
from semanticfl_ref.federated.server_optimizer import server_step
from semanticfl_ref.federated.state import FederatedState
from semanticfl_ref.kernels.weighted_average import weighted_average
from semanticfl_ref.randomness import generator

# Called after a cohort has trained, with each update, the client's parameters [P] (which the next
# cohort overwrites) and its report.
Observer = Callable[[LocalUpdate, torch.Tensor, ClientReport], None]


def run_round(
    state: FederatedState, context: RunContext, observe: Observer = lambda *_: None
) -> tuple[FederatedState, dict]:
    """Run one round; returns the state after it, and one line of metrics.

    Raises:
        NonFiniteError: a client returned NaN or infinity and `federation.non_finite` is stop, or
            every client with a weight did.
    """
    config, method, layout = context.config, context.method, context.layout
    rule, metrics = config.federation.aggregation, RoundMetrics(context, state.anchors_sent)
    excluded = layout.batch_norm if len(state.batch_norm) else layout.buffers
    drift, average = Drift(state.params, excluded), None
    # The round writes into a copy: whatever interrupts it, the state before it stays intact.
    after = state.successor()
    robust = []  # parameters of all clients, for the rules that need them at once

    # 1. Server: sample clients; send them the global parameters and, the first time, their anchors.
    sampled_K = sample_clients(config, after.round)
    histograms_KC = torch.tensor([context.partition.histograms[k] for k in sampled_K])
    weights_K = method.weights(SampledClients(config, histograms_KC)).to(context.device)

    for cohort in cohorts(len(sampled_K), len(context.replicas.params_RP)):
        # 2. Clients: train locally; their parameters are the rows of a matrix.
        updates = [received(state, context, client) for client in sampled_K[cohort]]
        reports = context.replicas.train(updates)
        params_SP = context.replicas.params_RP[: len(updates)]
        for each in zip(updates, params_SP, reports, strict=True):
            observe(*each)

        # 3. Server: average the parameters by their weights, in ascending client number.
        own_SQ = params_SP[:, layout.batch_norm]  # a copy: what a client keeps is not clipped
        for update, params_P in zip(updates, params_SP, strict=True):
            if config.server.clip_norm:
                clip_update(params_P, update.start_P, excluded, config.server.clip_norm)
        weights_S, earlier, last = weights_K[cohort], average, cohort.stop == len(sampled_K)
        average = weighted_average(params_SP, weights_S, state.params, earlier, final=last)
        finite_S = metrics.add_cohort(updates, reports, average.non_finite_S == 0)
        if not finite_S.all():  # again, without the clients that returned NaN or infinity
            weights_S = weights_S * finite_S
            average = weighted_average(params_SP, weights_S, state.params, earlier, final=last)
        if rule != "mean":
            robust.append(params_SP[finite_S])
        for s in finite_S.nonzero().flatten().tolist():
            drift.add(updates[s].client, params_SP[s], average.squared_norm_S[s], weights_S[s])
            method.update_state(after.method_state, updates[s], params_SP[s], reports[s])
            if len(after.batch_norm):
                after.batch_norm[updates[s].client] = own_SQ[s]
    drift.require_weight(after.round)
    aggregate_P, norms = average.values_P, drift.norms
    if rule != "mean":
        aggregate_P = robust_aggregate(torch.cat(robust), rule, config.server, len(sampled_K))
    selected = method.select_models(context, after.method_state, list(norms), after.round)
    if selected is not None:
        aggregate_P, drift = average_selected(selected, state.params, excluded)
    params_P = server_step(config, layout, after.method_state, state.params, aggregate_P)

    # 4. Server: evaluate the new global model, and record one line of metrics.
    load_params(context.model, params_P)
    rate = learning_rate(config.federation, after.round)
    line = {"round": after.round, "clients": sampled_K, "learning_rate": rate}
    line |= evaluate_round(context, after.round) | metrics.line()
    line["drift"] = {"update_norm": [norms.get(client) for client in sampled_K]}
    line["drift"] |= drift.summary(aggregate_P)
    after.anchors_sent[sampled_K] = True
    return replace(after, params=params_P), line


def sample_clients(config: Config, round: int) -> list[int]:
    """K of the M clients, in ascending number; depends on the seed and the round only."""
    source = generator(config.run.seed, "clients", round)
    order_M = torch.randperm(config.partition.clients, generator=source)
    return sorted(order_M[: config.federation.clients_per_round].tolist())


def received(state: FederatedState, context: RunContext, client: int) -> LocalUpdate:
    """The local update of a client that has received the global parameters.

    With model.batch_norm = local they contain the client's own BatchNorm entries.
    """
    start_P = state.params
    if len(state.batch_norm):
        start_P = start_P.clone()
        start_P[context.layout.batch_norm] = state.batch_norm[client]
    return LocalUpdate(
        context=context,
        client=client,
        round=state.round + 1,
        start_P=start_P,
        method_state=state.method_state,
    )
