"""A model as two GGUF files for llama.cpp: model.gguf (language model, tokenizer, template) and mmproj.gguf (tower, projector).

In: a Source.  Out: a folder with both, and Proofs: each file is read again, what was moved is moved back, and every number is
compared with the source's, merged ones by the merge in float64. Tensors pass through one at a time.
Matrices keep their type, or get the one asked for; vectors, patches and places are float32, as llama.cpp computes with them.
What llama.cpp makes of the files is not asked here: bench/llama_cpp.py does that.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from tessella.checkpoint.folder import new_folder
from tessella.checkpoint.gguf_tables import (
    ARCHITECTURES,
    Named,
    language_tensors,
    refuse_unchecked,
    tower_numbers,
    tower_tensors,
)
from tessella.checkpoint.gguf_tokenizer import GgufTokens, gguf_tokens
from tessella.checkpoint.progress import byte_bar
from tessella.checkpoint.proof import PromptProof, Proofs
from tessella.checkpoint.source import Source
from tessella.checkpoint.tensor_proof import Verdict, merged_verdict, same_bits, summed
from tessella.checkpoint.weights import Entry
from tessella.config import ModelConfig
from tessella.errors import CheckpointError, ConfigError

LANGUAGE_FILE, TOWER_FILE = "model.gguf", "mmproj.gguf"
TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
NOT_ASKED = "llama.cpp runs these files, not we; bench/llama_cpp.py asks both"


def write_gguf(source: Source, out: Path, dtype: torch.dtype | None, *, force: bool) -> tuple[Proofs, list[Entry]]:
    """Write and prove. dtype: of the matrices; None keeps each one's own.

    Raises ConfigError for a family that could not be checked against llama.cpp, CheckpointError when it cannot be written or is
    not the same as before.
    """
    refuse_unchecked(source.config)
    if source.routing is not None:
        raise ConfigError(f"{source.path} answers in boxes and masks, which GGUF has no words for; say --to official or native")
    tokens = gguf_tokens(source.folder, source.config)
    files = {
        LANGUAGE_FILE: language_tensors(source.config, source.shapes),
        TOWER_FILE: tower_tensors(source.config, source.shapes),
    }
    entries = [_entry(source, named, dtype) for part in files.values() for named in part]
    num_bytes = sum(entry.num_bytes for entry in entries)
    with new_folder(out, num_bytes=num_bytes + 2**24, force=force) as aside:
        with byte_bar("writing", num_bytes) as advance:
            for name, part in files.items():
                file = _begun(aside / name, source.config, tokens)
                _write_tensors(file, part, source, dtype, advance)
        with byte_bar("comparing", num_bytes) as advance:
            verdicts = [one for name, part in files.items() for one in _compare(aside / name, part, source, advance)]
        prompts = _compare_tokens(aside / LANGUAGE_FILE, tokens)
        proof = Proofs((), len(tower_numbers(source.config)), summed(verdicts), prompts, None, NOT_ASKED)
        proof.require(f"{source.path} as GGUF")
    return proof, entries


def _stored(source: Source, named: Named, dtype: torch.dtype | None) -> torch.dtype:
    return torch.float32 if named.wide else dtype or source.dtype(named.ours)


def _entry(source: Source, named: Named, dtype: torch.dtype | None) -> Entry:
    stored = _stored(source, named, dtype)
    return Entry(named.theirs, source.shapes[named.ours], stored, lambda: source.tensor(named.ours, stored))


def _begun(path: Path, config: ModelConfig, tokens: GgufTokens) -> gguf.GGUFWriter:
    """A file with its keys, before its tensors."""
    if path.name == LANGUAGE_FILE:
        file = gguf.GGUFWriter(str(path), ARCHITECTURES[config.language.architecture])
        _put_language(file, config)
        tokens.put(file)
        return file
    file = gguf.GGUFWriter(str(path), "clip")
    file.add_type("mmproj")
    file.add_string("clip.projector_type", "internvl")
    file.add_bool("clip.has_vision_encoder", True)
    file.add_bool("clip.use_gelu", True)
    for key, number in tower_numbers(config).items():
        put = file.add_array if isinstance(number, list) else file.add_uint32 if isinstance(number, int) else file.add_float32
        put(f"clip.vision.{key}", number)
    return file


def _put_language(file: gguf.GGUFWriter, config: ModelConfig) -> None:
    language = config.language
    file.add_context_length(language.max_positions)  # beyond it llama.cpp has no dynamic NTK
    file.add_embedding_length(language.hidden_size)
    file.add_block_count(language.num_layers)
    file.add_feed_forward_length(language.intermediate_size)
    file.add_head_count(language.num_heads)
    file.add_head_count_kv(language.num_kv_heads)
    file.add_key_length(language.head_dim)
    file.add_value_length(language.head_dim)
    file.add_rope_dimension_count(language.head_dim)
    file.add_rope_freq_base(language.rope_theta)
    file.add_layer_norm_rms_eps(language.norm_eps)
    file.add_vocab_size(language.vocab_size)


def _write_tensors(
    file: gguf.GGUFWriter, part: list[Named], source: Source, dtype: torch.dtype | None, advance: Callable[[int], None]
) -> None:
    for named in part:
        stored = _stored(source, named, dtype)
        shape = named.to_theirs(torch.empty(source.shapes[named.ours], device="meta")).shape
        file.add_tensor_info(named.theirs, shape, np.dtype(np.float16), shape.numel() * stored.itemsize, TYPES[stored])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    for named in part:
        tensor = named.to_theirs(source.tensor(named.ours, _stored(source, named, dtype))).contiguous()
        file.write_tensor_data(tensor.reshape(-1).view(torch.uint8).numpy())
        advance(tensor.numel() * tensor.itemsize)
    file.close()


def _compare(path: Path, part: list[Named], source: Source, advance: Callable[[int], None]) -> list[Verdict]:
    """The file as it lies on the disk, tensor by tensor."""
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    kinds = {kind: dtype for dtype, kind in TYPES.items()}
    verdicts = []
    for named in part:
        if named.theirs not in there:
            raise CheckpointError(f"{path.name} lacks {named.theirs}; it was not kept")
        tensor = there[named.theirs]
        flat = torch.from_numpy(np.array(tensor.data).reshape(-1).view(np.uint8)).view(kinds[tensor.tensor_type])
        lying = flat.reshape([int(size) for size in reversed(tensor.shape.tolist())])
        found = named.to_ours(lying, source.shapes[named.ours])
        verdicts.append(_verdict(source, named.ours, found))
        advance(found.numel() * found.itemsize)
    return verdicts


def _verdict(source: Source, name: str, found: Tensor) -> Verdict:
    size = found.numel() * found.itemsize
    if source.touches(name):
        return merged_verdict(source, name, found)
    wanted = source.untaught(name)
    if same_bits(wanted.to(found.dtype), found):
        exact = found.dtype == wanted.dtype or found.dtype == torch.float32
        return Verdict("equal" if exact else "rounded", size)
    share = float((wanted.float() != found.float()).float().mean())
    return Verdict("differing", size, f"{name} differs in {share:.1%} of its numbers")


def _compare_tokens(path: Path, tokens: GgufTokens) -> PromptProof:
    """Tokens and template as they lie in the file."""
    fields = gguf.GGUFReader(str(path)).fields
    names, template = (fields[f"tokenizer.{key}"].contents() for key in ("ggml.tokens", "chat_template"))
    differing = [f"token {number} is another" for number, (a, b) in enumerate(zip(names, tokens.names, strict=True)) if a != b]
    differing += ["the chat template is another"] if template != tokens.template else []
    return PromptProof(0, len(tokens.template), len(tokens.names), tuple(differing))
