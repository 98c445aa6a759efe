"""A recipe becomes a taught model: the run, step by step.

In: a Recipe (and samples, when a caller has its own).  Out: output/adapter in PEFT's format, or output/model in the official
layout when the language model is taught whole; checkpoints, metrics.jsonl and TensorBoard beside it.
The loss of a step is one mean over the learned tokens of all its passes, so the split into passes changes no gradient.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tessella.checkpoint.adapters import learned_in
from tessella.checkpoint.read import Loaded
from tessella.errors import DataError, TrainingError
from tessella.inputs import Inputs
from tessella.train.batch import StepData, Steps
from tessella.train.begin import load_to_teach
from tessella.train.dataset import Ledger, Sample
from tessella.train.limits import Stop, estimate_bytes, memory_told
from tessella.train.log import Event, Log
from tessella.train.lora import Taught, prepare
from tessella.train.multitask.teach import attach
from tessella.train.optimiser import Optimiser
from tessella.train.packing import Packing
from tessella.train.passes import HeldOut, Passes
from tessella.train.preference import PairSteps, Preference
from tessella.train.recipe import Recipe
from tessella.train.result import save_result
from tessella.train.state import Progress, check_same_run, newest, restore_random_state, save, saved
from tessella.train.streamed import Streamed
from tessella.train.supply import supply
from tessella.train.warmup import Warmup


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. as_json() holds the same under the same keys."""

    output: Path
    adapter: Path  # what was learned: an adapter folder, or the whole model's folder when language is "full"
    finished: bool
    stopped_by: str  # "" when finished, else "interrupted" or "time limit"
    steps: int
    total_steps: int
    losses: list[tuple[int, float]]  # (step, mean loss of the steps since the last report)
    held_out_losses: list[tuple[int, float]]
    seconds: float  # over all sittings
    tokens_per_s: float  # of this sitting's steps, evaluation and saving not counted
    learning_parameters: int
    ledger: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output), "adapter": str(self.adapter)}


