"""JSON files of a model folder, and the fields that they must hold.

In: a folder or a file.  Out: dicts, or an error that names what is missing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessella.errors import CheckpointError, ConfigError


def read_config_json(folder: Path) -> dict[str, Any]:
    """The raw dict of FOLDER/config.json. Raises CheckpointError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no model folder; give one in the official or the native layout"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a model folder holds. Raises CheckpointError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, must be an object")
    return raw


def need(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ConfigError(f"{where} has no {key}; fetch the model's config.json again")
    return raw[key]


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = need(raw, key, "config.json")
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: {key} is a {type(found).__name__}, must be an object")
    return found
