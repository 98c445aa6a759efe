"""`tessella chat`: its flags, and how its words are read."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from tessella.checkpoint.published import PUBLISHED
from tessella.commands.place import Here, Place, Result
from tessella.errors import ConfigError


@dataclass(frozen=True)
class Chat:
    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help="Model folder, or tessella-nano.")] = None
    prompt: Annotated[Positional[str | None], arg(metavar="[PROMPT]", help="Question; without one, a conversation.")] = None
    image: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="PATH", help="A picture that the question is about.")] = ()
    system: str | None = None
    """Who the model is told to be; default: the template's own sentence."""
    temperature: float = 0.0
    """0 takes the likeliest token; more is livelier."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability, in (0, 1]."""
    max_tokens: int = 512
    """Longest answer in tokens."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what the model says."""
    seed: int | None = None
    """The same seed gives the same answers."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.checkpoint.read import load  # torch
        from tessella.sampling import SamplingParams  # torch
        from tessella.terminal import Talk, answer_once, converse  # torch

        model, prompt = words_of_chat(self.model, self.prompt)
        if prompt is None and not sys.stdin.isatty() and not (prompt := sys.stdin.read().strip()):
            raise ConfigError("there is neither a question nor a terminal to ask one in; give a PROMPT")
        params = SamplingParams(temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed)
        loaded = load(model, device=self.place.device, dtype=self.place.dtype, max_tiles=self.max_tiles)
        loaded.inputs.limit_megapixels = self.limit_megapixels
        talk = Talk(loaded, params, self.system)
        if prompt is None:
            converse(talk, list(self.image), sys.stdout)
        else:
            answer_once(talk, prompt, list(self.image), sys.stdout)
        return {"model": model, **talk.as_json()}


def words_of_chat(model: str | None, prompt: str | None) -> tuple[str, str | None]:
    """One word alone is a MODEL when it looks like one (a name that we know, a folder, a path, owner/name), else the PROMPT."""
    if model is not None and Path(model).is_file():
        raise ConfigError(f'"{model}" is a file, and a MODEL is a folder; a picture is shown with --image {model}')
    if model is None or prompt is not None:
        return model or "tessella-nano", prompt
    is_path = model.startswith((".", "/", "~")) or ("/" in model and not any(mark.isspace() for mark in model))
    if model == "tessella-nano" or model in PUBLISHED or is_path or Path(model).is_dir():
        return model, None
    return "tessella-nano", model
