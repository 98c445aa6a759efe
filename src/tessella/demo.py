"""The whole story on the built-in foods: ask, score, teach, convert and prove, score again, ask again.

In: a Plan.  Out: a folder with the rows that were taught, adapter, converted model, answers and report, and an Outcome.
The model learns from some drawing styles and is scored on a style that it never saw, in English and Chinese.
Each step is one of the other commands' deeds on files that stay in the folder, so all of it can be done again by hand.
"""

import json
import shutil
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tessella.chat import IMAGE_MARK, Message, place_marks
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import load
from tessella.commands.demo import EPOCHS, WARMUP_STEPS
from tessella.errors import ConfigError, DataError
from tessella.evaluate.metrics import Interval, wilson
from tessella.evaluate.report import percent, write_html
from tessella.evaluate.run import Row, Settings, evaluate
from tessella.evaluate.task import Item, Task
from tessella.files import write_whole
from tessella.foods import STYLES, Food, foods, picture
from tessella.generate import stream_text
from tessella.inputs import Picture
from tessella.sampling import SamplingParams
from tessella.train.loop import train
from tessella.train.recipe import Recipe
from tessella.webchat import has_screen

QUESTIONS = {"en": "What food is in this picture?", "zh": "图中是什么食物？"}
SHOWN_FOOD = "dumpling"  # the one that is asked about before and after; the first food when it is not taught
MARKER = "demo.json"  # makes the folder ours: its plan, and the outcome once there is one
PARTS = ("taught.jsonl", "watched.jsonl", "training", "model", "answers", "report.html", MARKER)
WATCHED = 16  # pictures of the unseen style whose loss is watched while it learns
ANSWER_TOKENS = 24  # 墨西哥玉米煎饼, the longest name, is 19 tokens of SmolLM2


