"""The command line: the only file that joins all rooms. Flags in, one deed, a result on the screen and, if asked, as JSON.

Every room that needs torch is imported inside the command that needs it: torch alone takes longer to import than the half second
in which `tessella --help` must answer. The Recipe is plain data and is imported at the top, because each of its fields is a flag.
"""

import difflib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from tessella.checkpoint.published import PUBLISHED
from tessella.errors import ConfigError, TessellaError, is_out_of_memory
from tessella.files import check_place, write_whole
from tessella.foods import STYLES
from tessella.helptext import ABOUT, CHAT, CONVERT, DEMO, EVALUATE, FINETUNE, INSPECT, SERVE, UI, VERIFY
from tessella.mistakes import MENDABLE, OPTIONAL, OUT_OF_MEMORY, tell
from tessella.serving import Serve
from tessella.train.recipe import Recipe, load_recipe
from tessella.webchat import Ui


@dataclass(frozen=True)
class Place:
    """Where it runs, and where its result goes."""

    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1 or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type; auto: bfloat16 where the device multiplies it in hardware."""
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""


Here = OmitArgPrefixes[Place]
Result = dict[str, Any]  # what --json writes


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


@dataclass(frozen=True)
class Finetune:
    recipe_file: Annotated[Positional[Path | None], arg(metavar="[RECIPE]", help="A TOML file; its keys are flags too.")] = None
    recipe: OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""

    def run(self) -> Result:
        from tessella.train.loop import train  # torch, PEFT

        result = train(self.recipe)
        # Beside what was learned, so that `evaluate --recipe` can score what this run held out.
        (result.output / "recipe.toml").write_text(replace(self.recipe, resume=False).to_toml(), encoding="utf-8")
        return result.as_json()


@dataclass(frozen=True)
class Convert:
    source: Annotated[Positional[str], arg(metavar="IN", help="Model, adapter, LoRA checkpoint, .pth, or tessella-nano.")]
    out: Annotated[Positional[Path], arg(metavar="OUT", help="Folder to make.")]
    to: Literal["official", "native", "adapter"] = "official"
    """Layout of OUT; adapter: only what was taught, apart from its base."""
    names: Literal["ours", "official", "native"] = "ours"
    """Whose names an adapter's modules get; official has InternLM2's fused wqkv, native is for transformers' own class."""
    base: str | None = None
    """The base model; default: the one that the adapter names."""
    xtuner_config: Path | None = None
    """Of a .pth: XTuner's config file, where its lora_alpha stands; it is read as text, not run."""
    lora_alpha: float | None = None
    """Of a .pth: lora_alpha of the language model's LoRA, instead of the config."""
    tower_lora_alpha: float | None = None
    """Of a .pth: lora_alpha of the tower's LoRA."""
    shard_gb: float = 5.0
    """Most GB (10^9 bytes) a file of weights holds; a model of more is written as shards."""
    proof: Literal["auto", "tensors", "logits"] = "auto"
    """tensors never runs the models, logits always does."""
    force: bool = False
    """Write over OUT if Tessella made it."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.checkpoint.convert import Wish, convert  # torch
        from tessella.checkpoint.source import Origin  # torch

        wish = Wish(
            to=self.to,
            names=self.names,
            dtype="base" if self.place.dtype == "auto" else self.place.dtype,  # auto: each tensor in its own type
            shard_bytes=int(self.shard_gb * 1e9),
            force=self.force,
            proof=self.proof,
            device=self.place.device,
        )
        origin = Origin(self.base, self.xtuner_config, self.lora_alpha, self.tower_lora_alpha)
        try:
            result = convert(self.source, self.out, wish, origin)
        except KeyboardInterrupt:
            if any(self.out.parent.glob(f".{self.out.name}.*.part")):
                print("\nFinished shards are kept; the same command goes on from there.", file=sys.stderr)
            raise
        print(f"{result.folder}: {result.about}\nproved: {result.proof}")
        return result.as_json()


@dataclass(frozen=True)
class Verify:
    a: Annotated[Positional[str], arg(metavar="A", help="A model in any form that convert takes.")]
    b: Annotated[Positional[str], arg(metavar="B", help="Another.")]
    proof: Literal["auto", "tensors", "logits"] = "auto"
    """tensors never runs the models, logits always does."""
    engines: str = ""
    """Other engines that answer from B with their own code; "transformers" can be asked."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.verification import verify  # torch

        return verify(self.a, self.b, self.proof, self.place.device, self.engines)


