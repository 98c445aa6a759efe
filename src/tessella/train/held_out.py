"""Samples that are never learned from, looked at while a run goes on: their loss, answers to their questions, and a score.

In: held-out samples and what is right (handed in as an Exam, since scoring is no business of this room).  Out: Seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tessella.checkpoint.read import Loaded
from tessella.errors import ImageError, PromptError
from tessella.generate import generate_batch
from tessella.image import open_image
from tessella.inputs import ModelInput
from tessella.sampling import SamplingParams
from tessella.train.batch import Pack, blank_pack, pack_all
from tessella.train.dataset import Sample
from tessella.train.limits import Stop
from tessella.train.multitask.rows import build_taught
from tessella.train.packing import rope_limit
from tessella.train.recipe import Recipe
from tessella.train.world import World

MOST_HELD_OUT = 512  # samples whose loss is taken during the run; the first of them, in the order of the split
ANSWER_TOKENS = 64
PICTURE_PX = 256  # longest side of a picture that is kept beside its answer
PICTURES = "pictures"


@dataclass(frozen=True)
class Exam:
    """What is right, and what must not be forgotten."""

    judge: Callable[[str, str], float]  # answer, expected answer -> 0 to 1
    general: Callable[[Loaded], dict[str, float]] | None = (
        None  # name -> number, of questions that have nothing to do with the data
    )


@dataclass(frozen=True)
class Seen:
    """What a look at the held-out samples gave."""

    loss: float | None = None
    samples: int = 0
    score: float | None = None  # mean over `scored` answers
    scored: int = 0
    general: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(
        default_factory=list
    )  # question, expected, answer, place, and picture where there is one

    @property
    def worth(self) -> float | None:
        """Greater is better: the score, or where nothing is scored the loss with a minus before it."""
        return self.score if self.score is not None else (None if self.loss is None else -self.loss)

    def numbers(self) -> dict[str, float]:
        """Under the names that the log has for them."""
        out: dict[str, float] = {}
        if self.loss is not None:
            out |= {"held_out_loss": self.loss, "held_out_samples": self.samples}
        if self.score is not None:
            out |= {"score": self.score, "scored": self.scored}
        return out | self.general


def answers_of(recipe: Recipe) -> int:
    """Held-out questions that are asked each time, where there is an exam: some to be shown, some to be scored."""
    return max(recipe.sample_answers, recipe.score_samples)


class GivesLoss(Protocol):
    """Passes, or a Layout of them."""

    def loss(self, pack: Pack) -> Tensor: ...


class HeldOut:
    """in_step: every rank must run the same passes at the same time (layouts.py), so they answer together, not in shares."""

    def __init__(
        self, samples: Sequence[Sample], loaded: Loaded, passes: GivesLoss, recipe: Recipe, *, world: World | None = None,
        in_step: bool = False, exam: Exam | None = None,
    ):  # fmt: skip
        self.samples, self.loaded, self.passes, self.recipe = list(samples), loaded, passes, recipe
        self.world, self.in_step, self.exam = world or World(), in_step, exam
        self.packs: list[Pack] | None = None
        self.count = 0  # of samples in packs, over all ranks
        self.prompts: list[tuple[Sample, ModelInput]] | None = None

    @torch.no_grad()
    def loss(self, stop: Stop) -> float | None:
        """Mean loss over all learned tokens; None when there are no samples, or we must stop."""
        if self.packs is None:
            rows = self._rows(self.samples[self.world.rank : MOST_HELD_OUT : self.world.size])
            alone_over = rope_limit(self.loaded.config.language)
            packs = pack_all(rows, self.recipe.tokens_per_pass, packing="best_fit", alone_over=alone_over)
            self.packs = packs if rows else []
            counts = self.world.gather([len(rows), len(self.packs)])
            self.count = sum(rows for rows, _ in counts)
            if self.in_step:
                longest = max(packs for _, packs in counts)
                self.packs += [blank_pack()] * (longest - len(self.packs))
        total, learned = torch.zeros((), device=self.loaded.model.device), 0
        for pack in self.packs:
            if stop.reason is not None:
                return None
            if len(pack.targets):
                loss = self.passes.loss(pack)
                total += loss if pack.keys else 0 * loss
                learned += len(pack.targets) if pack.keys else 0
        learned = sum(row[0] for row in self.world.gather([learned]))
        return float(self.world.sum(total)) / learned if learned else None

    def _rows(self, samples: Sequence[Sample]) -> list[ModelInput]:
        rows = []
        for sample in samples:
            try:
                rows.append(build_taught(self.loaded.inputs, sample.messages, sample.pictures, sample.truths))
            except (ImageError, PromptError):  # told by the number of held-out samples in each report
                continue
        return rows

    def answers(self) -> tuple[list[dict[str, str]], list[float]]:
        """Rows of question, expected, answer and place, and what each is worth; of all ranks, in order."""
        if self.prompts is None:
            self.prompts = self._prompts()
        if self.in_step or self.world.alone:
            rows, scores = self._answered(self.prompts)
            return rows, scores
        given = self.world.collect(self._answered(self.prompts[self.world.rank :: self.world.size]))
        places = [at for rank in range(self.world.size) for at in range(rank, len(self.prompts), self.world.size)]
        rows, scores = [row for some, _ in given for row in some], [score for _, some in given for score in some]
        order = sorted(range(len(places)), key=lambda i: places[i])
        return [rows[i] for i in order], [scores[i] for i in order if scores]

    def _answered(self, prompts: Sequence[tuple[Sample, ModelInput]]) -> tuple[list[dict[str, str]], list[float]]:
        if not prompts:
            return [], []
        params = SamplingParams(max_tokens=ANSWER_TOKENS)
        ids = generate_batch(self.loaded.model, [built for _, built in prompts], params, self.loaded.stop_ids)
        rows, scores = [], []
        for (sample, _), answer_ids in zip(prompts, ids, strict=True):
            answer = self.loaded.tokenizer.decode(answer_ids).strip()
            rows.append({"question": sample.question, "expected": sample.answer, "answer": answer, "place": sample.place})
            if self.exam is not None:
                scores.append(self.exam.judge(answer, sample.answer))
        return rows, scores

    def _prompts(self) -> list[tuple[Sample, ModelInput]]:
        """The first held-out questions that can be asked."""
        wanted = self.recipe.sample_answers if self.exam is None else answers_of(self.recipe)
        prompts: list[tuple[Sample, ModelInput]] = []
        for sample in self.samples:
            if len(prompts) == wanted:
                break
            try:
                built = self.loaded.inputs.build(sample.messages[:-1], sample.pictures, open_turn=True)
            except (ImageError, PromptError):  # told by the number of scored answers
                continue
            prompts.append((sample, built))
        return prompts

    def _keep_picture(self, sample: Sample, number: int) -> str:
        """A small copy of a sample's first picture in the output folder; its path there."""
        name = f"{PICTURES}/{number}.jpg"
        if self.world.main:
            folder: Path = self.recipe.output / PICTURES
            folder.mkdir(parents=True, exist_ok=True)
            small = open_image(sample.pictures[0].source, limit_megapixels=self.recipe.limit_megapixels).convert("RGB")
            small.thumbnail((PICTURE_PX, PICTURE_PX))
            small.save(self.recipe.output / name, quality=85)
        return name

    def look(self, stop: Stop) -> Seen:
        """All of it, as far as we need not stop. Every rank must look."""
        loss = self.loss(stop)
        if stop.reason is not None:
            return Seen(loss, self.count)
        answers, scores = self.answers()
        shown = answers[: self.recipe.sample_answers]
        for number, (row, (sample, _)) in enumerate(zip(shown, self.prompts or [], strict=False)):
            if sample.pictures:
                row["picture"] = self._keep_picture(sample, number)
        chosen = scores[: self.recipe.score_samples]
        general = self.exam.general(self.loaded) if self.exam is not None and self.exam.general is not None else {}
        return Seen(
            loss=loss, samples=self.count, score=sum(chosen) / len(chosen) if chosen else None, scored=len(chosen),
            general=general, answers=shown,
        )  # fmt: skip
