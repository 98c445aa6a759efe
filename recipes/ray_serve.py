"""Several servers of one model behind one address, through Ray Serve: each replica has an engine of its own.

    pip install 'ray[serve]'
    python recipes/ray_serve.py --replicas 2 -- tessella-nano --adapter food=runs/food

In: what `tessella serve` is told, behind the two dashes.  Out: the same API, streams too, until Ctrl-C.
A request goes to the less busy of two replicas that Ray draws. What one process knows alone is of one replica here: /metrics
tells of whichever answers, limits of rate and number hold for each, and adapters are given at the start (no admin key).
The API is as closed as tessella serve; Ray's own ports listen on every address, so keep strangers from them.
"""

import argparse
import os
import signal
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported, which is below for that reason

import ray
import torch
import tyro
from ray import serve

from tessella.cli import FORM
from tessella.errors import TessellaError
from tessella.mistakes import tell
from tessella.server.app import create_app
from tessella.server.door import Door
from tessella.server.service import Service
from tessella.server.settings import Settings
from tessella.serving import Serve, address, load_adapter

MOST_AT_ONCE = 256  # requests of one replica: its engine batches them; Ray's default of 5 would leave it idle


@serve.deployment(max_ongoing_requests=MOST_AT_ONCE)
@serve.ingress()
class Replica:
    """One engine with our own application before it. settings: of all replicas, so that they know the same keys."""

    def __init__(self, told: Serve, settings: Settings):
        self.settings = settings
        self.stack = ExitStack()
        self.engine, self.loaded = self.stack.enter_context(told.running())

    def __serve_build_asgi_app__(self) -> Door:
        """Ray calls it in the event loop that serves."""

        def load(name: str, folder: os.PathLike[str]) -> None:
            load_adapter(self.engine, self.loaded, name, folder)

        return create_app(Service(self.engine, self.loaded.inputs, self.settings, load))

    def check_health(self) -> None:
        """Ray asks now and then, and starts another replica in the place of one whose engine has failed."""
        state = self.engine.state()
        if not state.alive:
            raise RuntimeError(state.failure or "the engine does not run")

    def __del__(self) -> None:
        self.stack.close()


def start(told: Serve, replicas: int, gpus: float, cpus: float) -> Settings:
    """Returns when every replica is ready. Raises ConfigError, and RuntimeError when one cannot be started."""
    settings = replace(told.settings(), admin_key=None, adapter_root=None)
    ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    deployment = Replica.options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.drain_s,
        max_queued_requests=settings.requests_at_once,
    )
    serve.run(deployment.bind(told, settings), name="tessella", route_prefix="/")
    return settings


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--replicas", type=int, default=2, help="engines, each with the whole model")
    words.add_argument("--gpus", type=float, default=float(torch.cuda.is_available()), help="of each replica")
    words.add_argument("--cpus", type=float, default=1.0, help="of each replica")
    words.add_argument("serve", nargs="*", metavar="-- WORDS", help="of tessella serve: tessella serve --help")
    wish = words.parse_args()
    told = tyro.cli(Serve, prog="tessella serve", args=wish.serve, config=FORM)
    try:
        settings = start(told, wish.replicas, wish.gpus, wish.cpus)
    except TessellaError as error:
        return tell(str(error))
    print(f"{settings.name}, {wish.replicas} times, at {address(settings.host, settings.port)}/v1; Ctrl-C stops it", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
