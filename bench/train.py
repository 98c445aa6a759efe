"""Teaching LoRA beside transformers with PEFT: same weights, same samples, same batches, in one run.

    python bench/train.py --threads 1                    tessella-nano on a CPU, its own drawings of foods
    python bench/train.py --shape 2b --json 2b.json      InternVL2-2B's shapes on a GPU, random weights: LoRA of rank 128, 7 tiles
                                                         and 128 text tokens a sample; then everything taught

Both sides teach LoRA on the decoder's seven linear layers with a frozen tower and projector. transformers' side: its own InternVL
class, PEFT's LoRA, rows padded to the longest of a step, labels on the answers, AdamW fused. Ours: the passes and the optimiser
of `tessella finetune`, once with every picture seen for the first time and once with what the frozen tower says kept.
Batches are made beforehand on both sides. The first step of each is left out. CPU time says something on a busy machine, too,
with --threads 1. --profile: what one more step of each is made of; tables go to --json, or to the screen without it.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peer import native_model
from peft import LoraConfig, get_peft_model
from shapes import Options as Shapes
from shapes import random_model, shape
from torch.profiler import ProfilerActivity, profile
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tessella.chat import Message
from tessella.checkpoint.layout import native_config
from tessella.checkpoint.read import load
from tessella.foods import foods, picture
from tessella.image import normalise
from tessella.inputs import ModelInput, Picture
from tessella.model.device import choose_device, choose_dtype
from tessella.model.vision_language import VisionLanguageModel
from tessella.provenance import provenance
from tessella.train.batch import StepData, pack_all
from tessella.train.flops import rate_of, wait, work_of
from tessella.train.lora import prepare
from tessella.train.optimiser import Optimiser
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.recipe.ways import LANGUAGE_TARGETS

TILES, TEXT, ANSWER = 7, 128, 32  # of a sample of InternVL2-2B's shapes


@dataclass(frozen=True)
class Options:
    shape: Literal["nano", "2b", "tiny"] = "nano"  # "tiny": 2b's work with a tiny model, a trial of this file
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None  # of the CPU; None: torch's own number
    steps: int = 6  # of each way, the first not counted
    samples_per_step: int = 4
    rank: int | None = None  # of LoRA; None: 16 for nano, else 128
    compile: bool = False  # our layers
    ways: tuple[Literal["peer", "peer-checkpointing", "lora", "full"], ...] = ()  # default: all that the shape has
    profile: bool = False  # the kernels of one more step of each of our ways
    json: Path | None = None


@dataclass(frozen=True)
class Speed:
    """One way of teaching. samples_cpu_s: samples a second of this process's own CPU time."""

    way: str
    samples_s: float
    samples_cpu_s: float
    tokens_s: float
    mfu: float  # share of the rate of a large product on this device
    first_loss: float  # of the first step, before anything is learned
    memory_gib: float  # the most that a GPU held
    profile: tuple[str, ...] = ()  # of one more step: what the host waited for, and tables of what took longest


@dataclass(frozen=True)
class Ground:
    """What every way is measured on. make: the model anew, untouched; peer: the same in transformers' class."""

    rows: list[list[ModelInput]]  # of each step
    make: Callable[[], VisionLanguageModel]
    peer: Callable[[], Any]
    device: torch.device
    dtype: torch.dtype
    rank: int
    profiled: bool = False


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    ground = nano(options) if options.shape == "nano" else made_up(options)
    rate = rate_of(ground.device, ground.dtype)
    many = ground.device.type == "cuda" or options.shape == "tiny"  # a CPU has no need to save memory
    usual = ("peer", *(("peer-checkpointing",) if many else ()), "lora", *(("full",) if options.shape != "nano" else ()))
    speeds: list[Speed] = []
    for way in options.ways or usual:
        if way == "lora":
            speeds += ours(ground, rate, recipe_of(ground, options), "Tessella, LoRA")
        elif way == "full":
            whole = Recipe(language="full", tower="full", projector="train", compile=options.compile, learning_rate=1e-5)
            speeds += ours(ground, rate, whole, "Tessella, everything taught")
        else:
            speeds.append(theirs(ground, rate, checkpointing=way == "peer-checkpointing"))
        print(f"{speeds[-1].way}: {speeds[-1].samples_s:.2f} samples/s", flush=True)  # what is cut off then has told most
    tell(options, ground, rate, speeds)


def recipe_of(ground: Ground, options: Options) -> Recipe:
    return Recipe(
        lora_rank=ground.rank, lora_alpha=2.0 * ground.rank, lora_dropout=0.0, projector="frozen", compile=options.compile,
        samples_per_step=options.samples_per_step, tokens_per_pass=2**20, learning_rate=1e-4, lora_layers=None,
    )  # fmt: skip