@dataclass(frozen=True)
class Evaluate:
    models: Annotated[
        Positional[tuple[str, ...]], arg(metavar="MODEL", help="One or more; the first is compared with the others.")
    ]
    data: tuple[Path, ...] = ()
    """Questions: JSON lines with question, image and answers; or any dataset that finetune reads."""
    recipe: Path | None = None
    """Score what this recipe holds out, as its run saw it; finetune leaves one in its output folder."""
    skills: bool = False
    """Score the built-in model's skills; --data is the folder that recipes/nano/make_data.py --stage skills wrote."""
    metric: Literal["exact", "contains", "choice", "anls"] = "exact"
    """What is right: the same words, holding them, the same letter, or near in spelling."""
    image_root: Path | None = None
    """Folder that picture paths of a dataset start from; default: where the data file lies."""
    choices: Literal["hidden", "shown", "both"] = "hidden"
    """FoodieQA: the choices are hidden, shown (for --metric choice), or both."""
    held_out: float | None = None
    """Of a dataset, score only what finetune holds out with the same number (a share, or a count) and seed; default: all."""
    seed: int = 0
    """Seed of the held-out split."""
    limit: int | None = None
    """Score only the first so many questions."""
    max_tokens: int = 32
    """Longest answer in tokens."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what each model says."""
    system: str | None = None
    """System message; default: the one of each model's template."""
    batch_items: int = 16
    """Questions that run together."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened."""
    forgetting: bool = False
    """Ask general questions too, to see what was forgotten."""
    output: Path = Path("runs/evaluate")
    """Folder where answers are kept; a run that was stopped goes on from them."""
    html: Path | None = None
    """Write a report with pictures, answers and confusions there."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.evaluate.run import Settings  # torch
        from tessella.scoring import Questions, score  # torch

        questions = Questions(
            data=self.data,
            recipe=self.recipe,
            skills=self.skills,
            image_root=self.image_root,
            choices=self.choices,
            held_out=self.held_out,
            seed=self.seed,
            limit=self.limit,
            limit_megapixels=self.limit_megapixels,
            metric=self.metric,
            max_tokens=self.max_tokens,
        )
        settings = Settings(
            self.place.device, self.place.dtype, self.max_tiles, self.system, self.batch_items, self.limit_megapixels
        )
        return score(self.models, questions, settings, self.output, self.html, self.forgetting)


@dataclass(frozen=True)
class Inspect:
    thing: Annotated[Positional[str], arg(metavar="THING", help="A picture, a dataset, or a model.")] = "tessella-nano"
    model: str = "tessella-nano"
    """The model through whose eyes pictures and datasets are seen."""
    output: Path | None = None
    """Of a picture: draw its tiles there; default: NAME-tiles.png here."""
    max_tiles: int | None = None
    """Most tiles a picture is cut into, 1 to 40; default: what the model says."""
    image_root: Path | None = None
    """Of a dataset: folder that picture paths start from; default: where the data file lies."""
    choices: Literal["hidden", "shown", "both"] = "hidden"
    """Of FoodieQA: the choices are hidden (answer in words), shown (answer a letter), or both."""
    limit_megapixels: float = 100.0
    """Largest picture that is opened."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.inspection import Look, inspect  # torch

        look = Look(self.model, self.output, self.max_tiles, self.image_root, self.choices, self.limit_megapixels)
        return inspect(self.thing, look, self.place.device, self.place.dtype)


