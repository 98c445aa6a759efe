"""XTuner's .pth of an InternVL fine-tune becomes an adapter: LoRA pairs, the projector, whatever else was taught whole.

In: iter_640.pth, a file or DeepSpeed's folder of that name; the scale, from XTuner's config text or told.  Out: an Adapter.
The file is a pickle. It is listed before it is opened: names of code that torch does not hold safe are refused, but for the
logger's own classes, in whose place an empty stand-in is put. The config is parsed as text, never executed.
Source: xtuner/model/internvl.py at v0.1.23; mmengine 0.10.7, _strategy/deepspeed.py and logging/history_buffer.py.
"""

import ast
import contextlib
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.checkpoint.adapters import pairs_and_whole
from tessella.checkpoint.lowrank import Adapter
from tessella.checkpoint.weights import some
from tessella.errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".bin")
STATES, PARTITIONED = "mp_rank_*_model_states.pt", "zero_pp_rank_*"
PARTS = ("language_model.", "vision_model.", "mlp1.")
# What mmengine's message hub holds beside the weights: nothing of it is used, so each is stood in for by _Nothing.
LOGGER = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *("__builtin__.getattr", "builtins.getattr"),  # how pickle names the buffer's own methods
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.ndarray", "numpy.dtype", "numpy.dtypes.Float64DType", "numpy.dtypes.Float32DType", "numpy.dtypes.Int64DType"),
)


@dataclass(frozen=True)
class LoraScale:
    """What the tensors do not say. alpha: lora_alpha of the part; rank: r as the config has it, checked with the tensors."""

    alpha: float
    rank: int | None = None


class _Nothing:
    """Stands where the logger's objects stood: takes everything, does nothing."""

    def __new__(cls, *_: Any) -> "_Nothing":
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def is_xtuner(path: Path) -> bool:
    """Whether it is a pickle file, or a folder that DeepSpeed wrote."""
    if path.is_dir():
        return any(path.glob(STATES)) or any(path.glob(PARTITIONED))
    return path.is_file() and path.suffix in SUFFIXES


