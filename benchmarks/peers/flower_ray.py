"""A workload through Flower's simulation on Ray: 2 actors of 1 CPU, FedAvg, no evaluation."""

import sys

import flower_client
from clock import Clock, argument, figures, finish

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict  # isort: skip
from flwr.serverapp import ServerApp  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip
from flwr.simulation import run_simulation  # isort: skip

ASKED = argument()
server = ServerApp()


class Timed(FedAvg):
    """FedAvg that names the device whose samples a client shall use, and times rounds."""

    clock = Clock(budget_s=0.0)
    loss, used = None, 0.0

    def configure_train(self, server_round, arrays, config, grid):
        """Name the devices; start the clock in the first round."""
        if server_round == 1:
            self.clock.start()
        found = []
        messages = super().configure_train(server_round, arrays, config, grid)
        devices = flower_client.work().devices(server_round)
        for message, device in zip(messages, devices, strict=True):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"device": device})})
            found.append(Message(content, message.metadata.dst_node_id, "train"))
        return found

    def aggregate_train(self, server_round, replies):
        """Aggregate, then note the time."""
        replies = list(replies)
        failed = [r.error.reason for r in replies if r.has_error()]
        if failed:
            raise RuntimeError(f"{len(failed)} clients failed: {failed[0]}")
        arrays, metrics = super().aggregate_train(server_round, replies)
        Timed.loss = Timed.loss or float(metrics["train_loss"])
        self.clock.round_done()
        if server_round == ASKED["rounds"]:
            Timed.used = self.clock.cpu_s()
        return arrays, metrics


@server.main()
def main(grid, _context):
    """Run the rounds."""
    work = flower_client.work()
    strategy = Timed(
        fraction_train=work.cohort / work.num_devices,
        fraction_evaluate=0.0,
        min_train_nodes=work.cohort,
        min_available_nodes=work.num_devices,
    )
    initial = ArrayRecord(work.init)
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=ASKED["rounds"])
    samples = work.samples(2, len(strategy.clock.walls))
    found = figures(
        strategy.clock, Timed.used, samples, work.cohort, work.mean_samples, work.flops_per_sample
    )
    finish({**found, "first_loss": Timed.loss})


if __name__ == "__main__":
    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=flower_client.work().num_devices,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "logging_level": "error", "log_to_driver": False},
        },
    )
    sys.exit(0)