@dataclass(frozen=True)
class Demo:
    model: str = "tessella-nano"
    """The model to teach."""
    styles: tuple[str, ...] = ()
    """Drawing styles to learn from, of those shipped; default: all but the test style."""
    test_style: str = STYLES[-1]
    """Drawing style that is only tested."""
    foods: int | None = None
    """Only the first so many foods; default: all."""
    epochs: float = 4.0
    """Passes over the pictures."""
    output: Path = Path("runs/demo")
    """Folder of everything the demo makes; a stopped demo goes on there, a finished one is done anew."""
    fresh: bool = False
    """Begin again, whatever a stopped demo left in the folder."""
    seed: int = 0
    """Seed of everything that chance decides."""
    open: bool = True
    """Open the report in a browser, where there is a screen."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.demo import Plan, run  # torch, PEFT

        plan = Plan(
            model=self.model,
            styles=self.styles,
            test_style=self.test_style,
            foods=self.foods,
            epochs=self.epochs,
            output=self.output,
            fresh=self.fresh,
            seed=self.seed,
            device=self.place.device,
            dtype=self.place.dtype,
            open=self.open,
        )
        return run(plan).as_json()


Command = Chat | Finetune | Convert | Verify | Evaluate | Serve | Inspect | Demo | Ui
# Each with what its own --help says; the list of commands shows the first line.
COMMANDS: dict[str, tuple[type[Command], str]] = {
    "demo": (Demo, DEMO),
    "chat": (Chat, CHAT),
    "finetune": (Finetune, FINETUNE),
    "convert": (Convert, CONVERT),
    "verify": (Verify, VERIFY),
    "evaluate": (Evaluate, EVALUATE),
    "serve": (Serve, SERVE),
    "inspect": (Inspect, INSPECT),
    "ui": (Ui, UI),
}

FORM = (tyro.conf.DisallowNone,)  # leaving a flag out is how one says None


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


def recipe_among(words: Sequence[str]) -> Path | None:
    """The RECIPE of `finetune`, which must be read before the flags are, since its values are their defaults."""
    return next((Path(word) for word in words if word.endswith(".toml") and not word.startswith("-")), None)


def parse(words: Sequence[str]) -> Command:
    """The words after `tessella` -> one command. Ends the program when help was asked for (0) or the words make no command (2).

    Raises ConfigError for a bad recipe.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(front_page())
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        sys.exit(tell(f'"{name}" is no command; {hint} (tessella --help tells more)'))
    kind, about = COMMANDS[name]
    if kind is Finetune:
        recipe = recipe_among(words[1:])
        default = Finetune(recipe=load_recipe(recipe))
        finetune = tyro.cli(
            Finetune, prog="tessella finetune", description=about, args=list(words[1:]), default=default, config=FORM
        )
        if finetune.recipe_file is not None and finetune.recipe_file != recipe:
            raise ConfigError(f"{finetune.recipe_file} is no recipe: a recipe is a .toml file; data goes behind --data")
        if finetune.recipe_file is None and recipe in finetune.recipe.data:
            raise ConfigError(f"{recipe} was read as data; the recipe goes first: tessella finetune {recipe} --data …")
        return finetune
    command: Command = tyro.cli(kind, prog=f"tessella {name}", description=about, args=list(words[1:]), config=FORM)
    return command


def front_page() -> str:
    """What `tessella --help` prints: the commands with a line each, then examples."""
    lines = [f"  {name:<10}{about.partition(chr(10))[0]}" for name, (_, about) in COMMANDS.items()]
    first, _, rest = ABOUT.partition("\n")
    return "\n".join([f"usage: tessella {{{','.join(COMMANDS)}}} …", "", first, "", "commands:", *lines, rest])


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code: 0 done, 1 verify found a difference, 2 something a person can mend, 130 Ctrl-C."""
    words = sys.argv[1:] if words is None else list(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese shows "?" and loses no answer
    try:
        command = parse(words)
        path = command.json if isinstance(command, (Finetune, Serve, Ui)) else command.place.json
        if path is not None:
            check_place("--json", path.expanduser())  # now, not after an hour's work
        result = {"command": type(command).__name__.lower(), "version": 1, **command.run()}
        if path is not None:
            write_whole(path.expanduser(), json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        if result.get("stopped_by") == "interrupted":  # finetune saves on Ctrl-C and ends in good order
            return 130
        return 1 if result.get("differs") else 0
    except TessellaError as error:
        return tell(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left, as `| head` does; leave quietly
        return 0
    except MemoryError:
        return tell(OUT_OF_MEMORY)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        return tell(f"{error.name} is not installed; {OPTIONAL[error.name]}")
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return tell(f"{error.filename or 'a file'}: {error.strerror}; {MENDABLE[error.errno]}")
    except RuntimeError as error:  # torch's out-of-memory error is one, and torch must not be imported here to name it
        if not is_out_of_memory(error):
            raise
        return tell(f"{OUT_OF_MEMORY}\n({str(error).splitlines()[0]})")


if __name__ == "__main__":
    sys.exit(main())
