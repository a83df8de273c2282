"""A workload through pfl-research: FederatedAveraging on workers started by torchrun (gloo)."""

import itertools
import os

import torch
import torch.nn.functional as F
from clock import Clock, argument, figures, finish
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from work import Work


class Timed(TrainingProcessCallback):
    """Notes the time after each central iteration."""

    def __init__(self, rounds):
        self.clock = Clock(os.getppid(), budget_s=0.0)  # the tree hangs below torchrun's agent
        self.rounds, self.seen, self.used = rounds, 0, 0.0

    def on_train_begin(self, *, model):  # noqa: ARG002 - pfl passes it by name
        """Start the clock."""
        self.clock.start()
        return Metrics()

    def after_central_iteration(self, *_args, **_kwargs):
        """End a round."""
        self.seen += 1
        self.clock.round_done()
        if self.seen == self.rounds:
            self.used = self.clock.cpu_s()
        return False, Metrics()


def main():
    torch.set_num_threads(1)
    asked = argument()
    work = Work(asked["data"])
    torch.manual_seed(work.facts["seed"])
    module = work.model()
    module.loss = lambda x, y: (module.train(), F.cross_entropy(module(x), y))[1]
    module.metrics = lambda *_: {}
    cohorts = range(1, asked["rounds"] + 2)
    users = itertools.cycle([device for r in cohorts for device in work.devices(r)])

    def data_of(device):
        ids = work.parts[device][torch.randperm(len(work.parts[device]))]
        return PyTorchTensorDataset([work.x[ids], work.y[ids]], user_id=device)

    weights = {device: len(part) for device, part in enumerate(work.parts)}
    data = FederatedDataset(data_of, lambda: next(users), user_id_to_weight=weights)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    algorithm = NNAlgorithmParams(
        central_num_iterations=asked["rounds"],
        evaluation_frequency=10**6,
        train_cohort_size=work.cohort,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch_size
    )
    timed = Timed(asked["rounds"])
    FederatedAveraging().run(
        algorithm, SimulatedBackend(data, None), model, local, None, callbacks=[timed]
    )
    if os.environ.get("RANK", "0") == "0":
        samples = work.samples(2, len(timed.clock.walls))
        finish(
            figures(
                timed.clock,
                timed.used,
                samples,
                work.cohort,
                work.mean_samples,
                work.flops_per_sample,
            )
        )


if __name__ == "__main__":
    main()
