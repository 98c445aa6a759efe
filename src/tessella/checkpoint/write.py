"""A model becomes a folder in the official layout, which InternVL's own code opens, or in the native one of transformers.

In: our parameters (made one at a time), a config, and the folder whose side files are carried over.
Out: config.json, generation_config.json, weights in one file or shards with an index, tokenizer files, and our manifest.
The folder appears whole or not at all (folder.py); tied heads are not stored twice.
A native folder keeps the official side files in the subfolder "official", untouched, so that the way back finds them;
a relative of InternVL keeps its own layout, and its base's files beside its weights.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tessella.chat import IMAGE_MARK, template_named
from tessella.checkpoint.folder import MANIFEST, finished_files, new_folder, note_finished
from tessella.checkpoint.jinja import SLOT, chat_template
from tessella.checkpoint.layout import (
    generation_config,
    native_config,
    native_processor_files,
    official_config,
    preprocessor_config,
)
from tessella.checkpoint.names import Group, Layout, groups_of, stored_shapes
from tessella.checkpoint.progress import byte_bar
from tessella.checkpoint.streams import Strips
from tessella.checkpoint.tokenizer_files import native_tokenizer_files
from tessella.checkpoint.weights import INDEX, SINGLE, Entry, write_file
from tessella.config import ConnectorConfig, LanguageConfig, ModelConfig, is_native, model_config, read_config_json, read_json
from tessella.errors import CheckpointError
from tessella.tokenizer import Tokenizer
from tessella.wordpiece import FOLDER as QUESTIONS

SHARD_BYTES = 5 * 10**9  # as the official folders
KEPT = "official"  # the subfolder of a native folder that holds the official side files
CHAT_TEMPLATE = "chat_template.jinja"
CONFIG_CODE = Path(__file__).parent.parent / "assets" / "official" / "configuration_internvl_chat.py.txt"
# Files of the base that are carried over as they are; the weights and the JSONs that we write ourselves are not.
SIDE_SUFFIXES = (".json", ".model", ".txt", ".py", ".jinja", ".md")
OUR_FILES = ("config.json", "generation_config.json", INDEX, MANIFEST, "adapter_config.json")
# Of a base in the other layout nothing but the tokenizer's files means the same.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")


def write_model(
    parameters: Sequence[Entry],
    folder: Path,
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    layout: Layout = "official",
    base_folder: Path | None = None,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    look: Callable[[Path], None] | None = None,
    check: Callable[[Path], None] | None = None,
    plan: str | None = None,
) -> Path:
    """Write a model folder.

    parameters: under our names, every parameter of the config's model.  end_ids: tokens that end a turn, for generation_config.
    base_folder: a folder of either layout; what its config.json says beyond ours stays, tokenizer and *.py are carried over.
    files: further text files by name, as {"tokenizer.json": …}; at least a tokenizer when there is no base_folder.
    look: called with each file of weights when it is done, beside the writing of the next; what it raises stops the writing.
    check: called with the folder while it still lies aside; what it raises leaves nothing behind.
    plan: see new_folder; shards that a stopped run with this plan finished are not written again.
    Raises CheckpointError when the folder must not be written over, the disk has no room, or it cannot be written;
    ConfigError when the layout cannot say what the model is.
    """
    entries = stored_entries(parameters, layout, config.language)
    shards = plan_shards(entries, shard_bytes)
    num_bytes = sum(entry.num_bytes for entry in entries)
    hashes: dict[str, str] = {}
    num_side_bytes = _side_bytes(base_folder)
    with new_folder(folder, num_bytes=num_bytes + num_side_bytes, force=force, known_hashes=hashes, plan=plan) as aside:
        hashes |= finished_files(aside)
        write_side_files(aside, config, layout, dtype_name(entries), end_ids, base_folder, files or {})
        _write_shards(aside, shards, hashes, look)
        if len(shards) > 1:
            write_index(aside, shards)
        if check is not None:
            check(aside)
    return folder


def _write_shards(
    folder: Path, shards: Mapping[str, Sequence[Entry]], hashes: dict[str, str], look: Callable[[Path], None] | None
) -> None:
    """Write the shards that hashes does not hold yet, noting each in it and in the folder as it is done."""
    missing = {name: part for name, part in shards.items() if name not in hashes}
    total = sum(entry.num_bytes for part in missing.values() for entry in part)
    beside = ThreadPoolExecutor(1)
    looks: list[Future[None]] = []
    try:
        with byte_bar("writing", total) as advance:
            for name, part in missing.items():
                hashes[name] = write_file(folder / name, part, advance)
                note_finished(folder, name, hashes[name])
                if look is not None:
                    looks.append(beside.submit(look, folder / name))
            for one in looks:
                one.result()
    finally:
        beside.shutdown(cancel_futures=True)


write_official = partial(write_model, layout="official")
write_native = partial(write_model, layout="native")


# ---- everything but the weights


def write_side_files(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    stored: str,
    end_ids: Sequence[int],
    base_folder: Path | None,
    files: Mapping[str, str],
) -> None:
    """All files of a model folder but its weights, into an existing empty folder. stored: the weights' type, as "bfloat16"."""
    if layout not in ("official", "native"):
        assert base_folder is not None and not files, "a relative's files are those of its base"
        return _write_relative_files(folder, config, stored, end_ids, base_folder)
    official = folder / KEPT if layout == "native" else folder
    official.mkdir(exist_ok=True)
    kept = official_side(base_folder) if base_folder else None
    for path in kept.files if kept else ():
        shutil.copyfile(path, official / path.name)
    for name, text in files.items():
        (official / name).write_text(text, encoding="utf-8")
    old_generation = read_json(kept.generation) if kept and kept.generation else {}
    write_json(official / "config.json", _official_json(config, stored, kept.config if kept else None))
    write_json(official / "generation_config.json", generation_config(old_generation, end_ids))
    if not (official / "preprocessor_config.json").is_file():
        write_json(official / "preprocessor_config.json", preprocessor_config(config))
    _add_what_engines_need(official, config)
    if layout == "native":
        _write_native_files(folder, official, config, stored, end_ids)


