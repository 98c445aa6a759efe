"""The engine on a GPU with the shapes of InternVL2-2B in bfloat16: one stream, many requests, pictures, first tokens.

    python bench/shapes.py --profile --json shapes.json

Prints a table beside the bars of one H200. --rows first one_tile measures those alone. To find what is slow or wrong, switch
parts off one by one: --run-ahead False, --own-prompts False, --own-products False, --cuda-graphs False, --kernels False.
--profile adds the kernels of decode steps, of one row and of many, and of prompts with pictures. --peers
vllm=http://127.0.0.1:8000 asks a server that was started beforehand the same. The weights are random numbers and the tokenizer
is made up, so nothing is fetched; answers say nothing, speeds do. Pictures are cut into tiles before the clock starts, but for
the row that says "from the pixels".
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch.profiler import ProfilerActivity, profile
from work import QUESTIONS, Run, about, ask, noise, picture_questions

from tessella.chat import Message
from tessella.config import LanguageConfig, ModelConfig, VisionConfig
from tessella.engine.engine import Engine
from tessella.engine.request import EngineSettings
from tessella.image import Size
from tessella.inputs import Inputs, ModelInput
from tessella.model.vision_language import VisionLanguageModel
from tessella.provenance import provenance
from tessella.sampling import SamplingParams
from tessella.tokenizer import Tokenizer

ONE_TILE, SEVEN_TILES, THIRTEEN_TILES = Size(448, 448), Size(1344, 896), Size(1792, 1344)
ONE_TOKEN = SamplingParams(max_tokens=1)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


ROWS = ("stream", "stream_13", "first", "text", "one_tile", "seven_tiles")


@dataclass(frozen=True)
class Options:
    device: str = "cuda"
    tiny: bool = False  # the same work with a tiny model and few requests: a trial of this file on a CPU
    json: Path | None = None
    run_ahead: bool | None = None
    cuda_graphs: bool = True
    kernels: bool = True
    own_products: bool = True
    own_prompts: bool = True
    profile: bool = False  # which kernels take how long
    rows: tuple[Literal["stream", "stream_13", "first", "text", "one_tile", "seven_tiles"], ...] = ROWS  # what is measured
    peers: tuple[str, ...] = ()  # NAME=URL of OpenAI servers, asked the same over HTTP afterwards
    text_requests: int = 512
    one_tile_requests: int = 256
    seven_tile_requests: int = 128
    answer_tokens: int = 128
    rounds: int = 3  # of each row; the best counts, for first tokens the median


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    number: float
    unit: str
    bar: float | None = None  # at least this, for milliseconds at most

    @property
    def reached(self) -> bool | None:
        if self.bar is None:
            return None
        return self.number <= self.bar if self.unit == "ms" else self.number >= self.bar


def shape(options: Options) -> ModelConfig:
    """InternVL2-2B: InternViT-300M and InternLM2-1.8B with 92,553 rows."""
    language = LanguageConfig("InternLM2ForCausalLM", 92553, 2048, 8192, 24, 16, 8, 128, rope_dynamic_factor=2.0)
    vision = VisionConfig(hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size_px=448)
    if options.tiny:
        language = replace(language, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
        vision = replace(vision, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2)
    return ModelConfig(vision, language, "internlm2-chat")


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> VisionLanguageModel:
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model = model.to_empty(device=device).to(dtype)
    chance = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=chance)
    return model.eval()


def made_up_backend(vocab_size: int) -> Backend:
    """Bytes, the special tokens that a prompt needs, and words between them that no text becomes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"word{i}" for i in range(vocab_size - len(alphabet) - len(SPECIAL)))]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return backend


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    backend = made_up_backend(vocab_size)
    with TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        return Tokenizer.load(folder)


