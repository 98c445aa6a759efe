"""One sitting of a run, on one rank: from the checkpoint that it goes on from to the last step, or until it must stop.

In: a recipe, a loaded model, samples.  Out: a TrainResult, and on the way checkpoints, reports and looks at what is held out.
What chance decides is a function of seed, step and rank, so a resumed run draws what it would have drawn.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tessella.checkpoint.read import Loaded
from tessella.errors import DataError, MemoryError_, TessellaError, TrainingError, is_out_of_memory
from tessella.train.batch import Pack, StepData, blank_pack
from tessella.train.dataset import RecipeData
from tessella.train.held_out import Exam, HeldOut, Seen
from tessella.train.limits import REASONS, Stop, estimate_bytes, out_of_memory
from tessella.train.log import Event, Log
from tessella.train.making import chance_of, layout_of, quiet_worker, steps_of
from tessella.train.packing import Packing
from tessella.train.passes import Passes
from tessella.train.preference import Preference
from tessella.train.recipe import Recipe
from tessella.train.record import Record
from tessella.train.result import save_result
from tessella.train.samples_seen import hash_of, what_changed, write_list
from tessella.train.state import Checkpoint, Progress, before, check_same_run, go_on, newest, read, save, saved
from tessella.train.streamed import Streamed
from tessella.train.taught import Taught
from tessella.train.trackers import open_trackers
from tessella.train.warmup import Warmup
from tessella.train.watch import BadLoss, Watch
from tessella.train.world import World

MOST_STEPS_BACK = 5  # in one sitting; a run that must go back more often is not helped by it


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
    scores: list[tuple[int, float]]  # (step, mean score of the answers to held-out questions)
    seconds: float  # over all sittings
    tokens_per_s: float  # of this sitting's steps on all ranks, evaluation and saving not counted
    learning_parameters: int
    ranks: int
    ledger: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output), "adapter": str(self.adapter)}


class Run:
    """One sitting of a run, on one rank."""

    def __init__(
        self, recipe: Recipe, loaded: Loaded, taught: Taught, data: RecipeData, world: World, exam: Exam | None, started: float,
        on_event: Callable[[Event], None] | None,
    ):  # fmt: skip
        self.recipe, self.loaded, self.taught, self.data, self.world = recipe, loaded, taught, data, world
        self.ledger, self.samples = data.ledger, data.train
        self.started, self.earlier_s, self.step = started, 0.0, 0
        self.device = loaded.model.device
        self.data_hash = hash_of(self.samples)
        self.steps = steps_of(recipe, self.samples, loaded, world)
        self.total_steps = min(len(self.steps), recipe.max_steps or len(self.steps))
        kind = layout_of(recipe, world)
        if recipe.method == "sft":
            self.passes = Passes(loaded.model, recipe)
            self.warmup = self._warmup()  # before the projector is cut into shares
            self.layout = kind(world, loaded.model, taught, recipe, self.total_steps)
        else:
            self.layout = kind(world, loaded.model, taught, recipe, self.total_steps)
            self.passes = Preference(loaded.model, recipe, taught, self.layout.optimiser)
            self.warmup = self._warmup()
        self.layout.take(self.passes)
        self.held_out = HeldOut(
            data.held_out, loaded, self.layout, recipe, world=world, in_step=self.layout.in_step, exam=exam
        )  # fmt: skip
        self.watch = Watch(recipe, self.total_steps)
        self.passed_over: set[int] = set()
        self.steps_back = 0
        self.seen: Seen | None = None  # of the step that it was taken at
        told = self._resume() if recipe.resume else []
        self.stop = Stop(recipe.time_limit_s, started, alone=world.alone, main=world.main)
        self.record = Record(recipe, world)
        self.record.start(loaded, taught, self.samples, data.held_out, self.ledger, self.total_steps)
        if world.main and not told:
            write_list(recipe.output, self.samples)
        self.log = Log(
            recipe.output, total_steps=self.total_steps, first_step=self.step, device=self.device, main=world.main,
            trackers=lambda first_step: open_trackers(recipe, first_step), on_event=on_event,
        )  # fmt: skip
        for text in told:
            self.log.note(self.step, text)
        self.log.rows = world.share(self.log.rows)  # what is best so far is decided by them, on every rank alike
        self.tokens = self.tokens_reported = 0
        self.step_seconds = self.seconds_reported = 0.0
        self.evaluated_at = self.step if any(at == self.step for at, _ in self.log.series("held_out_loss")) else -1
        self.saved_at = -1
        self.whole = True  # False while weights are half of one step and half of the next
        self.holding: Pack | None = None  # the pass that is being run

    # ---- beginning and end

    def _resume(self) -> list[str]:
        """Go on from the newest whole checkpoint; gives what is to be told."""
        # The first rank looks for what is whole, and all read that.
        found, told = newest(self.recipe.output) if self.world.main else (None, list[str]())
        place, told = self.world.share((None if found is None else found.folder, told))
        found = read(place) if found is None and place is not None else found
        if found is None:
            return ["nothing to resume from; starting anew"]
        check_same_run(
            found.progress, self.recipe, self.data_hash, self.total_steps, lambda: what_changed(self.recipe.output, self.samples)
        )
        self._take(found)
        self.earlier_s = found.progress.seconds
        return [*told, f"resumed from {found.folder}, step {self.step} of {self.total_steps}"]

    def _take(self, found: Checkpoint) -> None:
        self.layout.restore(found.tensors)
        self.step = found.progress.step
        self.watch.restore(found.progress.recent, found.progress.before)
        self.passed_over |= set(found.progress.passed_over)

    def run(self) -> TrainResult:
        with self.log, self.stop.listening():
            try:
                return self._run()
            except TessellaError as error:
                self.record.end("failed", reason=str(error), steps=self.step)
                raise

    def _run(self) -> TrainResult:
        self._tell_start()
        if self.recipe.evaluate_every and self.evaluated_at != self.step == 0:
            self._evaluate()
        self._warm_up()
        if "back" in (self.recipe.on_nan, self.recipe.on_spike) and not self.world.share(saved(self.recipe.output)):
            self._save()  # so that there is something to step back to
        while not self._learn():
            pass
        reason = self.stop.reason if self.step < self.total_steps else None
        if reason is None and self.evaluated_at != self.step:
            self._evaluate()
        self._save()
        values = self.layout.values()
        learned = save_result(self.recipe, self.loaded, self.taught, values) if self.world.main else self.recipe.output
        result = TrainResult(
            output=self.recipe.output, adapter=learned, finished=reason is None, stopped_by=reason or "", steps=self.step,
            total_steps=self.total_steps, losses=self.log.series("loss"), held_out_losses=self.log.series("held_out_loss"),
            scores=self.log.series("score"), seconds=self._seconds(),
            tokens_per_s=self.tokens / self.step_seconds if self.step_seconds else 0.0,
            learning_parameters=self.taught.count(), ranks=self.world.size, ledger=asdict(self.ledger),
        )  # fmt: skip
        self._tell_end(reason, learned)
        self.record.end(
            "stopped" if reason else "finished", reason=reason or "", steps=self.step, seconds=round(result.seconds, 1),
            tokens_per_s=round(result.tokens_per_s, 1), learned=str(learned),
        )  # fmt: skip
        return result

    def _warmup(self) -> Warmup | None:
        """Made before _resume, for it always begins at what the model says."""
        count = self.recipe.projector_warmup_steps
        return Warmup(self.steps, self.loaded, count, self.passes.features) if count else None

    def _warm_up(self) -> None:
        """The projector learns alone, where the recipe says so and no step was taken yet."""
        if self.warmup is None or self.step:
            return
        shares = self.warmup.run(lambda: self.stop.reason is not None)
        if shares is not None:
            # Each rank has done the same; the first one's bits are taken, for on GPUs the last ones may differ.
            self.layout.put(self.world.share({name: value.cpu() for name, value in self.warmup.values().items()}))
            first, last = shares
            self.log.note(
                0, f"projector warm-up: of {len(self.warmup.names):,} names a picture's own lay nearest {first:.0%} → {last:.0%}"
            )
        self.warmup = None  # its copy of the projector and its optimiser's state

    # ---- steps

    def _learn(self) -> bool:
        """Steps until the last one, or until we must stop; False when the run stepped back and is to go on."""
        try:
            self._steps()
        except BadLoss as bad:
            self._step_back(bad)
            return False
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError_(self._save_what_memory_allows()) from error
        except DataError:  # the data turned out bad; what was learned until here is not lost
            self._save()
            raise
        return True

    def _steps(self) -> None:
        model = self.loaded.model.train()
        clock = time.monotonic()
        for data in self._data():
            if not self._step(data):
                break
            self.step += 1
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
        self._read_losses()
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
            pin_memory=self.device.type == "cuda", worker_init_fn=quiet_worker,
        )  # fmt: skip
        yield from loader

    def _step(self, data: StepData) -> bool:
        """One optimizer step; False when we must stop before it is whole, and then nothing has changed."""
        packs = [pack for pack in data.packs if len(pack.targets)]
        own = [data.learned, data.routed, data.tokens, len(packs), len(data.skipped), REASONS.index(self.stop.asked)]
        told = self.world.gather(own)
        learned, routed, tokens, _, skipped, _ = (sum(column) for column in zip(*told, strict=True))
        self.stop.agreed = REASONS[max(row[-1] for row in told)]
        if self.stop.reason is not None:
            return False
        if skipped:
            self._account([row for some in self.world.collect(data.skipped) for row in some])
        if not learned or self.step in self.passed_over:
            return True
        data = replace(data, everywhere=(learned, routed))
        torch.manual_seed(chance_of(self.recipe.seed, self.step, self.world.rank))  # dropout
        total = torch.zeros((), device=self.device)
        if self.layout.in_step:
            packs += [blank_pack()] * (max(row[3] for row in told) - len(packs))
        for pack in packs:
            if self.stop.reason is not None:
                self.layout.forget()
                return False
            self.holding = pack
            total += self.layout.learn(pack, data)
        self.holding, self.whole = None, False
        norm = self.layout.step(self.step)
        self.whole = True
        self.watch.add(self.step + 1, self.world.sum(total), norm, data.places)
        self.tokens += tokens
        return True

    def _account(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Samples whose pictures turned out bad while training go into the ledger, each once."""
        new = [row for row in dict.fromkeys(skipped) if row not in self.ledger.skipped]
        self.ledger.skipped += new
        self.ledger.used -= len(new)
        for place, reason in new:
            self.log.note(self.step, f"{place} is skipped: {reason}")
        bad = sum(reason.startswith("while training") for _, reason in self.ledger.skipped) / len(self.samples)
        if bad > self.recipe.max_bad_share:
            raise DataError(
                f"{bad:.1%} of the samples turned out bad while training; at most {self.recipe.max_bad_share:.1%}: mend them, or "
                f"raise max_bad_share.\n{self.ledger.report()}"
            )

    def _read_losses(self) -> None:
        """Bring the losses over from the device and check them. Raises BadLoss."""
        for text in self.watch.read(lambda places: tuple(place for some in self.world.collect(places) for place in some)):
            self.log.note(self.step, text, kind="jump")

    def _step_back(self, bad: BadLoss) -> None:
        """Go back to the checkpoint before a bad step and pass that step over. Raises TrainingError when we must stop."""
        self.layout.forget()
        if bad.answer == "stop":
            raise TrainingError(
                f"{bad.told}; checkpoints of earlier steps stand. To pass this step over, {go_on(self.recipe.output)} "
                "--on-nan back --on-spike back"
            )
        self.steps_back += 1
        place = self.world.share(before(self.recipe.output, bad.step) if self.world.main else None)
        found = None if place is None else read(place)
        if found is None or self.steps_back > MOST_STEPS_BACK:
            why = "there is no checkpoint before it" if found is None else f"the run stepped back {MOST_STEPS_BACK} times already"
            raise TrainingError(f"{bad.told}; {why}, so it stops")
        self._take(found)
        self.passed_over.add(bad.step - 1)
        self.log.rewind(self.step)
        self.evaluated_at = self.saved_at = -1
        self.log.note(self.step, f"{bad.told}. Stepped back to {found.folder}; step {bad.step} is passed over", kind="back")

    def _save_what_memory_allows(self) -> str:
        """Out of memory: save the last whole step if that still goes, and say what to do."""
        told = out_of_memory(
            self.recipe, self.loaded.model, self.taught, self.holding, self.passes.tiles.num_bytes + self.passes.rows.num_bytes
        )
        self.layout.forget()
        saved_here = False
        if self.whole and self.world.alone:  # with several ranks saving is a thing that all do together
            try:
                self.watch.read(lambda places: places)
                self._save()
                saved_here = True
            except (MemoryError, RuntimeError, BadLoss, TrainingError):  # told below: the newest checkpoint is an older one
                saved_here = False
        where = f"everything up to step {self.step} is saved" if saved_here else "then resume from the newest checkpoint"
        half = max(64, self.recipe.tokens_per_pass // 2)
        return f"{told}; {where}: {go_on(self.recipe.output, '--tokens-per-pass', str(half))}"

    # ---- what is told and kept

    def _report(self) -> None:
        recent = self.watch.recent
        if not recent:
            return
        loss, norm = (sum(column) / len(recent) for column in zip(*recent, strict=True))
        seconds = self.step_seconds - self.seconds_reported
        speed = (self.tokens - self.tokens_reported) / max(seconds, 1e-9)
        rate = self.recipe.learning_rate * self.layout.factor(self.step - 1)
        values = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens_per_s": speed}
        values |= {"memory_gib": self.log.memory_gib(), **self.passes.told(seconds)}
        left = (self.total_steps - self.step) * seconds / len(recent)
        self.log.step(self.step, {**values, "seconds": self._seconds()}, left)
        self.watch.recent = []
        self.tokens_reported, self.seconds_reported = self.tokens, self.step_seconds

    def _evaluate(self) -> None:
        self.loaded.model.eval()
        self.evaluated_at = self.step
        with self.layout.gathered():
            seen = self.held_out.look(self.stop)
        self.seen = seen
        if seen.numbers():
            self.log.held_out(self.step, seen.numbers())
        if seen.answers:
            self.log.answers(self.step, seen.answers)
        earlier = [-loss for at, loss in self.log.series("held_out_loss") if at < self.step]
        if seen.score is not None:
            earlier = [score for at, score in self.log.series("score") if at < self.step]
        if self.recipe.keep_best and self.step and seen.worth is not None and seen.worth > max(earlier, default=seen.worth):
            self._save()

    def _save(self) -> None:
        if self.saved_at == self.step:
            return
        recent, before_this = self.watch.state()
        worth = self.seen.worth if self.seen is not None and self.evaluated_at == self.step else None
        progress = Progress(
            self.step, self.total_steps, self.recipe.settled(), self.data_hash, self._seconds(), worth, recent, before_this,
            sorted(self.passed_over),
        )  # fmt: skip
        tensors = self.layout.state()
        self.saved_at = self.step
        if self.world.main:
            folder = save(self.recipe.output, progress, tensors, self.recipe.keep, self.recipe.keep_best)
            self.log.note(self.step, f"saved {folder}", kind="checkpoint", folder=str(folder))
        self.world.wait()

    def _seconds(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def _tell_start(self) -> None:
        r, count = self.recipe, self.taught.count()
        ranks = "" if self.world.alone else f", {self.world.size} ranks ({r.parallel})"
        self.log.note(
            self.step,
            f"teaching {r.model}: language {r.language}, tower {r.tower}, projector {r.projector}, {count:,} parameters learn; "
            f"{len(self.samples):,} samples, {len(self.data.held_out):,} held out, {self.total_steps:,} steps; "
            f"{self.loaded.model.dtype} on {self.device}{ranks}".replace("torch.", ""),
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
            f"Go on with the same command and --resume, or {go_on(self.recipe.output)}",
            kind="end",
        )
