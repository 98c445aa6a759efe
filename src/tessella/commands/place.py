"""What every command is told: where it runs, and where its result goes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes


@dataclass(frozen=True)
class Place:
    """Where it runs, and where its result goes."""

    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type; auto: bfloat16 where the device multiplies it in hardware."""
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""


Here = OmitArgPrefixes[Place]
Result = dict[str, Any]  # what --json writes
