"""Clients in other processes, for engines with a transport of their own, such as Flower.

What travels is a flat vector of parameters and plain numbers. A client keeps its own rows of the
method's state; the server runs `run_round` with the clients' answers in place of replicas.

Letters: P size of a flat vector, R rows of a cohort.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.flat import flatten_params
from semanticfl_ref.federated.methods.method import LocalUpdate, Method, MethodState
from semanticfl_ref.federated.replicas import COHORT, Item, Result
from semanticfl_ref.federated.report import ClientReport, FirstBatch

# What a report becomes: name -> a number or a list of numbers.
Numbers = dict[str, int | float | list[float]]
LOSSES = ("loss", "last_epoch_loss")


@dataclass(frozen=True)
class Answer:
    """What a client returns: parameters float32 [P], and numbers. Those of a client that does not
    answer are NaN."""

    params_P: torch.Tensor
    numbers: Numbers

    @classmethod
    def missing(cls, size: int) -> "Answer":
        """Stands for a client that did not answer."""
        return cls(torch.full((size,), math.nan), {"steps": 0, **dict.fromkeys(LOSSES, math.nan)})


class OwnRow:
    """A tensor [M, ...] of the method's state, of which a single client's row is there."""

    def __init__(self, row: torch.Tensor):
        self.row = row

    def __getitem__(self, client: int) -> torch.Tensor:
        return self.row

    def __setitem__(self, client: int, value: torch.Tensor) -> None:
        self.row.copy_(value)


class Answers:
    """The server's side, in place of `Replicas`: clients that trained already.

    Attributes:
        received: client -> its answer in this round.
        params_RP: float32 [R, P], the parameters of a cohort.
    """

    def __init__(self, context: RunContext):
        rows = min(context.config.federation.clients_per_round, COHORT)
        self.received: dict[int, Answer] = {}
        self.params_RP = torch.zeros(rows, context.layout.size, device=context.device)

    def train(self, updates: list[LocalUpdate]) -> list[ClientReport]:
        """Put the answers of these clients into the first rows."""
        answers = [self.received[update.client] for update in updates]
        for row_P, answer in zip(self.params_RP, answers, strict=False):
            row_P.copy_(answer.params_P)
        return [report_from(answer.numbers) for answer in answers]

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of a function, one after another."""
        return list(map(function, items))


def server_side(context: RunContext) -> RunContext:
    """The run as the server has it: `replicas` are `Answers`, and the clients' rows of the state
    are with them."""
    method, size = context.method, context.layout.size

    def init_state(config, params_P: torch.Tensor) -> MethodState:
        state = method.init_state(config, params_P)
        return {name: state[name] for name in state if name not in method.client_state}

    def update_state(state, update: LocalUpdate, params_P: torch.Tensor, report) -> None:
        rows = {name: OwnRow(torch.zeros(size)) for name in method.client_state}
        before = {**update.method_state, **rows}
        method.update_state(
            {**state, **rows}, replace(update, method_state=before), params_P, report
        )

    served = replace(method, init_state=init_state, update_state=update_state)
    return replace(context, method=served, replicas=Answers(context))


def sent_state(method: Method, state: MethodState) -> MethodState:
    """The part of the server's state that travels to every client."""
    return {name: state[name] for name in method.sent_state if name in state}


def train_here(
    update: LocalUpdate, kept: MethodState, sent: MethodState
) -> tuple[Answer, MethodState]:
    """The client's side of a round.

    Args:
        update: whose turn it is, and the parameters received; its `method_state` is made here.
        kept: the rows of the method's state that the client kept; empty before its first round.
        sent: the part of the state that came with the parameters.

    Returns:
        The client's answer, and the rows to keep.
    """
    context, client = update.context, update.client
    method = context.method
    if not kept and method.client_state:
        whole = method.init_state(context.config, flatten_params(context.model).cpu())
        kept = {name: whole[name][client] for name in method.client_state if name in whole}
    before, after = (
        {name: OwnRow(row.clone()) for name, row in kept.items()}
        | {name: value.clone() for name, value in sent.items()}
        for _ in range(2)
    )
    update = replace(update, method_state=before)
    (report,) = context.replicas.train([update])
    params_P = context.replicas.params_RP[0].clone()
    # The server leaves a client out that returns NaN or infinity: its state stays as it was, too.
    if kept and params_P.isfinite().all() and math.isfinite(report.loss):
        method.update_state(after, update, params_P, report)
    rows = {name: after[name].row for name in kept}
    return Answer(params_P.cpu(), numbers_of(report)), rows


def numbers_of(report: ClientReport) -> Numbers:
    """A report as plain numbers; which images were in the first batch is left out."""
    first = report.first
    groups = {
        "term": {name: float(value) for name, value in report.terms.items()},
        "first": {name: [weight, float(value)] for name, (weight, value) in first.terms.items()},
        "product": {name: pair.tolist() for name, pair in first.products.items()},
    }
    flat = {f"{group}.{name}": v for group, each in groups.items() for name, v in each.items()}
    losses = {name: float(getattr(report, name)) for name in LOSSES}
    return {"steps": report.steps, **losses, **flat}


def report_from(numbers: Numbers) -> ClientReport:
    """The report with these numbers."""
    groups = {"term": {}, "first": {}, "product": {}}
    for key, value in numbers.items():
        group, _, name = key.partition(".")
        if name:
            groups[group][name] = torch.tensor(value, dtype=torch.float64)
    first = {name: (float(pair[0]), pair[1]) for name, pair in groups["first"].items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    return ClientReport(
        steps=numbers["steps"],
        terms=groups["term"],
        first=FirstBatch(nothing, first, torch.zeros(()), groups["product"]),
        **{name: torch.tensor(numbers[name]) for name in LOSSES},
    )
