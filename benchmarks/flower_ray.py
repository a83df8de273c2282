"""A scenario through Flower's own Ray simulation, with edgelearn's ClientApp and round loop.

Run: python benchmarks/flower_ray.py SCENARIO OUT STATE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import edgelearn  # noqa: F401 - Flower's telemetry off, before flwr is imported
from edgelearn.federated.client_app import client_app
from edgelearn.federated.server_app import serve
from edgelearn.scenario.load import load

from flwr.app import Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip
from flwr.simulation import run_simulation  # isort: skip

SCENARIO, OUT, STATE = (os.environ.get(f"BENCH_{key}", "") for key in ("SCENARIO", "OUT", "STATE"))


def configured() -> ClientApp:
    """Edgelearn's ClientApp; `run_simulation` hands no run configuration to it, so this does."""
    inner, app = client_app(), ClientApp()

    def handle(message: Message, context: Context) -> Message:
        config = {"scenario": SCENARIO, "state-dir": STATE}
        own = Context(context.run_id, context.node_id, context.node_config, context.state, config)
        return inner(message=message, context=own)

    app.train()(handle)
    app.evaluate()(handle)
    app.query("consolidate")(handle)
    app.query("hello")(handle)
    return app


client = configured()
server = ServerApp()


@server.main()
def main(grid: Grid, _context: Context) -> None:
    """Run the round loop on Flower's grid."""

    def show(progress: object) -> None:
        print(f"round {progress.server_round}/", file=sys.stderr, flush=True)

    serve(grid, load(SCENARIO), out=Path(OUT), on_round=show)


if __name__ == "__main__":
    for key, value in zip(("SCENARIO", "OUT", "STATE"), sys.argv[1:], strict=True):
        os.environ[f"BENCH_{key}"] = value
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    import flower_ray as module  # imported by name, so that Ray's actors can do the same

    run_simulation(
        server_app=module.server,
        client_app=module.client,
        num_supernodes=load(sys.argv[1]).fleet.num_devices,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "logging_level": "error", "log_to_driver": False},
        },
    )