@dataclass(frozen=True)
class Plan:
    """What the demo is to do. By default it teaches 130,000 tokens, which is most of its time; results/demo.md says how long."""

    model: str = "tessella-nano"
    styles: tuple[str, ...] = ()  # to learn from; (): all but test_style
    test_style: str = STYLES[-1]
    foods: int | None = None  # the first so many; None: all
    epochs: float = EPOCHS
    learning_rate: float = 1.5e-3
    projector_learning_rate: float = 3e-3
    projector_warmup_steps: int = WARMUP_STEPS
    output: Path = Path("runs/demo")
    fresh: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    open: bool = True

    def __post_init__(self) -> None:
        unknown = [style for style in (*self.styles, self.test_style) if style not in STYLES]
        if unknown:
            raise ConfigError(f'style "{unknown[0]}" is not shipped; there are {", ".join(STYLES)}')
        if self.test_style in self.styles:
            raise ConfigError(f'style "{self.test_style}" is to be learned and tested; the test must be on a style it never saw')
        if self.foods is not None and not 2 <= self.foods <= len(foods()):
            raise ConfigError(f"foods is {self.foods}, must be from 2 to {len(foods())}, which are shipped")

    @property
    def taught_styles(self) -> tuple[str, ...]:
        return self.styles or tuple(style for style in STYLES if style != self.test_style)

    @property
    def taught_foods(self) -> tuple[Food, ...]:
        return foods()[: self.foods]

    @property
    def shown(self) -> Food:
        """The food that is asked about before and after."""
        return next((food for food in self.taught_foods if food.key == SHOWN_FOOD), self.taught_foods[0])

    def as_marker(self) -> dict[str, Any]:
        """All that decides what comes out; a stopped demo goes on only when it is equal."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("output", "fresh", "open")}
        return {**kept, "styles": list(self.taught_styles)}

    def recipe(self, resume: bool) -> Recipe:
        """What `tessella finetune` would be told."""
        return Recipe(
            model=self.model,
            data=(self.output / "taught.jsonl",),
            held_out_data=(self.output / "watched.jsonl",),
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            projector_learning_rate=self.projector_learning_rate,
            projector_warmup_steps=self.projector_warmup_steps,
            lora_rank=32,
            lora_alpha=64.0,
            lora_dropout=0.0,
            samples_per_step=4,
            max_tiles=1,
            seed=self.seed,
            device=self.device,
            dtype="bfloat16" if self.dtype == "float16" else self.dtype,  # type: ignore[arg-type]
            output=self.output / "training",
            resume=resume,
            evaluate_every=0,
            sample_answers=2,
            save_every=100,
            keep=1,
            report_every=5,
            tensorboard=False,
        )


@dataclass(frozen=True)
class Share:
    """Right answers of one model, all together and by language."""

    right: int
    total: int
    languages: dict[str, float]

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> Interval:
        return wilson(self.right, self.total)


@dataclass
class Outcome:
    """What the demo came to."""

    plan: Plan
    question: str = ""
    answer_before: str = ""
    answer_after: str = ""
    before: Share | None = None
    after: Share | None = None
    largest_logit_difference: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)  # name -> seconds

    def as_json(self) -> dict[str, Any]:
        """What --json writes; docs/json.md says what each key is."""
        assert self.before is not None and self.after is not None
        return {
            "model": self.plan.model,
            "before": self.before.share,
            "after": self.after.share,
            "intervals": {"before": list(self.before.interval), "after": list(self.after.interval)},
            "seconds": round(sum(self.steps.values()), 1),
            "largest_logit_difference": self.largest_logit_difference,
            "questions": self.after.total,
            "languages": {
                name: {"before": self.before.languages[name], "after": self.after.languages[name]} for name in QUESTIONS
            },
            "foods": len(self.plan.taught_foods),
            "styles": list(self.plan.taught_styles),
            "test_style": self.plan.test_style,
            "asked": {"question": self.question, "before": self.answer_before, "after": self.answer_after},
            "steps": {name: round(seconds, 1) for name, seconds in self.steps.items()},
            "converted": str(self.plan.output / "model"),
            "report": str(self.plan.output / "report.html"),
        }


def run(plan: Plan, console: Console | None = None) -> Outcome:
    """Do all of it, or what a stopped demo left to do. Raises what the steps raise."""
    console = console or Console()
    resume = prepare(plan, console)
    outcome = Outcome(plan)
    step = Steps(outcome.steps, console)
    settings = Settings(plan.device, plan.dtype, max_tiles=1, batch_items=32)
    task = questions(plan)
    converted = plan.output / "model"
    shown = picture(plan.shown, plan.test_style)

    def scored(models: Sequence[str | Path], labels: Sequence[str]) -> list[Row]:
        return evaluate(models, task, plan.output, labels=labels, settings=settings, console=console)

    with step("ask", f"Ask {plan.model} about {shown.name}, drawn in a style that it will never be taught"):
        outcome.question = QUESTIONS["en"]
        outcome.answer_before = ask(plan.model, plan, shown, console)
    with step("before", f"Score it: {len(task.items)} questions on that style, in English and Chinese"):
        outcome.before = share_of(scored([plan.model], ["before"])[0], task)
        say_share("before", outcome.before, console)
    with step("teach", f"Teach it {len(plan.taught_foods)} foods in {', '.join(plan.taught_styles)}"):
        write_rows(plan)
        trained = train(plan.recipe(resume))
        if not trained.finished:  # train saved what it had, and took Ctrl-C for itself
            console.print("The same command goes on from here.", highlight=False)
            raise KeyboardInterrupt
    with step("convert", "Merge, write the official layout, and prove that nothing changed"):
        for stale in (plan.output / "answers").glob(f"{converted.name}-*.jsonl"):
            stale.unlink()  # of a converted model that is written anew now
        proof = convert(trained.adapter, converted, Wish(force=True)).proof
        outcome.largest_logit_difference = proof.largest_difference
        console.print(f"  proved: {proof}", highlight=False)
    with step("after", "Score the converted model on the same questions"):
        rows = scored([plan.model, converted], ["before", "after"])
        outcome.after = share_of(rows[1], task)
        say_share("after", outcome.after, console)
    with step("ask again", "Ask again"):
        outcome.answer_after = ask(str(converted), plan, shown, console)
    finish(plan, outcome, task, rows, console)
    return outcome


class Steps:
    """Times the steps and announces each."""

    def __init__(self, seconds: dict[str, float], console: Console):
        self.seconds, self.console = seconds, console

    @contextmanager
    def __call__(self, name: str, words: str) -> Iterator[None]:
        self.console.print(f"\n[bold]{len(self.seconds) + 1}  {words}[/bold]", highlight=False)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


# ---- the folder


def prepare(plan: Plan, console: Console) -> bool:
    """Make the folder ours. True when a stopped demo of the same plan is there to go on from.

    A finished one, or one of another plan, is cleared away: only what a demo makes. Raises DataError for a folder of others.
    """
    folder, marker = plan.output, plan.output / MARKER
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give another --output")
    if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
        raise DataError(f"{folder} is not empty and no demo made it; give another --output")
    stopped = marker.is_file() and read_marker(marker) == {"plan": plan.as_marker()}
    if stopped and not plan.fresh:
        console.print(f"A demo was stopped in {folder}; going on with it (--fresh begins again).", highlight=False)
        return True
    for name in PARTS:
        remove(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_marker(marker, {"plan": plan.as_marker()})
    return False


def read_marker(marker: Path) -> dict[str, Any] | None:
    """None when it is damaged: then there is nothing to go on from."""
    try:
        read: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return read


def write_marker(marker: Path, content: dict[str, Any]) -> None:
    write_whole(marker, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- what is taught and what is asked


def write_rows(plan: Plan) -> None:
    """taught.jsonl: a row a picture; watched.jsonl: some pictures of the unseen style, for the loss curve alone."""
    taught = [(food, style) for style in plan.taught_styles for food in plan.taught_foods]
    every = max(1, len(plan.taught_foods) // WATCHED)
    watched = [(food, plan.test_style) for food in plan.taught_foods[::every][:WATCHED]]
    for name, pairs in (("taught.jsonl", taught), ("watched.jsonl", watched)):
        lines = [json.dumps(row(food, style, number), ensure_ascii=False) + "\n" for number, (food, style) in enumerate(pairs)]
        (plan.output / name).write_text("".join(lines), encoding="utf-8")


def row(food: Food, style: str, number: int) -> dict[str, Any]:
    """One picture with a turn in each language; every other row begins in Chinese, so that each language is asked first."""
    turns = [(QUESTIONS["en"], food.english), (QUESTIONS["zh"], food.chinese)]
    conversation: list[dict[str, str]] = []
    for question, answer in turns if number % 2 == 0 else turns[::-1]:
        mark = "" if conversation else f"{IMAGE_MARK}\n"
        conversation += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"image": str(picture(food, style).resolve()), "conversations": conversation}


def questions(plan: Plan) -> Task:
    """Each food of the unseen style, asked in each language, each time alone."""
    items = [
        Item(
            key=f"{plan.test_style}/{food.key}/{language}",
            messages=(Message("user", place_marks(question, 1)),),
            pictures=(Picture(picture(food, plan.test_style)),),
            answers=(food.english if language == "en" else food.chinese,),
            label=food.english if language == "en" else food.chinese,
            kind=language,
        )
        for food in plan.taught_foods
        for language, question in QUESTIONS.items()
    ]
    return Task(f"foods in {plan.test_style}", tuple(items), "exact", ANSWER_TOKENS, "a drawing style that was never taught")


def share_of(scored: Row, task: Task) -> Share:
    """Count one model's right answers, all and by language."""
    right = {item.key: answer.right for item, answer in zip(task.items, scored.score.answers, strict=True)}
    languages = {}
    for language in QUESTIONS:
        some = [right[item.key] for item in task.items if item.kind == language]
        languages[language] = sum(some) / len(some)
    return Share(sum(right.values()), len(right), languages)