def train(
    recipe: Recipe,
    *,
    samples: Sequence[Sample] | None = None,
    held_out: Sequence[Sample] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Run a recipe. samples, held_out: instead of reading the recipe's data.

    Ctrl-C and time_limit_s save and return with finished False. Raises TrainingError (another recipe, output in use,
    non-finite loss, disk full), DataError, ConfigError, CheckpointError, MemoryError_.
    """
    started = time.monotonic()
    check_output(recipe)
    torch.manual_seed(recipe.seed)  # initial LoRA, and dropout
    loaded, start = load_to_teach(recipe)
    loaded.inputs = Inputs(
        loaded.config, loaded.tokenizer, max_tiles=recipe.max_tiles, context_tokens=recipe.context_tokens, system=recipe.system,
        limit_megapixels=recipe.limit_megapixels, questions=loaded.inputs.questions,
    )  # fmt: skip
    attach(loaded, recipe)
    ledger = Ledger(used=len(samples or ()) + len(held_out or ()))
    if samples is None:
        data = supply(recipe, loaded.inputs)
        samples, held_out, ledger = data.train, data.held_out if held_out is None else held_out, data.ledger
    if not samples:
        raise DataError("there is no sample to train on; give at least one")
    taught = prepare(loaded.model, recipe, start)
    with memory_told(recipe, loaded.model, taught):
        return Run(recipe, loaded, taught, samples, held_out or (), ledger, started, on_event).run()


def check_output(recipe: Recipe) -> None:
    """Raises TrainingError when the output holds another run that would be lost."""
    base = learned_in(Path(recipe.model).expanduser()).resolve()
    if base in [(recipe.output / name).resolve() for name in ("adapter", "model")]:
        raise TrainingError(f"{base} is taught further, and would be written over; give another --output")
    if not recipe.resume and saved(recipe.output):
        raise TrainingError(f"{recipe.output} holds a run already; say --resume to go on with it, or give another --output")


def hash_of(samples: Sequence[Sample]) -> str:
    """One hash of all samples in order: resume on other data is refused by it."""
    if isinstance(samples, Streamed):
        return samples.digest()
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.key.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


class Run:
    """One sitting of a run."""

    def __init__(
        self, recipe: Recipe, loaded: Loaded, taught: Taught, samples: Sequence[Sample], held_out: Sequence[Sample],
        ledger: Ledger, started: float, on_event: Callable[[Event], None] | None,
    ):  # fmt: skip
        self.recipe, self.loaded, self.taught, self.ledger = recipe, loaded, taught, ledger
        self.started, self.earlier_s, self.step = started, 0.0, 0
        self.device = loaded.model.device
        self.num_samples, self.data_hash = len(samples), hash_of(samples)
        self.steps = (PairSteps if recipe.method != "sft" else Steps)(
            samples, loaded.inputs, looks=max(1, round(recipe.epochs * len(samples))), samples_per_step=recipe.samples_per_step,
            tokens_per_pass=recipe.tokens_per_pass, seed=recipe.seed, augmentation=recipe.augment,
            packing=recipe.packing,
        )  # fmt: skip
        self.total_steps = min(len(self.steps), recipe.max_steps or len(self.steps))
        self.optimiser = Optimiser(taught, recipe, self.total_steps)
        sft = recipe.method == "sft"
        self.passes = Passes(loaded.model, recipe) if sft else Preference(loaded.model, recipe, taught, self.optimiser)
        self.held_out = HeldOut(held_out, loaded, self.passes, recipe)
        count = recipe.projector_warmup_steps  # before _resume, for it always begins at what the model says
        self.warmup = Warmup(self.steps, loaded, count, self.passes.features) if count else None
        told = self._resume() if recipe.resume else []
        self.stop = Stop(recipe.time_limit_s, started)
        self.log = Log(
            recipe.output, total_steps=self.total_steps, first_step=self.step, tensorboard=recipe.tensorboard,
            device=self.device, on_event=on_event,
        )  # fmt: skip
        for text in told:
            self.log.note(self.step, text)
        self.unread: list[tuple[int, Tensor, Tensor, tuple[str, ...]]] = []  # step, loss, norm: still on the device
        self.recent: list[list[float]] = []  # loss and norm of the steps since the last report
        self.tokens = self.tokens_reported = 0
        self.step_seconds = self.seconds_reported = 0.0
        self.evaluated_at = self.saved_at = -1

    def _resume(self) -> list[str]:
        """Go on from the newest whole checkpoint; gives what is to be told."""
        found, told = newest(self.recipe.output)
        if found is None:
            return ["nothing to resume from; starting anew"]
        check_same_run(found.progress, self.recipe, self.data_hash, self.total_steps)
        self.optimiser.restore(found.tensors)
        restore_random_state(found.tensors)
        self.step, self.earlier_s = found.progress.step, found.progress.seconds
        return [*told, f"resumed from {found.folder}, step {self.step} of {self.total_steps}"]

    def run(self) -> TrainResult:
        with self.log, self.stop.listening():
            self._tell_start()
            self._warm_up()
            self._learn()
            reason = self.stop.reason if self.step < self.total_steps else None
            if reason is None and self.evaluated_at != self.step:
                self._evaluate()
            self._save()
            learned = save_result(self.recipe, self.loaded, self.taught, self.optimiser)
            self._tell_end(reason, learned)
            return TrainResult(
                output=self.recipe.output, adapter=learned, finished=reason is None, stopped_by=reason or "", steps=self.step,
                total_steps=self.total_steps, losses=self.log.series("loss"), held_out_losses=self.log.series("held_out_loss"),
                seconds=self._seconds(), tokens_per_s=self.tokens / self.step_seconds if self.step_seconds else 0.0,
                learning_parameters=self.taught.count(),
                ledger=asdict(self.ledger),
            )  # fmt: skip

    def _warm_up(self) -> None:
        """The projector learns alone, where the recipe says so and no step was taken yet."""
        if self.warmup is None or self.step:
            return
        shares = self.warmup.run(lambda: self.stop.reason is not None)
        if shares is not None:
            self.optimiser.put(self.warmup.values())
            first, last = shares
            self.log.note(
                0, f"projector warm-up: of {len(self.warmup.names):,} names a picture's own lay nearest {first:.0%} → {last:.0%}"
            )
        self.warmup = None  # its copy of the projector and its optimiser's state

    def _learn(self) -> None:
        """Steps until the last one, or until we must stop."""
        model = self.loaded.model.train()
        clock = time.monotonic()
        for data in self._data():
            done = self._step(data)
            if not done:
                break
            self.step += 1
            self.tokens += data.tokens
            self.log.advance(self.step)
            due = self.step == self.total_steps or self.stop.reason is not None
            if due or self.step % self.recipe.report_every == 0:
                self._read_losses()  # the only place where the device is waited for
                self.step_seconds += time.monotonic() - clock
                self._report()
                clock = time.monotonic()
            if self._every(self.recipe.evaluate_every) or self._every(self.recipe.save_every):
                self._read_losses()
                self.step_seconds += time.monotonic() - clock
                if self._every(self.recipe.evaluate_every):
                    self._evaluate()
                if self._every(self.recipe.save_every):
                    self._save()
                model.train()
                clock = time.monotonic()
            if self.stop.reason is not None:
                break
        model.eval()

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.step % steps == 0 and self.step < self.total_steps

    def _data(self) -> Iterator[StepData]:
        """What each step learns from, made ahead by worker processes where a GPU would wait for it.

        On the CPU the workers would only take cores from the arithmetic, and rows are kept after the first epoch.
        """
        order = range(self.step, self.total_steps)
        if self.device.type == "cpu" or not self.recipe.workers:
            for step in order:
                if self.stop.reason is not None:
                    return
                yield self.steps[step]
            return
        loader = DataLoader(
            self.steps, batch_size=None, sampler=order, num_workers=self.recipe.workers, prefetch_factor=2,
            pin_memory=self.device.type == "cuda", worker_init_fn=_quiet_worker,
        )  # fmt: skip
        yield from loader

    def _step(self, data: StepData) -> bool:
        """One optimizer step; False when we must stop before it is whole, and then nothing has changed."""
        if data.skipped:
            self._account(data.skipped)
        total = torch.zeros((), device=self.device)
        if not data.learned:
            return True
        for pack in data.packs:
            if self.stop.reason is not None:
                self.optimiser.forget()
                return False
            if not len(pack.targets):
                continue
            loss = self.passes.share(pack, data)
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            self.optimiser.accumulate()
            total += loss.detach()
        norm = self.optimiser.step(self.step)
        self.unread.append((self.step + 1, total, norm, data.places))
        return True

    def _account(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Samples whose pictures turned out bad while training go into the ledger, each once."""
        new = [row for row in dict.fromkeys(skipped) if row not in self.ledger.skipped]
        self.ledger.skipped += new
        self.ledger.used -= len(new)
        for place, reason in new:
            self.log.note(self.step, f"{place} is skipped: {reason}")
        bad = sum(reason.startswith("while training") for _, reason in self.ledger.skipped) / self.num_samples
        if bad > self.recipe.max_bad_share:
            raise DataError(
                f"{bad:.1%} of the samples turned out bad while training; at most {self.recipe.max_bad_share:.1%}: mend them, or "
                f"raise max_bad_share.\n{self.ledger.report()}"
            )

    def _read_losses(self) -> None:
        """Bring the losses over from the device and check them. Raises TrainingError naming the first step that is not finite."""
        if not self.unread:
            return
        values = torch.stack([torch.stack((loss, norm.to(loss))) for _, loss, norm, _ in self.unread]).tolist()
        for (step, _, _, places), (loss, norm) in zip(self.unread, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise TrainingError(
                    f"the {what} is not finite at step {step} of {self.total_steps} (loss {loss}, gradient norm {norm}). "
                    f"Its samples: {', '.join(places[:16])}. Lower learning_rate (now {self.recipe.learning_rate:g}), or look at "
                    "these samples; checkpoints of earlier steps stand"
                )
        self.recent += values
        self.unread = []

    def _report(self) -> None:
        if not self.recent:
            return
        loss, norm = (sum(column) / len(self.recent) for column in zip(*self.recent, strict=True))
        seconds = self.step_seconds - self.seconds_reported
        speed = (self.tokens - self.tokens_reported) / max(seconds, 1e-9)
        rate = self.recipe.learning_rate * self.optimiser.factor(self.step - 1)
        values = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens_per_s": speed}
        values |= {"memory_gib": self.log.memory_gib(), **self.passes.told(seconds)}
        left = (self.total_steps - self.step) * seconds / len(self.recent)
        self.log.step(self.step, {**values, "seconds": self._seconds()}, left)
        self.recent = []
        self.tokens_reported, self.seconds_reported = self.tokens, self.step_seconds

    def _evaluate(self) -> None:
        self.loaded.model.eval()
        self.evaluated_at = self.step
        loss = self.held_out.loss(self.stop)
        if loss is not None:
            self.log.held_out(self.step, loss, len(self.held_out.samples))
        answers = self.held_out.answers() if self.stop.reason is None else []
        if answers:
            self.log.answers(self.step, answers)

    def _save(self) -> None:
        if self.saved_at == self.step:
            return
        progress = Progress(self.step, self.total_steps, self.recipe.settled(), self.data_hash, self._seconds())
        folder = save(self.recipe.output, progress, self.optimiser.state(), self.recipe.keep)
        self.saved_at = self.step
        self.log.note(self.step, f"saved {folder}", kind="checkpoint", folder=str(folder))

    def _seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def _tell_start(self) -> None:
        r, count = self.recipe, self.taught.count()
        self.log.note(
            self.step,
            f"teaching {r.model}: language {r.language}, tower {r.tower}, projector {r.projector}, {count:,} parameters learn; "
            f"{self.num_samples:,} samples, {len(self.held_out.samples):,} held out, {self.total_steps:,} steps; "
            f"{self.loaded.model.dtype} on {self.device}".replace("torch.", ""),
            kind="start",
        )
        if self.ledger.skipped or self.ledger.notes:
            self.log.say(self.ledger.report())
        if not isinstance(self.steps.samples, Streamed) and self.steps.samples[0].tokens:
            need = estimate_bytes(self.loaded.model, self.taught, r.tokens_per_pass) / 2**30
            planned = Packing.of(self.steps.plan(0), r.packing).told()
            self.log.say(f"{planned}; at most about {need:.1f} GiB (inspect --recipe R --forecast measures time and memory)")

    def _tell_end(self, reason: str | None, learned: Path) -> None:
        if reason is None:
            self.log.note(self.step, f"finished: {learned}", kind="end")
            return
        self.log.note(
            self.step,
            f"stopped ({reason}) after step {self.step} of {self.total_steps}; everything is saved. "
            "Go on with the same command and --resume",
            kind="end",
        )


def _quiet_worker(number: int) -> None:
    """Ctrl-C is the run's to answer, not its workers'; one thread each, for they share the cores."""
    import signal  # only workers need it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