def nano(options: Options) -> Ground:
    """The built-in model and its drawings: a question and an answer in one of two languages, of different lengths."""
    loaded = load("tessella-nano", device=options.device, dtype=options.dtype)
    rows = []
    for index in range((options.steps + options.profile) * options.samples_per_step):
        food = foods()[index % len(foods())]
        asked = ("What food is in this picture?", food.english) if index % 2 else ("图中是什么食物？", food.chinese)
        turns = [Message("user", f"<image>\n{asked[0]}"), Message("assistant", asked[1])]
        style = ("fluent-3d", "fluent-flat", "noto")[index // len(foods()) % 3]
        rows.append(loaded.inputs.build(turns, [Picture(picture(food, style))], open_turn=False))

    def make() -> VisionLanguageModel:
        return load("tessella-nano", device=options.device, dtype=options.dtype).model

    model = loaded.model
    return Ground(
        in_steps(rows, options), make, lambda: native_model(loaded), model.device, model.dtype, options.rank or 16,
        options.profile,
    )  # fmt: skip


def made_up(options: Options) -> Ground:
    """InternVL2-2B's shapes, random weights: every sample the same 7 tiles' slots and text, every tile another."""
    config = shape(Shapes(tiny=options.shape == "tiny"))
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    chance = torch.Generator().manual_seed(0)
    slot, count = config.language.vocab_size - 1, 1 if options.shape == "tiny" else TILES
    rows = []
    for number in range((options.steps + options.profile) * options.samples_per_step):
        text = torch.randint(0, slot, (TEXT,), generator=chance)
        ids = torch.cat((text[: TEXT // 2], torch.full((count * config.slots_per_tile,), slot), text[TEXT // 2 :]))
        learn = torch.arange(len(ids)) >= len(ids) - ANSWER
        side = config.tile_size_px
        tiles = torch.randint(0, 256, (count, 3, side, side), generator=chance, dtype=torch.uint8)
        digests = tuple(f"{number}/{tile}" for tile in range(count))
        rows.append(ModelInput(ids, learn, ids == slot, tiles, (count,), digests))

    def peer() -> Any:
        raw = native_config(config, str(dtype).removeprefix("torch."), image_token_id=slot, end_id=0)
        with device:
            return InternVLForConditionalGeneration(InternVLConfig(**raw)).to(dtype)

    return Ground(
        in_steps(rows, options), lambda: random_model(config, device, dtype), peer, device, dtype, options.rank or 128,
        options.profile,
    )  # fmt: skip


def in_steps(rows: list[ModelInput], options: Options) -> list[list[ModelInput]]:
    size = options.samples_per_step
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def theirs(ground: Ground, rate: float, *, checkpointing: bool) -> Speed:
    """transformers and PEFT: a plain loop over padded batches."""
    torch.manual_seed(0)
    targets = rf".*language_model.*\.({'|'.join(LANGUAGE_TARGETS)})"
    model = get_peft_model(ground.peer(), LoraConfig(r=ground.rank, lora_alpha=2 * ground.rank, target_modules=targets))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    batches = [padded(rows, ground.device) for rows in ground.rows]

    def step(number: int) -> torch.Tensor:
        batch = {name: tensor.to(ground.device, non_blocking=True) for name, tensor in batches[number].items()}
        batch["pixel_values"] = normalise(batch["pixel_values"], ground.dtype)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    # The same arithmetic is counted for both sides: what must be done, not what is.
    mine = ground.make()
    prepare(mine, Recipe(lora_rank=ground.rank, projector="frozen"))
    work = work_of(mine, Recipe(lora_rank=ground.rank, projector="frozen"))
    del mine

    def done(number: int) -> float:
        return sum(work.of(one, len(one.tiles)) for one in pack_all(ground.rows[number], 2**30))

    return measured("transformers + PEFT" + (", gradient checkpointing" if checkpointing else ""), ground, rate, step, done)


def padded(rows: Sequence[ModelInput], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows side by side, filled up behind to the longest; labels where the answers are. Ready to be copied to the device."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)], seen[index, : len(row)] = row.ids, 1
        labels[index, : len(row)] = torch.where(row.learn, row.ids, -100)
    batch = {"input_ids": ids, "attention_mask": seen, "labels": labels, "pixel_values": torch.cat([row.tiles for row in rows])}
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if device.type == "cuda" else batch


def packed(rows: Sequence[ModelInput], recipe: Recipe, device: torch.device) -> StepData:
    """The passes of a step, as the workers of finetune make them ahead of it."""
    data = StepData(pack_all(rows, recipe.tokens_per_pass), tuple(map(str, range(len(rows)))))
    return data.pin_memory() if device.type == "cuda" else data


def ours(ground: Ground, rate: float, recipe: Recipe, name: str) -> list[Speed]:
    """The passes of finetune: over samples that are new, and, where a part is frozen, over the same again."""
    torch.manual_seed(0)
    model = ground.make().train()
    optimiser = Optimiser(prepare(model, recipe), recipe, 1000)
    passes, taken = Passes(model, recipe), iter(range(1000))
    steps = [packed(rows, recipe, ground.device) for rows in ground.rows]

    def step(number: int) -> torch.Tensor:
        data = steps[number]
        total = torch.zeros((), device=ground.device)
        for pack in data.packs:
            share = passes.share(pack, data)
            share.backward()
            optimiser.accumulate()
            total += share.detach()
        optimiser.step(next(taken))
        return total

    def done(number: int) -> float:
        del number
        found, passes.done = passes.done, 0.0
        return found

    found = [measured(name, ground, rate, step, done)]
    if recipe.tower == "frozen":
        found.append(measured(f"{name}, what the tower says kept", ground, rate, step, done))
    return found


def measured(name: str, ground: Ground, rate: float, step: Callable[[int], torch.Tensor], done: Callable[[int], float]) -> Speed:
    """Every step but the first against the clock; the one that is profiled comes behind them."""
    gc.collect()
    if ground.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ground.device)
    first = float(step(0))
    done(0)
    timed = range(1, len(ground.rows) - ground.profiled)
    wait(ground.device)
    start, cpu = time.perf_counter(), time.process_time()
    operations = 0.0
    for number in timed:
        step(number)
        operations += done(number)
    wait(ground.device)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    samples, tokens = (sum(size(ground.rows[number]) for number in timed) for size in (len, lambda rows: sum(map(len, rows))))
    held = torch.cuda.max_memory_allocated(ground.device) / 2**30 if ground.device.type == "cuda" else 0.0
    tables = profiled(ground.device, lambda: step(len(ground.rows) - 1)) if ground.profiled else ()
    return Speed(name, samples / seconds, samples / cpu, tokens / seconds, operations / seconds / rate, first, held, tables)


def profiled(device: torch.device, step: Callable[[], torch.Tensor]) -> tuple[str, ...]:
    """What a step is made of: by the device's own time, and by the host's."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as found:
        start = time.perf_counter()
        step()
        launched = time.perf_counter() - start
        wait(device)
        whole = time.perf_counter() - start
    events = found.key_averages()
    told = f"one more step: all launched after {1000 * launched:.0f} ms, done after {1000 * whole:.0f} ms, under the profiler"
    orders = ("self_cuda_time_total", "self_cpu_time_total") if on_gpu else ("self_cpu_time_total",)
    return told, *(events.table(sort_by=order, row_limit=30, max_name_column_width=70) for order in orders)


def tell(options: Options, ground: Ground, rate: float, speeds: Sequence[Speed]) -> None:
    where = provenance()
    kind = str(ground.dtype).removeprefix("torch.")
    print(f"{where.command}\ncommit {where.commit}, {where.date}, {where.hardware}, {torch.get_num_threads()} threads, {kind}")
    print(f"a large product: {rate / 1e12:.2f} TFLOP/s\n")
    longest = max(len(row) for rows in ground.rows for row in rows)
    print(f"| {options.shape}, {options.samples_per_step} a step, up to {longest} tokens | samples/s | samples/s of CPU time |")
    print("| --- | --- | --- |")
    for one in speeds:
        more = f" ({one.mfu:.0%} of the rate, {one.memory_gib:.1f} GiB, first loss {one.first_loss:.4f})"
        print(f"| {one.way}{more} | {one.samples_s:.2f} | {one.samples_cpu_s:.3f} |")
    peers = [one for one in speeds if one.way.startswith("transformers")]
    base, clock = (max((getattr(one, of) for one in peers), default=0.0) for of in ("samples_cpu_s", "samples_s"))
    for one in speeds:
        if peers and one.way.startswith("Tessella, LoRA"):
            ratios = f"{one.samples_s / clock:.2f} times by the clock, {one.samples_cpu_s / base:.2f} times by CPU time"
            print(f"\n{one.way}: {ratios} as fast as transformers + PEFT")
    for one in speeds:
        for table in one.profile[: 1 if options.json else None]:
            print(f"\n{one.way}: {table}")
    if options.json:
        told = {"command": "bench/train.py", "where": asdict(where), "dtype": kind, "shape": options.shape, "rate": rate}
        options.json.write_text(json.dumps(told | {"ways": [asdict(one) for one in speeds]}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
