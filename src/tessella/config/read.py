"""Which model a config.json describes, and how it is read.

In: the dict of a config.json.  Out: ModelConfig.
Fields that change the arithmetic are read strictly; the sixty inherited fields of PretrainedConfig are ignored.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tessella.config.blip2 import ARCHITECTURES as BLIP2
from tessella.config.blip2 import blip2
from tessella.config.fields import read_config_json
from tessella.config.internvl import native, official
from tessella.config.llava import ARCHITECTURES as LLAVA
from tessella.config.llava import llava
from tessella.config.parts import ModelConfig
from tessella.errors import ConfigError

OFFICIAL, NATIVE = "InternVLChatModel", "InternVLForConditionalGeneration"


def load_config(folder: Path) -> ModelConfig:
    """Read FOLDER/config.json. Raises CheckpointError when it is missing or no JSON, ConfigError when we cannot run it."""
    return model_config(read_config_json(folder))


def layout_name(raw: Mapping[str, Any]) -> str:
    """Which layout a config.json is of: "official", "native", or a relative's, as "llava". Raises ConfigError."""
    architectures = raw.get("architectures") or []
    found = next((READERS[name][0] for name in architectures if name in READERS), None)
    if found is None:
        raise ConfigError(
            f"config.json: architectures is {architectures}; we can run {OFFICIAL} (official layout), {NATIVE} (native layout), "
            f"and its relatives {', '.join(name for name in READERS if name not in (OFFICIAL, NATIVE))}"
        )
    return found


def is_native(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a layout of transformers; False is the official one. Raises ConfigError for other models."""
    return layout_name(raw) != "official"


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The dict of a config.json, of any layout -> ModelConfig. Raises ConfigError naming the field."""
    layout = layout_name(raw)
    return next(read for known, read in READERS.values() if known == layout)(raw)


# What stands in architectures -> (layout, how it is read)
READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], ModelConfig]]] = {
    OFFICIAL: ("official", official),
    NATIVE: ("native", native),
    **{name: (family, partial(llava, family=family)) for name, family in LLAVA.items()},
    **{name: (family, partial(blip2, family=family)) for name, family in BLIP2.items()},
}
