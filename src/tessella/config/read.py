"""Which model a config.json describes, and how it is read.

In: the dict of a config.json.  Out: ModelConfig.
Fields that change the arithmetic are read strictly; the sixty inherited fields of PretrainedConfig are ignored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessella.config.fields import read_config_json
from tessella.config.internvl import native, official
from tessella.config.parts import ModelConfig
from tessella.errors import ConfigError

OFFICIAL, NATIVE = "InternVLChatModel", "InternVLForConditionalGeneration"


def load_config(folder: Path) -> ModelConfig:
    """Read FOLDER/config.json. Raises CheckpointError when it is missing or no JSON, ConfigError when we cannot run it."""
    return model_config(read_config_json(folder))


def is_native(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the native layout; False is the official one. Raises ConfigError for any other model."""
    architectures = raw.get("architectures") or []
    if NATIVE not in architectures and OFFICIAL not in architectures:
        raise ConfigError(
            f"config.json: architectures is {architectures}; we can run {OFFICIAL} (official layout) and {NATIVE} (native layout)"
        )
    return NATIVE in architectures


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of a config.json, official or native -> ModelConfig. Raises ConfigError naming the field."""
    return native(raw) if is_native(raw) else official(raw)
