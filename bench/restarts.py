"""kill -9 in the middle of answers, and start again on the same port: always ready, nothing stale.

python bench/restarts.py --model tessella-nano --times 100
"""

import argparse
import json
import signal
import time
from pathlib import Path

import httpx2
from serving import Askers, Server, ask, free_port, quantile, question, start, wait_until_ready


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", default="tessella-nano")
    words.add_argument("--times", type=int, default=100)
    words.add_argument("--within-s", type=float, default=120, help="until it must be ready")
    words.add_argument("--json", type=Path)
    wish = words.parse_args()
    port, ready_s, failures = free_port(), [], []
    for number in range(wish.times):
        askers = None
        process, url = start(wish.model, port=port)
        try:
            ready_s.append(wait_until_ready(process, url, wish.within_s))
            server = Server(process, url, httpx2.get(f"{url}/v1/models").json()["data"][0]["id"])
            with httpx2.Client(base_url=url, timeout=60) as client:
                answer = ask(client, question(server, number, 4))
            if answer.error:
                failures.append(f"{number}: {answer.error}")
            askers = Askers(server, 4, 64, None, first_number=1000 * number)
            time.sleep(0.2 + number % 5 / 10)
        except RuntimeError as error:
            failures.append(f"{number}: {error}")
        print(
            f"{number + 1} of {wish.times}: ready after {ready_s[-1] if ready_s else 0:.1f} s, {len(failures)} failures",
            flush=True,
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        if askers is not None:
            askers.stop()
    result = {
        "restarts": wish.times,
        "failures": failures,
        "ready, median s": round(quantile(ready_s, 0.5), 2),
        "ready, longest s": round(max(ready_s, default=0.0), 2),
    }
    print(json.dumps(result, indent=1))
    if wish.json:
        wish.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
