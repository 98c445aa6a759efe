"""recipes/ray_serve.py: two replicas behind one address answer as one server does, streams too. No extra of ours brings ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny import tiny_folder

pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'ray[serve]'")
httpx2 = pytest.importorskip("httpx2", reason="the serve extra is not installed")

RECIPE = Path(__file__).parents[1] / "recipes" / "ray_serve.py"
PORT = 8654


@pytest.mark.timeout(300)
def test_two_replicas_are_one_server(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", "InternLM2ForCausalLM")
    words = [str(folder), "--port", str(PORT), "--device", "cpu", "--cache-tokens", "1024"]
    command = [sys.executable, str(RECIPE), "--replicas", "2", "--cpus", "0.1", "--", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        try:
            while "Ctrl-C stops it" not in (line := process.stdout.readline()):
                assert line, "it ended before it was ready"
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
            url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
            answers = {httpx2.post(url, json=body, timeout=60).json()["choices"][0]["message"]["content"] for _ in range(6)}
            assert len(answers) == 1
            with httpx2.stream("POST", url, json={**body, "stream": True}, timeout=60) as streamed:
                lines = [line for line in streamed.iter_lines() if line]
            assert lines[-1] == "data: [DONE]" and len(lines) > 2
            assert httpx2.post(url, json={**body, "tools": []}, timeout=60).json()["error"]["param"] == "tools"
        finally:
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            assert process.wait(120) == 0
            assert time.monotonic() - begun < 60
