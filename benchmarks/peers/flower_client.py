"""Flower's quickstart client on a workload; a module of its own, so that Ray's actors import it."""

import torch
from clock import argument
from work import Work, train

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip

app = ClientApp()
_loaded = []


def work():
    """Return the workload, loaded once per process."""
    if not _loaded:
        _loaded.append(Work(argument()["data"]))
    return _loaded[0]


@app.train()
def fit(message, _context):
    """Train on the samples of the device that the server names; all engines ask the same ones."""
    torch.set_num_threads(1)
    data, model = work(), work().model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    device = int(message.content["config"]["device"])
    loss = train(model, data, device)
    metrics = {"train_loss": loss, "num-examples": len(data.parts[device])}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=message)