def read_xtuner(path: Path, scales: Mapping[str, LoraScale]) -> Adapter:
    """Read the .pth. scales: "language" and "tower", where they are known (see lora_scales).

    Raises CheckpointError: code in the pickle, ZeRO-3's scattered parameters, nothing that was taught, no alpha.
    """
    found = _load(_file_of(path))
    state = next((found[key] for key in ("state_dict", "module") if isinstance(found.get(key), Mapping)), found)
    tensors = {_plain(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    stray = [name for name in tensors if not name.startswith(PARTS)]
    if stray or not tensors:
        what = f"tensors of no InternVL: {some(stray, 3)}" if stray else "no tensors"
        raise CheckpointError(f"{path} holds {what}; give the .pth that XTuner's InternVL training wrote")
    if not scales:
        text = found.get("meta", {}).get("cfg") if isinstance(found.get("meta"), Mapping) else None
        scales = lora_scales(text, f"the config inside {path}") if isinstance(text, str) else {}

    def scale(module: str, a: Tensor) -> float:
        part = "tower" if module.startswith("vision_model.") else "language"
        if part not in scales:
            flag = "--lora-alpha" if part == "language" else "--tower-lora-alpha"
            raise CheckpointError(
                f"{path} holds a LoRA of rank {a.shape[0]} on the {part} ({module}), but not its alpha; give XTuner's config "
                f"(--xtuner-config FILE.py) or the number itself ({flag})"
            )
        told = scales[part]
        if told.rank is not None and told.rank != a.shape[0]:
            raise CheckpointError(
                f"{module}: the config says rank {told.rank}, {path} holds {a.shape[0]}; give the run's own config"
            )
        return told.alpha / a.shape[0]

    pairs, whole = pairs_and_whole(tensors, scale, path)
    return Adapter(path, "", pairs, whole)


def _plain(name: str) -> str:
    """model.language_model.base_model.model.model.layers… -> language_model.model.layers…"""
    for prefix in ("module.", "model."):
        name = name.removeprefix(prefix)
    return name.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".")


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    if any(path.glob(PARTITIONED)):
        raise CheckpointError(
            f"{path} holds parameters that ZeRO-3 scattered over its files; gather them first with the zero_to_fp32.py that "
            "DeepSpeed laid beside it, or train with stage3_gather_16bit_weights_on_model_save, and give the single file"
        )
    files = sorted(path.glob(STATES))
    if len(files) != 1:
        raise CheckpointError(
            f"{path} holds {len(files)} parts of a model that was split between GPUs; we read one: train with tp 1"
        )
    return files[0]


def _code_in(path: Path) -> list[str]:
    """Names of code in an old pickle, which is no zip, read without running it; those of tensors are left out."""
    found: list[str] = []
    words: list[str] = []
    # Behind the pickles lie the numbers, which read as operations end in one of these, a length of petabytes among them.
    with path.open("rb") as file, contextlib.suppress(ValueError, OverflowError, MemoryError):
        while True:
            for operation, argument, _place in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    found.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.append(".".join(words[-2:]))
                elif isinstance(argument, str):
                    words.append(argument)
    return [name for name in found if name not in LOGGER and not name.startswith(("torch.", "collections."))]


def _told_code(path: Path, names: Sequence[str]) -> str:
    return (
        f"{path} is a pickle with code in it ({some(sorted(names))}), which is refused: it would run on opening. "
        "Save the state_dict alone, where you trust the file, and give that"
    )


def _load(path: Path) -> Mapping[str, Any]:
    """The dict of a pickle of tensors. Raises CheckpointError, naming what is refused."""
    allowed = [(_Nothing, name) for name in LOGGER]
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
            if refused:
                raise CheckpointError(_told_code(path, refused))
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # torch's own words advise to open it all the same, with the code in it
        code = [] if is_zip or not path.is_file() else _code_in(path)
        if code:
            raise CheckpointError(_told_code(path, code)) from error
        raise CheckpointError(
            f"{path} cannot be read: it is no pickle of tensors, or it is cut or damaged; fetch or save it again"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, must be a dict of tensors")
    return found


def lora_scales(text: str, where: str) -> dict[str, LoraScale]:
    """XTuner's config, as text -> the LoRA of "language" (llm_lora) and "tower" (visual_encoder_lora), as far as it has them.

    Raises CheckpointError when it is no Python text, names no LoRA, or one whose arithmetic we do not have.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"{where} is no Python text ({error}); give the config file of the XTuner run") from error
    plain = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    for part, word in (("language", "llm_lora"), ("tower", "visual_encoder_lora")):
        for value in _values_of(tree, word):
            fields = {key: plain.get(node.id) if isinstance(node, ast.Name) else _constant(node) for key, node in _fields(value)}
            if fields.get("use_dora") or fields.get("use_rslora"):
                raise CheckpointError(f"{where}: {word} uses DoRA or rank-stabilised LoRA, which we cannot merge from a .pth")
            alpha, rank = fields.get("lora_alpha"), fields.get("r")
            if isinstance(alpha, int | float):
                found[part] = LoraScale(float(alpha), rank if isinstance(rank, int) else None)
    if not found:
        raise CheckpointError(f"{where} names no lora_alpha of llm_lora or visual_encoder_lora; say it with --lora-alpha")
    return found


def _values_of(tree: ast.AST, word: str) -> Iterator[ast.expr]:
    """What a keyword argument, a dict's key or a variable of that name is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == word:
            yield node.value
        elif isinstance(node, ast.Dict):
            yield from (value for key, value in _fields(node) if key == word)
        elif isinstance(node, ast.Assign) and any(isinstance(name, ast.Name) and name.id == word for name in node.targets):
            yield node.value


def _fields(node: ast.expr) -> list[tuple[str, ast.expr]]:
    """dict(a=1) or {"a": 1} -> its fields; none for anything else."""
    if isinstance(node, ast.Call):
        return [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    if isinstance(node, ast.Dict):
        return [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if _is_word(key)]  # type: ignore[union-attr]
    return []


def _is_word(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None
