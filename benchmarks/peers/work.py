"""A workload as edgelearn wrote it down: samples, who has which, whom each round asks, the network.

Needs numpy and torch only.
"""

import json
import math

import numpy as np
import torch
from torch import nn


class Work:
    """One workload in memory: samples normalized once, as float32."""

    def __init__(self, path):
        with np.load(path) as stored:
            facts = json.loads(str(stored["facts"]))
            self.x = torch.from_numpy(stored["x"]).float()
            self.y = torch.from_numpy(stored["y"])
            self.cohorts = stored["cohorts"]
            self.sizes = stored["sizes"]
            ids = torch.from_numpy(stored["ids"].astype(np.int64))
            names = [key for key in stored.files if key.startswith("init/")]
            self.x_test = torch.from_numpy(stored["x_test"]).float()
            self.y_test = torch.from_numpy(stored["y_test"])
            self.init = {key[5:]: torch.from_numpy(stored[key]) for key in names}
        for x in (self.x, self.x_test):
            x.mul_(facts["scale"] / facts["std"]).sub_(facts["mean"] / facts["std"])
        self.parts = list(torch.split(ids, self.sizes.tolist()))
        self.facts = facts
        self.lr, self.batch_size = facts["lr"], facts["batch_size"]
        self.num_devices, self.cohort = len(self.parts), self.cohorts.shape[1]
        self.mean_samples = float(self.sizes.mean())
        self.flops_per_sample = facts["flops_per_sample"]

    def model(self):
        """Return the network with the initial parameters."""
        made = network(self.facts)
        made.load_state_dict(self.init)
        return made

    def devices(self, server_round):
        """Return whom a round asks (from 1)."""
        return [int(d) for d in self.cohorts[(server_round - 1) % len(self.cohorts)]]

    def samples(self, first_round, count):
        """Return how many samples each of `count` rounds trains on."""
        rounds = range(first_round, first_round + count)
        return [int(self.sizes[self.devices(r)].sum()) for r in rounds]


def network(facts):
    """Return the network, written out once more: peers don't import edgelearn."""
    shape, classes, args = facts["input_shape"], facts["num_classes"], facts["model_args"]
    layers = []
    if facts["model"] == "cnn":
        depth, height, width = shape
        for after in args["channels"]:
            k = args["kernel_size"]
            layers += [nn.Conv2d(depth, after, k, padding=k // 2), nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = after, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(depth * height * width, args["hidden"]), nn.ReLU()]
        layers.append(nn.Linear(args["hidden"], classes))
        return nn.Sequential(*layers)
    before = math.prod(shape)
    layers.append(nn.Flatten())
    for after in args["hidden"]:
        layers += [nn.Linear(before, after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Linear(before, classes))


def train(model, work, device):
    """Train as Flower's quickstart does; return the mean loss of the steps."""
    ids = work.parts[device]
    data = torch.utils.data.TensorDataset(work.x[ids], work.y[ids])
    loader = torch.utils.data.DataLoader(data, batch_size=work.batch_size, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    model.train()
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)
