"""Where a number came from: date, command, commit, hardware.

In: nothing but the running process.  Out: Provenance, for reports and tables.
"""

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch


@dataclass(frozen=True)
class Provenance:
    date: str  # local time with its offset from UTC, ISO 8601
    command: str
    commit: str  # "" when the package does not run from a git checkout; "+" behind it when files had changed
    hardware: str


def provenance() -> Provenance:
    """Of this process, now."""
    program = Path(sys.argv[0]).name
    command = shlex.join([program, *sys.argv[1:]])
    return Provenance(datetime.now().astimezone().isoformat(timespec="seconds"), command, commit(), hardware())


def commit() -> str:
    """The short commit that this file was run from."""
    home = Path(__file__).parent
    head = _git(home, "rev-parse", "--short=12", "HEAD")
    # A checkout of another project may lie around an installed package; only a file that git tracks tells our commit.
    if not head or not _git(home, "ls-files", Path(__file__).name):
        return ""
    return head + ("+" if _git(home, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""  # no git here: the report then says that the commit is not known
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware() -> str:
    """CPU with its cores, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{_cpu()}, {cores} cores"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return "; ".join([*parts, f"torch {torch.__version__}, Python {platform.python_version()}"])


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