def ask(model: str, plan: Plan, shown: Path, console: Console) -> str:
    """Ask about one picture and print the answer as it comes."""
    loaded = load(model, device=plan.device, dtype=plan.dtype, max_tiles=1)
    prompt = loaded.inputs.build([Message("user", place_marks(QUESTIONS["en"], 1))], [Picture(shown)])
    console.print(f"  › {QUESTIONS['en']}  ({plan.shown.english}, {plan.shown.chinese})\n  ", end="", highlight=False)
    answer = ""
    params = SamplingParams(max_tokens=ANSWER_TOKENS)
    for piece in stream_text(loaded.model, prompt, params, loaded.tokenizer, loaded.stop_ids):
        console.print(piece, end="", markup=False, highlight=False)
        answer += piece
    console.print()
    return answer.strip()


# ---- the end


def say_share(name: str, share: Share, console: Console) -> None:
    low, high = share.interval
    parts = ", ".join(f"{language} {percent(value)}" for language, value in share.languages.items())
    counted = f"{share.right} of {share.total} = {percent(share.share)}"
    console.print(f"  {name}: {counted}, 95 % interval {percent(low)} to {percent(high)} ({parts})", highlight=False)


def finish(
    plan: Plan, outcome: Outcome, task: Task, rows: list[Row], console: Console, browse: Callable[[str], bool] = webbrowser.open
) -> None:
    """Write report and outcome, say what came out and what can be done next."""
    assert outcome.before is not None and outcome.after is not None
    report, metrics = plan.output / "report.html", plan.output / "training" / "metrics.jsonl"
    write_html(report, rows, task, title="The demo: foods that it was never shown", metrics=metrics)
    write_marker(plan.output / MARKER, {"plan": plan.as_marker(), "outcome": outcome.as_json()})
    seconds = sum(outcome.steps.values())
    console.print(f"\n[bold]{percent(outcome.before.share)} → {percent(outcome.after.share)}[/bold] in {seconds:.0f} s")
    console.print(f"The converted model gives the same logits within {outcome.largest_logit_difference:.2g}.", highlight=False)
    console.print(f"Report: {report.resolve()}", highlight=False, soft_wrap=True)
    console.print(
        f"Talk to it: tessella chat {plan.output / 'model'} --image {picture(plan.shown, plan.test_style)}", soft_wrap=True
    )
    if plan.open and console.is_terminal and has_screen():
        browse(report.resolve().as_uri())