class Bench:
    """Each piece of work begins with empty caches, in an engine of its own."""

    def __init__(self, options: Options):
        self.options = options
        self.config = shape(options)
        self.answer = SamplingParams(max_tokens=options.answer_tokens)
        self.device = torch.device(options.device)
        self.model = random_model(self.config, self.device, torch.float32 if options.tiny else torch.bfloat16)
        self.tokenizer = made_up_tokenizer(self.config.language.vocab_size)
        self.inputs = Inputs(self.config, self.tokenizer, system="You are quick.")

    def text(self, count: int) -> list[ModelInput]:
        """count prompts of 71 tokens, as those were that other engines were measured with; each begins in its own way."""
        room = 72 - len(self.inputs.build([Message("user", "?")]))  # a letter is a token here
        told = [f"{number} {QUESTIONS[number % len(QUESTIONS)]}"[:room].ljust(room, "?") for number in range(count)]
        return [self.inputs.build([Message("user", text)]) for text in told]

    def engine(self) -> Engine:
        gc.collect()  # the engine before is gone, and its blocks with it
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        cache = 40_000 if self.options.tiny else None
        o = self.options
        switches = {"run_ahead": o.run_ahead, "cuda_graphs": o.cuda_graphs, "kernels": o.kernels, "own_products": o.own_products}
        switches["own_prompts"] = o.own_prompts
        settings = EngineSettings(cache_fraction=0.7, cache_tokens=cache, max_waiting=4096, **switches)  # type: ignore[arg-type]
        engine = Engine(self.model, self.tokenizer, settings)
        engine.start()
        ask(engine, self.text(2), SamplingParams(max_tokens=4))  # kernels are compiled, memory is taken
        return engine

    def batch(self, work: str, prompts: list[ModelInput], bar: float | None = None) -> list[Row]:
        runs = []
        for _ in range(self.options.rounds):
            engine = self.engine()
            runs.append(ask(engine, prompts, self.answer))
            engine.stop()
            del engine
        best = max(runs, key=lambda run: run.requests_per_second)
        return [
            Row(work, best.requests_per_second, "requests/s", bar),
            Row(work, best.tokens_per_second, "tokens/s"),
            Row(f"{work}, first token, median", 1000 * statistics.median(best.seconds_to_first), "ms"),
        ]

    def stream(self, work: str, prompt: ModelInput, bar: float | None = None) -> Row:
        engine = self.engine()
        runs: list[Run] = [ask(engine, [prompt], self.answer) for _ in range(self.options.rounds)]
        engine.stop()
        return Row(work, max(run.tokens_per_second_after_the_first for run in runs), "tokens/s", bar)

    def first_tokens(self) -> list[Row]:
        """A picture of 13 tiles: its first token, with and without cutting it into tiles, and that of a second question."""
        engine = self.engine()
        ready, second, whole = [], [], []
        for seed in range(self.options.rounds + 1):
            picture = noise(THIRTEEN_TILES, seed)
            begun = time.perf_counter()
            prompt = about(self.inputs, picture)
            made = time.perf_counter() - begun
            ready.append(ask(engine, [prompt], ONE_TOKEN).seconds_to_first[0])
            whole.append(made + ready[-1])
            again = about(self.inputs, picture, question="And how many are there?")
            second.append(ask(engine, [again], ONE_TOKEN).seconds_to_first[0])
        engine.stop()
        times = {"ready tiles": (ready, 80.0), "from the pixels": (whole, 80.0), "second question about it": (second, 15.0)}
        return [
            Row(f"first token, 13 tiles, {what}", 1000 * statistics.median(took[1:]), "ms", bar)
            for what, (took, bar) in times.items()
        ]

    def profiles(self) -> dict[str, str]:
        """What each kind of step is made of: torch's table of kernels, by the time on the device."""
        many = self.text(min(256, self.options.text_requests))
        work = {
            "one stream": (self.text(1), self.answer),
            f"{len(many)} streams": (many, self.answer),
            "a picture of 13 tiles, first token": (picture_questions(self.inputs, 1, THIRTEEN_TILES, first_seed=99), ONE_TOKEN),
        }
        if self.options.one_tile_requests:
            several = picture_questions(self.inputs, min(64, self.options.one_tile_requests), ONE_TILE, first_seed=1000)
            work[f"{len(several)} requests with one tile"] = (
                several,
                replace(self.answer, max_tokens=min(16, self.answer.max_tokens)),
            )
        engine, tables = self.engine(), {}
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        for what, (prompts, params) in work.items():
            with profile(activities=kinds) as found:
                ask(engine, prompts, params)
            tables[f"{what}, {params.max_tokens} tokens each"] = found.key_averages().table(sort_by=by, row_limit=25)
        engine.stop()
        return tables

    def all(self) -> list[Row]:
        """Short work first, each row told as it comes: what is cut off then has told most."""
        o, inputs = self.options, self.inputs
        few = {"text": o.text_requests, "one_tile": o.one_tile_requests, "seven_tiles": o.seven_tile_requests}
        work: dict[str, Callable[[], list[Row]]] = {
            "stream": lambda: [self.stream("one stream, text", self.text(1)[0], 700.0)],
            "stream_13": lambda: [self.stream("one stream, 13 tiles", picture_questions(inputs, 1, THIRTEEN_TILES)[0])],
            "first": self.first_tokens,
            "text": lambda: self.batch(f"{few['text']} text requests", self.text(few["text"]), 300.0),
            "one_tile": lambda: self.batch(
                f"{few['one_tile']} requests, 1 tile", picture_questions(inputs, few["one_tile"], ONE_TILE), 150.0
            ),
            "seven_tiles": lambda: self.batch(
                f"{few['seven_tiles']} requests, 7 tiles", picture_questions(inputs, few["seven_tiles"], SEVEN_TILES), 30.0
            ),
        }
        assert tuple(work) == ROWS
        return [row for name in ROWS if name in o.rows for row in heard(work[name]())]


