"""One run on the machines of a Ray cluster: `python recipes/launch/on_ray.py --ranks 16 -- recipes/mine.toml --parallel fsdp2`.

In: how many ranks, and what `tessella finetune` would be told.  Out: the run, whose output folder lies on a disk that all see.
Ray finds the machines and starts one process a rank; who is who is told by the same environment that torchrun sets. A rank that
fails ends the others; the next start says --resume.
"""

import argparse
import os
import socket
import subprocess
import sys

import ray


@ray.remote
class Rank:
    """One process of the run, on a machine that Ray chose."""

    def address(self) -> tuple[str, int]:
        """Where the others can reach us: a name of this machine and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def run(self, words: list[str], rank: int, ranks: int, local_rank: int, head: tuple[str, int]) -> int:
        """The exit code of our part."""
        told = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local_rank, "MASTER_ADDR": head[0], "MASTER_PORT": head[1]}
        environment = {**os.environ, **{name: str(value) for name, value in told.items()}}
        return subprocess.run([sys.executable, "-m", "tessella.cli", "finetune", *words], env=environment, check=False).returncode


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--ranks", type=int, required=True, help="processes in all")
    words.add_argument("--cpu", action="store_true", help="ranks without GPUs, to try it out")
    words.add_argument("finetune", nargs=argparse.REMAINDER, help="behind --: what tessella finetune is told")
    wish = words.parse_args()
    told = [word for word in wish.finetune if word != "--"]
    ray.init()
    # Ray hides all GPUs but its own from each rank, so each is the first of those that it sees.
    ranks = [Rank.options(num_gpus=0 if wish.cpu else 1, num_cpus=1).remote() for _ in range(wish.ranks)]
    head = ray.get(ranks[0].address.remote())
    waiting = [one.run.remote(told, number, wish.ranks, 0, head) for number, one in enumerate(ranks)]
    while waiting:
        ended, waiting = ray.wait(waiting)
        code = int(ray.get(ended[0]))
        if code not in (0, 130):
            for one in ranks:
                ray.kill(one)
            print(f"a rank ended with code {code}; go on with the same command and --resume", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
