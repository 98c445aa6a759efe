"""Is this the base that an adapter was taught on? A few numbers of a model's weights, hashed, lie beside the adapter.

In: a model's shapes and its tensors, by our names.  Out: a fingerprint; an error when it is another than the recorded one.
Shapes alone do not tell: InternVL2-2B and InternVL2_5-2B have the same, and so has a model with another adapter merged. The
layout does not matter, nor does a wider type; a type that rounds the numbers makes another base of it, as it does to the merge.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from tessella.checkpoint.published import PUBLISHED
from tessella.errors import CheckpointError

FILE = "tessella_base.json"  # beside adapter_config.json: PEFT refuses keys there that it does not know
MATRICES = ("self_attn.q_proj.weight", "mlp.down_proj.weight")  # of the first, the middle and the last layer
LAYER = "language_model.model.layers."
NUMBERS = 997  # of each matrix, evenly spaced


def fingerprint(shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]) -> str:
    """A word for these weights. tensor: reads a parameter by our name. "" for a model without such layers."""
    layers = sorted({int(name.removeprefix(LAYER).partition(".")[0]) for name in shapes if name.startswith(LAYER)})
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]}) if layers else []
    digest = hashlib.sha256()
    names = [name for layer in chosen for name in (f"{LAYER}{layer}.{matrix}" for matrix in MATRICES) if name in shapes]
    for name in names:
        numbers = tensor(name).reshape(-1)
        step = max(1, numbers.numel() // NUMBERS)
        digest.update(f"{name} {shapes[name]}".encode())
        digest.update(numbers[::step][:NUMBERS].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32] if names else ""


def write_fingerprint(adapter: Path, found: str) -> None:
    """Lay it beside an adapter; nothing when there is none."""
    if found:
        (adapter / FILE).write_text(json.dumps({"fingerprint": found}) + "\n", encoding="utf-8")


def recorded_fingerprint(adapter: Path) -> str:
    """What lies beside an adapter; "" when nothing does: PEFT's own adapters have none."""
    path = adapter / FILE
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is broken ({error!r}); write the adapter again, or take this file away") from error


def require_base(
    adapter: Path, recorded_name: str, base: str, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]
) -> None:
    """Raises CheckpointError when the base, by its published name or its weights, is another than the adapter was taught on."""
    ours, theirs = (name.rstrip("/").rpartition("/")[2].partition("@")[0] for name in (base, recorded_name))
    if ours in PUBLISHED and theirs in PUBLISHED and ours != theirs:
        raise CheckpointError(f"{adapter} was taught on {recorded_name}, and {base} is another model; give {theirs} as its base")
    recorded = recorded_fingerprint(adapter)
    if recorded and fingerprint(shapes, tensor) != recorded:
        raise CheckpointError(
            f'{adapter} was taught on "{recorded_name}", and the weights of {base} are not those: another model, or what was '
            f"taught is merged into it already; give the base it was taught on, or take {FILE} out of the adapter to put it on "
            "this one all the same"
        )
