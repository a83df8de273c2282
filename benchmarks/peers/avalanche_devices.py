"""Federated continual learning with an Avalanche strategy object per device, in one process.

Avalanche's `train` is one whole experience; here it is cut in three, so that an experience lasts
several rounds: `begin` (before_training_exp), `round` (epochs from the global weights), `end`
(after_training_exp on the final global weights: EWC's anchor and Fisher, the replay buffer). All
hooks of the plugins are called as often as they were written for.
"""

import warnings

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark  # noqa: E402
from avalanche.benchmarks.utils.classification_dataset import (  # noqa: E402
    _make_taskaware_tensor_classification_dataset,
)
from avalanche.training.plugins import (  # noqa: E402
    EvaluationPlugin,
    EWCPlugin,
    ReplayPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.templates import SupervisedTemplate  # noqa: E402
from clock import Clock, argument, finish  # noqa: E402
from work import Work  # noqa: E402


class Device(SupervisedTemplate):
    """A strategy whose experience can last several rounds."""

    def begin(self, experience):
        """Begin an experience."""
        self.is_training, self._stop_training, self._eval_streams = True, False, []
        self.model.train()
        self._before_training()
        self.experience = experience
        self._before_training_exp()

    def round(self, weights):
        """Train from the global weights."""
        self.model.load_state_dict(weights)
        self.model.train()
        for _ in range(self.train_epochs):
            self._before_training_epoch()
            self.training_epoch()
            self._after_training_epoch()

    def end(self, weights):
        """End the experience on the final global weights."""
        self.model.load_state_dict(weights)
        self._after_training_exp()
        self._after_training()
        self._train_cleanup()


def plugins(asked):
    """Return the method's plugin."""
    if asked["strategy"] == "replay":
        return [ReplayPlugin(mem_size=asked["capacity"])]
    if asked["strategy"] == "ewc":
        return [EWCPlugin(asked["ewc_lambda"], mode="online", decay_factor=1.0)]
    if asked["strategy"] == "si":
        return [SynapticIntelligencePlugin(si_lambda=1.0)]
    return []


def fleet(work, asked):
    """Return each device's strategy and its stream."""
    found = []
    for ids in work.parts:
        data = _make_taskaware_tensor_classification_dataset(
            work.x[ids], work.y[ids], task_labels=0, targets=work.y[ids].tolist()
        )
        benchmark = class_incremental_benchmark(
            {"train": data, "test": data},
            class_order=list(range(work.facts["num_classes"])),
            num_experiences=work.facts["num_experiences"],
        )
        model = work.model()
        strategy = Device(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=work.lr),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=work.batch_size,
            train_epochs=work.facts["epochs"],
            evaluator=EvaluationPlugin(),
            plugins=plugins(asked),
        )
        found.append((strategy, list(benchmark.train_stream)))
    return found


def main():
    asked = argument()
    torch.set_num_threads(1)
    work = Work(asked["data"])
    torch.manual_seed(work.facts["seed"])
    np.random.seed(work.facts["seed"])  # noqa: NPY002 - what Avalanche draws from
    devices = fleet(work, asked)
    weights = {k: v.clone() for k, v in work.init.items()}
    per_experience = work.facts["rounds_per_experience"]
    num_rounds = per_experience * work.facts["num_experiences"]
    clock, begun, steps = Clock(), set(), 0
    clock.start()
    for server_round in range(1, num_rounds + 1):
        position = (server_round - 1) // per_experience
        updates, sizes = [], []
        for device in work.devices(server_round):
            strategy, stream = devices[device]
            if device not in begun:
                strategy.begin(stream[position])
                begun.add(device)
            before = strategy.clock.train_iterations
            strategy.round(weights)
            steps += strategy.clock.train_iterations - before
            updates.append({k: v.numpy() for k, v in strategy.model.state_dict().items()})
            sizes.append(len(stream[position].dataset))
        share = np.array(sizes, np.float32) / sum(sizes)
        mean = {k: sum(s * u[k] for s, u in zip(share, updates, strict=True)) for k in weights}
        weights = {k: torch.from_numpy(np.asarray(v)).clone() for k, v in mean.items()}
        if server_round % per_experience == 0:
            for device, (strategy, stream) in enumerate(devices):
                if device not in begun:
                    strategy.begin(stream[position])
                strategy.end(weights)
            begun.clear()
        clock.round_done()
    used = clock.cpu_s()
    model = work.model().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        hits = (model(work.x_test).argmax(1) == work.y_test).float().mean().item()
    finish(
        {
            "cpu_s": used,
            "wall_s": sum(clock.walls),
            "accuracy": hits,
            "steps": steps,
            "first_round_s": clock.first_round_s,
        }
    )


if __name__ == "__main__":
    main()
