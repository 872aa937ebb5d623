"""A client: introduces itself, and trains when it is asked to.

Its number is `partition-id` of the node's configuration. With `data` there, its images are those of
a folder of class folders, and its anchors those of the file `anchors`, which the server made for
it; otherwise it is simulated: it has its part of the data set, and makes the anchors itself.
"""

from functools import lru_cache, wraps

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from semanticfl_flower.records import arrays_of, config_of, tensors_of
from semanticfl_ref.errors import UserError
from semanticfl_ref.federated.context import RunContext
from semanticfl_ref.federated.methods.method import LocalUpdate
from semanticfl_ref.federated.remote import train_here
from semanticfl_ref.run.client_data import OwnData, client_context, introduction

app = ClientApp()


def replies_with_errors(function):
    """A user's mistake goes to the server in one line."""

    @wraps(function)
    def call(message: Message, context: Context) -> Message:
        try:
            return Message(function(message.content, context), reply_to=message)
        except UserError as error:
            return Message(Error(code=error.exit_code, reason=str(error)), reply_to=message)

    return call


@app.query()
@replies_with_errors
def introduce(content: RecordDict, context: Context) -> RecordDict:
    """Which client this is, how many images of each class it has, and its settings and versions."""
    client, run = number_of(context), run_of(content, context)
    about = introduction(run, client, owns="data" in context.node_config)
    return RecordDict({"about": ConfigRecord(about)})


@app.train()
@replies_with_errors
def train(content: RecordDict, context: Context) -> RecordDict:
    """Train; the client's own rows of the method's state stay in the node's Context."""
    run, sent = run_of(content, context), tensors_of(content["sent"])
    update = LocalUpdate(
        context=run,
        client=number_of(context),
        round=content["about"]["round"],
        start_P=sent.pop("params").to(run.device),
        method_state={},
    )
    kept = tensors_of(context.state["kept"]) if "kept" in context.state else {}
    answer, kept = train_here(update, kept, sent)
    if kept:
        context.state["kept"] = arrays_of(kept)
    params = arrays_of({"params": answer.params_P})
    return RecordDict({"params": params, "report": MetricRecord(answer.numbers)})


def number_of(context: Context) -> int:
    """The client's number."""
    if "partition-id" not in context.node_config:
        raise UserError("start the SuperNode with --node-config 'partition-id=0', and so on")
    return int(context.node_config["partition-id"])


def run_of(content: RecordDict, context: Context) -> RunContext:
    """The client's data, anchors and model."""
    node, about, own = context.node_config, content["about"], None
    if "data" in node:
        names = tuple(about["class_names"])
        own = OwnData(
            number_of(context), node["data"], node.get("anchors", ""), names, about["image_size"]
        )
    return _run(str(context.run_config["flags"]), own)


@lru_cache(1)  # a process of the simulation engine plays many clients
def _run(flags: str, own: OwnData | None) -> RunContext:
    return client_context(config_of({"flags": flags}), own)