def heard(rows: list[Row]) -> list[Row]:
    for row in rows:
        print(f"{row.work}: {row.number:,.1f} {row.unit}", file=sys.stderr, flush=True)
    return rows


def peer_rows(name: str, url: str, options: Options) -> list[Row]:
    """The same work over HTTP: the picture's cutting and the server itself are on that clock."""
    from peer_http import measured  # here: it needs httpx2, which a machine that measures ours alone may lack

    many = options.text_requests, options.one_tile_requests, options.seven_tile_requests
    asked = [f"{number} {QUESTIONS[number % len(QUESTIONS)]}" for number in range(max(*many, 1))]
    measured(url, asked[:1], ONE_TILE, 4)  # whatever is made at the first request
    alone, tokens = measured(url, asked[:1], None, options.answer_tokens), options.answer_tokens
    first = statistics.median(measured(url, asked[:1], THIRTEEN_TILES, 1).first_ms for _ in range(options.rounds))
    rows = [
        Row(f"{name}: one stream, text", alone.stream_tokens_per_second, "tokens/s"),
        Row(f"{name}: first token, 13 tiles, from the same picture", first, "ms"),
    ]
    kinds = (
        (many[0], "text requests", None),
        (many[1], "requests, 1 tile", ONE_TILE),
        (many[2], "requests, 7 tiles", SEVEN_TILES),
    )
    for count, what, size in kinds:
        rows.append(Row(f"{name}: {count} {what}", measured(url, asked[:count], size, tokens).requests_per_second, "requests/s"))
    return rows


def main(options: Options) -> None:
    peers = [peer.partition("=") for peer in options.peers]
    if wrong := [name for name, _, url in peers if not url.startswith("http")]:
        raise SystemExit(f"--peers {wrong[0]}: say NAME=URL, for instance vllm=http://127.0.0.1:8000")
    where = provenance()
    bench = Bench(options)
    rows = bench.all()
    for name, _, url in peers:
        rows += peer_rows(name, url, options)
    kind = str(bench.model.dtype).removeprefix("torch.")
    print(
        f"{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}, {kind}, {options.answer_tokens} tokens each\n"
    )
    print("| work | number | | bar | reached |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        bar, reached = ("" if row.bar is None else f"{row.bar:,.0f}"), {None: "", True: "yes", False: "no"}[row.reached]
        print(f"| {row.work} | {row.number:,.1f} | {row.unit} | {bar} | {reached} |", flush=True)
    profiles = bench.profiles() if options.profile else {}
    for what, table in profiles.items():
        print(f"\n{what}\n{table}")
    if options.json:
        told = {"command": "bench/shapes.py", "where": asdict(where), "dtype": kind, "profiles": profiles}
        told["rows"] = [asdict(row) | {"reached": row.reached} for row in rows]
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
