"""The server: Flower's strategy around `run_round`, whose result is a run folder like `train`'s."""

import time
from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from semanticfl_flower.records import arrays_of, config_of, tensors_of
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.remote import Answer, sent_state, server_side
from semanticfl_ref.federated.round import received, sample_clients
from semanticfl_ref.federated.state import initial_state
from semanticfl_ref.run.client_data import with_clients
from semanticfl_ref.run.folder import RunFolder
from semanticfl_ref.run.train import documents_of, one_round, prepare, start, write_summary

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    config, timeout = config_of(settings), float(settings["timeout"])
    if config.run.patience:
        raise UserError("run.patience: stopping early is for `train` alone; leave it out here")
    run = prepare(config, offline=True, say=lambda text: log(INFO, "%s", text))
    nodes, run = introduced(grid, run, timeout)
    _, identity = start(run)  # the model has the parameters of run.init now
    folder = RunFolder.create(Path(str(settings["out"])), config, documents_of(run, identity))
    with folder.held():
        strategy = Rounds(run, folder, nodes)
        params = arrays_of({"params": strategy.state.params})
        strategy.start(grid, params, config.federation.rounds, timeout)
        write_summary(strategy.context, folder, strategy.state)


class Rounds(Strategy):
    """Clients are sampled, and their answers averaged, by `run_round`.

    Args:
        context: the run.
        folder: receives metrics and checkpoints.
        nodes: client -> its node.
    """

    def __init__(self, context: RunContext, folder: RunFolder, nodes: dict[int, int]):
        self.context, self.folder, self.nodes = server_side(context), folder, nodes
        self.state, self.history = initial_state(self.context), []
        self.started, self.bytes_down = 0.0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global parameters, and the method's part of the state, for each sampled client."""
        about = ConfigRecord(about_data(self.context) | {"round": server_round})
        sent = sent_state(self.context.method, self.state.method_state)
        self.started, self.bytes_down, messages = time.perf_counter(), 0, []
        for client in sample_clients(self.context.config, server_round):
            params_P = received(self.state, self.context, client).start_P
            record = arrays_of({"params": params_P, **sent})
            self.bytes_down += record.count_bytes()
            content = RecordDict({"sent": record, "about": about})
            messages.append(Message(content, self.nodes[client], "train"))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """The server's turns of `run_round`; clients without an answer are dropped or stop the
        run, as federation.non_finite says."""
        config, by_node = (
            self.context.config,
            {reply.metadata.src_node_id: reply for reply in replies},
        )
        answers, bytes_up = {}, 0
        for client in sample_clients(config, server_round):
            reply = by_node.get(self.nodes[client])
            if reply is not None and reply.has_content():
                bytes_up += reply.content["params"].count_bytes()
                params_P = tensors_of(reply.content["params"])["params"]
                answers[client] = Answer(params_P, dict(reply.content["report"]))
                continue
            reason = "no answer in time" if reply is None else reply.error.reason
            where = f"round {server_round}, client {client} (node {self.nodes[client]}): {reason}"
            if config.federation.non_finite == "stop":
                raise UserError(f"{where}; federation.non_finite=drop goes on without it")
            log(WARNING, "dropped: %s", where)
            answers[client] = Answer.missing(self.context.layout.size)
        self.context.replicas.received = answers
        self.state = one_round(self.context, self.folder, self.state, self.history, self.started)
        line = self.history[-1]
        metrics = {name: line[name] or 0.0 for name in ("test_accuracy", "loss")}
        metrics |= {"array_bytes_down": self.bytes_down, "array_bytes_up": bytes_up}
        metrics |= {name: line[name] for name in ("bytes_down", "bytes_up")}
        return arrays_of({"params": self.state.params}), MetricRecord(metrics)

    def configure_evaluate(self, *_) -> Iterable[Message]:
        """Nobody: the server evaluates."""
        return []

    def aggregate_evaluate(self, *_) -> None:
        """Nothing: see `configure_evaluate`."""

    def summary(self) -> None:
        """Name the run folder."""
        log(INFO, "run folder: %s", self.folder.path.absolute())


def introduced(grid: Grid, run: RunContext, timeout: float) -> tuple[dict[int, int], RunContext]:
    """Wait for all clients: client -> its node, and the run with the image counts that they have.

    Raises:
        UserError: nodes are missing or too many, or one is not what the run expects.
    """
    expected, deadline = run.config.partition.clients, time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(0.2)
    if len(nodes) != expected:
        raise UserError(
            f"{len(nodes)} SuperNodes for {expected} clients: start as many as --clients says"
        )
    content = RecordDict({"about": ConfigRecord(about_data(run))})
    messages = [Message(content, node, "query") for node in nodes]
    found = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise UserError(f"node {node}: {reply.error.reason}")
        found[node] = dict(reply.content["about"])
    run = with_clients(run, list(found.values()))
    return {about["client"]: node for node, about in found.items()}, run


def about_data(run: RunContext) -> dict:
    """What a client with images of its own needs to number their classes."""
    return {"class_names": list(run.dataset.class_names), "image_size": run.dataset.image_size}
