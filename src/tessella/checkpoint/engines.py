"""Does another engine answer like us? Prompts, ids and first-token log probabilities, each side with its own code.

In: a Source and an engine's name.  Out: rows for verify's table. The engine runs in a process of its own (engine_probe.py), on
the source itself when it is native, else on a native export made for the occasion.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tessella.chat import render, text_of
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.source import Source
from tessella.checkpoint.verify import conversations, logits_on
from tessella.errors import CheckpointError, ConfigError
from tessella.inputs import Inputs, Picture

ENGINES = ("transformers",)
# Largest difference of a log probability that counts as equal. With pictures the two resize with their own code; of words alone
# only the order of sums differs.
LIMIT, LIMIT_WITH_PICTURES = 1e-3, 0.05


@dataclass(frozen=True)
class EngineProof:
    """How an engine's answers compare with ours. version "" when it is not installed: nothing was compared."""

    engine: str
    version: str
    prompts: tuple[str, ...] = ()  # what differs, a sentence each
    ids: tuple[str, ...] = ()
    largest: float = 0.0  # difference of log probabilities on words alone
    largest_with_pictures: float = 0.0
    equal_first: int = 0  # talks whose likeliest first token is the same
    talks: int = 0

    @property
    def near(self) -> bool:
        return self.largest <= LIMIT and self.largest_with_pictures <= LIMIT_WITH_PICTURES and self.equal_first == self.talks

    @property
    def holds(self) -> bool:
        return not self.prompts and not self.ids and self.near

    def rows(self) -> list[tuple[str, str, bool | None]]:
        if not self.version:
            return [(self.engine, f"not installed here; pip install {self.engine}", None)]
        told = (
            f"largest difference {self.largest:.1g} on words (limit {LIMIT:g}), {self.largest_with_pictures:.1g} with pictures "
            f"(limit {LIMIT_WITH_PICTURES:g}); likeliest token equal in {self.equal_first} of {self.talks}"
        )
        name = f"{self.engine} {self.version}"
        return [
            (f"{name}: prompts", "; ".join(self.prompts) or f"{self.talks} prompts", not self.prompts),
            (f"{name}: ids", "; ".join(self.ids) or f"{self.talks} prompts", not self.ids),
            (f"{name}: first-token logprobs", told, self.near),
        ]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": list(self.prompts), "ids": list(self.ids), "holds": self.holds}


def engines_named(words: str) -> tuple[str, ...]:
    """ "transformers" -> its names. Raises ConfigError for one that we cannot ask."""
    names = tuple(word.strip() for word in words.split(",") if word.strip())
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise ConfigError(f"--engines {words}: {', '.join(unknown)} cannot be asked; known are {', '.join(ENGINES)}")
    return names


def ask(engine: str, source: Source) -> EngineProof:
    """Compare one engine with us. Raises CheckpointError when it fails on the folder."""
    if importlib.util.find_spec(engine) is None:
        return EngineProof(engine, "")
    if source.config.family != "internvl":
        raise ConfigError(f"--engines asks about InternVL models; {source.path} is a {source.config.family} model: leave it away")
    inputs = Inputs.load(source.folder, source.config)
    # without the limits on tiles that our own proof sets, because a folder's processor knows only the folder's limit
    talks = [(messages, [Picture(picture.source) for picture in pictures]) for messages, pictures in conversations()]
    with tempfile.TemporaryDirectory(prefix="tessella-") as place:
        found, rows = _answers(source, talks, Path(place))
    ours = [inputs.build(messages, pictures) for messages, pictures in talks]
    wanted = [logits[-1].log_softmax(-1) for logits in logits_on(source.model(torch.device("cpu")), ours)]
    prompts, ids, differences = [], [], {False: 0.0, True: 0.0}
    bos = inputs.tokenizer.bos_id if inputs.template.add_bos else None
    for number, ((messages, pictures), one, theirs) in enumerate(zip(talks, ours, found["talks"], strict=True), 1):
        text = text_of(render(messages, inputs.template, open_turn=True))
        text = text if bos is None else f"{inputs.tokenizer.name_of(bos)}{text}"
        if text != theirs["prompt"]:
            prompts.append(f"prompt {number} is {theirs['prompt']!r} there and {text!r} here")
        if one.ids.tolist() != theirs["ids"]:
            tiles = f", tiles {theirs['tiles']} there and {list(one.tiles_per_picture)} here" if pictures else ""
            ids.append(f"prompt {number} has other ids: {len(theirs['ids'])} there and {len(one)} here{tiles}")
        difference = float((rows[number - 1] - wanted[number - 1]).abs().max())
        differences[bool(pictures)] = max(differences[bool(pictures)], difference)
    equal = sum(int(a.argmax() == b.argmax()) for a, b in zip(rows, wanted, strict=True))
    return EngineProof(
        engine, found["version"], tuple(prompts), tuple(ids), differences[False], differences[True], equal, len(talks)
    )


def _answers(source: Source, talks: list[Any], place: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """The engine's own process on the talks -> its JSON, and a row of log probabilities for each talk."""
    folder = source.path
    if source.kind != "native":
        folder = convert(source.path, place / "native", Wish(to="native", proof="tensors")).folder
    asked = []
    for number, (messages, pictures) in enumerate(talks):
        files = [place / f"{number}-{index}.png" for index in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.source.save(file)
        asked.append(
            {"messages": [{"role": m.role, "content": m.text} for m in messages], "pictures": [str(file) for file in files]}
        )
    (place / "talks.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, "-m", "tessella.checkpoint.engine_probe", str(folder), str(place / "talks.json")]
    done = subprocess.run([*command, str(place / "out.json")], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise CheckpointError(f"transformers could not answer from {folder}: {last}; other versions may, see its changelog")
    rows = load_file(place / "out.safetensors")
    return json.loads((place / "out.json").read_text(encoding="utf-8")), [rows[str(i)] for i in range(len(talks))]
