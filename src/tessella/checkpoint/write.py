"""A model becomes a folder in the official layout that InternVL's own code and other engines open.

In: our parameters (made one at a time), a config, and the folder whose side files are carried over.
Out: config.json, generation_config.json, weights in one file or shards with an index, tokenizer files, and our manifest.
The folder appears whole or not at all (folder.py); tied heads are not stored twice.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessella.checkpoint.folder import MANIFEST, finished_files, new_folder, note_finished
from tessella.checkpoint.layout import generation_config, official_config, preprocessor_config
from tessella.checkpoint.names import join, official_name, official_shape, our_names
from tessella.checkpoint.progress import byte_bar
from tessella.checkpoint.weights import INDEX, SINGLE, Entry, write_file
from tessella.config import LanguageConfig, ModelConfig, read_config_json, read_json
from tessella.errors import CheckpointError

SHARD_BYTES = 5 * 10**9  # as the official folders
# Files of the base that are carried over as they are; the weights and the JSONs that we write ourselves are not.
SIDE_SUFFIXES = (".json", ".model", ".txt", ".py", ".jinja", ".md")
OUR_FILES = ("config.json", "generation_config.json", INDEX, MANIFEST, "adapter_config.json")


def write_official(
    parameters: Sequence[Entry],
    folder: Path,
    config: ModelConfig,
    *,
    end_ids: Sequence[int],
    base_folder: Path | None = None,
    files: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    plan: str | None = None,
) -> Path:
    """Write an official folder.

    parameters: under our names, every parameter of the config's model.  end_ids: tokens that end a turn, for generation_config.
    base_folder: its config.json is kept but for what we changed, its tokenizer and *.py are carried over untouched.
    files: further text files by name, as {"tokenizer.json": …}; at least a tokenizer when there is no base_folder.
    check: called with the folder while it still lies aside; what it raises leaves nothing behind.
    plan: see new_folder; shards that a stopped run with this plan finished are not written again.
    Raises CheckpointError when the folder must not be written over, the disk has no room, or it cannot be written.
    """
    entries = _entries(parameters, config.language)
    shards = _shards(entries, shard_bytes)
    num_bytes = sum(entry.num_bytes for entry in entries)
    side_bytes = sum(path.stat().st_size for path in side_files(base_folder)) if base_folder else 0
    hashes: dict[str, str] = {}
    with new_folder(folder, num_bytes=num_bytes + side_bytes, force=force, known_hashes=hashes, plan=plan) as aside:
        hashes |= finished_files(aside)
        for path in side_files(base_folder) if base_folder else ():
            shutil.copyfile(path, aside / path.name)
        for name, text in (files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")
        _write_json_files(aside, config, dtype_name(entries), end_ids, base_folder)
        _write_shards(aside, shards, hashes)
        if len(shards) > 1:
            weight_map = {entry.name: name for name, part in shards.items() for entry in part}
            _write_json(aside / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        if check is not None:
            check(aside)
    return folder


def _write_shards(folder: Path, shards: Mapping[str, Sequence[Entry]], hashes: dict[str, str]) -> None:
    """Write the shards that hashes does not hold yet, noting each in it and in the folder as it is done."""
    missing = {name: part for name, part in shards.items() if name not in hashes}
    with byte_bar("writing", sum(entry.num_bytes for part in missing.values() for entry in part)) as advance:
        for name, part in missing.items():
            hashes[name] = write_file(folder / name, part, advance)
            note_finished(folder, name, hashes[name])


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


def _entries(parameters: Sequence[Entry], language: LanguageConfig) -> list[Entry]:
    """Our parameters as tensors of the file, InternLM2's q, k and v joined when their turn comes."""
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    by_name = {parameter.name: parameter for parameter in parameters}

    def entry(official: str) -> Entry:
        ours = our_names(official, language)
        missing = [name for name in ours if name not in by_name]
        if missing:
            raise CheckpointError(f"{official} cannot be written without {', '.join(missing)}")
        dtype = by_name[ours[0]].dtype
        return Entry(
            official,
            official_shape(official, shapes, language),
            dtype,
            lambda: join(official, {name: by_name[name].make() for name in ours}, language),
        )

    return [entry(official) for official in dict.fromkeys(official_name(name, language) for name in by_name)]


def _shards(entries: Sequence[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
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


def _write_json_files(folder: Path, config: ModelConfig, stored: str, end_ids: Sequence[int], base_folder: Path | None) -> None:
    raw = official_config(config, stored)
    old: dict[str, Any] = {}
    if base_folder is not None:
        base = read_config_json(base_folder)
        tied = config.language.tie_embeddings
        raw = {**base, "torch_dtype": stored, "use_backbone_lora": 0, "use_llm_lora": 0}
        if bool(base["llm_config"].get("tie_word_embeddings", False)) != tied:  # resolve_head believed the weights
            raw["llm_config"] = {**base["llm_config"], "tie_word_embeddings": tied}
            raw["tie_word_embeddings"] = tied
        if (base_folder / "generation_config.json").is_file():
            old = read_json(base_folder / "generation_config.json")
    _write_json(folder / "config.json", raw)
    _write_json(folder / "generation_config.json", generation_config(old, end_ids))
    if not (folder / "preprocessor_config.json").is_file():
        _write_json(folder / "preprocessor_config.json", preprocessor_config(config))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