def _add_what_engines_need(official: Path, config: ModelConfig) -> None:
    """What other engines ask an official folder for and its base did not bring: a chat template, and code for its config.

    Without a template they fall back to one of their own, or to none: the most reported way to lose a fine-tune.
    """
    tokens = official / "tokenizer_config.json"
    told = tokens.is_file() and read_json(tokens).get("chat_template")
    if not told and not (official / CHAT_TEMPLATE).is_file():
        tokenizer = Tokenizer.load(official)
        text = chat_template(template_named(config.template), _bos(config, tokenizer), mark=IMAGE_MARK)
        (official / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    if config.connector == ConnectorConfig() and not (official / CONFIG_CODE.stem).is_file():
        shutil.copyfile(CONFIG_CODE, official / CONFIG_CODE.stem)


def _bos(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    begins = template_named(config.template).add_bos and tokenizer.bos_id is not None
    return tokenizer.name_of(tokenizer.bos_id) if begins and tokenizer.bos_id is not None else None


def _write_native_files(folder: Path, official: Path, config: ModelConfig, stored: str, end_ids: Sequence[int]) -> None:
    """The native folder's own files, from the official ones that lie in its subfolder."""
    for name, text in native_tokenizer_files(official).items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer, template = Tokenizer.load(folder), template_named(config.template)
    raw = native_config(config, stored, image_token_id=tokenizer.id_of(SLOT), end_id=end_ids[0])
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"eos_token_id": list(end_ids)})
    (folder / CHAT_TEMPLATE).write_text(chat_template(template, _bos(config, tokenizer)), encoding="utf-8")
    for name, content in native_processor_files(config).items():
        write_json(folder / name, content)


def _write_relative_files(folder: Path, config: ModelConfig, stored: str, end_ids: Sequence[int], base_folder: Path) -> None:
    """The files of a relative of InternVL are its base's own; config.json tells the type and the head as they are now."""
    for path in side_files(base_folder):
        shutil.copyfile(path, folder / path.name)
    if config.reads_question:
        shutil.copytree(base_folder / QUESTIONS, folder / QUESTIONS)
    raw = read_config_json(base_folder)
    raw |= {key: stored for key in ("dtype", "torch_dtype") if key in raw} or {"torch_dtype": stored}
    if model_config(raw).language.tie_embeddings != config.language.tie_embeddings:  # resolve_head believed the weights
        raw["tie_word_embeddings"] = config.language.tie_embeddings
        raw["text_config"] = {**raw["text_config"], "tie_word_embeddings": config.language.tie_embeddings}
    write_json(folder / "config.json", raw)
    generation = base_folder / "generation_config.json"
    old = read_json(generation) if generation.is_file() else {}
    write_json(folder / "generation_config.json", generation_config(old, end_ids))


@dataclass(frozen=True)
class OfficialSide:
    """What a base folder of either layout holds for an official one."""

    files: list[Path]
    config: dict[str, Any] | None
    generation: Path | None


def official_side(base_folder: Path) -> OfficialSide:
    """The official side files of a base: its own, or those that a native folder keeps, or of a stranger's the tokenizer."""
    folder = base_folder
    if is_native(read_config_json(base_folder)):
        folder = base_folder / KEPT
        if not (folder / "config.json").is_file():
            return OfficialSide([base_folder / name for name in TOKENIZER_FILES if (base_folder / name).is_file()], None, None)
    generation = folder / "generation_config.json"
    return OfficialSide(side_files(folder), read_config_json(folder), generation if generation.is_file() else None)


def _side_bytes(base_folder: Path | None) -> int:
    # twice: a native folder holds the tokenizer in both forms
    return 2 * sum(path.stat().st_size for path in official_side(base_folder).files) if base_folder else 0


def side_files(folder: Path) -> list[Path]:
    """The files of a model folder that are neither weights nor written by us: tokenizer, *.py, templates, licences."""
    kept = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in OUR_FILES]
    return [path for path in kept if path.suffix in SIDE_SUFFIXES or path.name in ("LICENSE", "NOTICE")]


def dtype_name(entries: Sequence[Entry]) -> str:
    """The type in which most bytes are stored, as config.json names it."""
    sizes: dict[str, int] = {}
    for entry in entries:
        name = str(entry.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + entry.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def stored_entries(parameters: Sequence[Entry], layout: Layout, language: LanguageConfig) -> list[Entry]:
    """Our parameters as tensors of the file, joined or cut when their turn comes."""
    by_name = {parameter.name: parameter for parameter in parameters}
    shapes = {parameter.name: parameter.shape for parameter in parameters}

    def make(group: Group, stored: str) -> Tensor:
        return group.to_stored([by_name[name].make() for name in group.ours], language)[stored]

    entries = []
    for group in groups_of(by_name, layout, language):
        missing = [name for name in group.ours if name not in by_name]
        if missing:
            raise CheckpointError(f"{group.stored[0]} cannot be written without {', '.join(missing)}")
        dtype = by_name[group.ours[0]].dtype
        strips = _stored_strips(group, [by_name[name] for name in group.ours], language)
        entries += [
            Entry(stored, shape, dtype, partial(make, group, stored), strips.get(stored))
            for stored, shape in stored_shapes(group, shapes, language).items()
        ]
    return entries


def _stored_strips(group: Group, ours: Sequence[Entry], language: LanguageConfig) -> dict[str, Strips]:
    """Where the bytes of a group's stored tensors lie already; nothing when one of ours is yet to be made."""
    lying = [entry.strips for entry in ours if entry.strips is not None and entry.dtype == ours[0].dtype]
    return group.to_stored(lying, language) if len(lying) == len(ours) else {}


def plan_shards(entries: Sequence[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """File name -> its tensors; a file is at most shard_bytes unless one tensor alone is larger."""
    parts: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if parts[-1] and filled + entry.num_bytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.num_bytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Entry]]) -> None:
    """The index of a folder's shards."""
    weight_map = {entry.name: name for name, part in shards.items() for entry in part}
    total = sum(entry.num_bytes for part in shards.values() for entry in part)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _official_json(config: ModelConfig, stored: str, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json: the base's own, but for what we changed; ours where there is none, or it is of another model by now."""
    if base is None or _untied(model_config(base)) != _untied(config):
        return official_config(config, stored)
    raw = {**base, "torch_dtype": stored, "use_backbone_lora": 0, "use_llm_lora": 0}
    tied = config.language.tie_embeddings
    if bool(base["llm_config"].get("tie_word_embeddings", False)) != tied:  # resolve_head believed the weights
        raw["llm_config"] = {**base["llm_config"], "tie_word_embeddings": tied}
        raw["tie_word_embeddings"] = tied
    return raw


def _untied(config: ModelConfig) -> ModelConfig:
    return replace(config, language=replace(config.language, tie_embeddings=False))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
