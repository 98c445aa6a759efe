"""Before the language model is taught, the projector learns alone what the pictures are called.

In: samples with short answers, and what the frozen tower says of their pictures.  Out: the projector's values in float32.
The mean of a picture's visual tokens is turned towards the mean embedding of its answers' words and away from those of all other
answers. The language model does not run, so a step costs what the projector costs; what a small projector forgets of that which
the tower tells apart, it keeps so.
B pictures of a step, N distinct answers, D language width.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.checkpoint.read import Loaded
from tessella.errors import DataError
from tessella.train.batch import Pack, StepData, Steps
from tessella.train.dataset import Sample
from tessella.train.streamed import Streamed
from tessella.train.taught import PARTS

PICTURES = 32  # of a step
RATE = 2e-3  # the peak; after 120 steps of the demo 57 % of names are nearest, at half of it 53 (docs/log.md, 2026-12-01)
TEMPERATURE = 0.07  # of the cosines
NAME_TOKENS = 32  # a longer answer is no name
MOST_NAMES = 65536


class Names:
    """Which names each sample's picture has, and where the names lie among the language model's embeddings."""

    def __init__(self, samples: Sequence[Sample], loaded: Loaded):
        """Raises DataError when there are not two names to tell apart, or too many to hold, or the data is streamed."""
        if isinstance(samples, Streamed):
            raise DataError(
                "projector_warmup_steps reads all names before the run, so the data cannot be streamed; leave one out"
            )
        number: dict[tuple[int, ...], int] = {}
        self.of: dict[str, tuple[int, ...]] = {}  # place of a sample -> its names
        for sample in samples:
            if not sample.pictures:
                continue
            said = [tuple(loaded.tokenizer.encode(m.text.strip())) for m in sample.messages if m.role == "assistant"]
            short = [name for name in said if 0 < len(name) <= NAME_TOKENS]
            self.of[sample.place] = tuple(number.setdefault(name, len(number)) for name in dict.fromkeys(short))
        if not 2 <= len(number) <= MOST_NAMES:
            raise DataError(
                f"projector_warmup_steps wants pictures that are called by names, but the data has {len(number):,} different "
                f"answers of at most {NAME_TOKENS} tokens to pictures, must be 2 to {MOST_NAMES:,}; leave it out"
            )
        device = loaded.model.device
        with torch.no_grad():
            rows = [loaded.model.language_model.embed(torch.tensor(ids, device=device)).float().mean(0) for ids in number]
            table = torch.stack(rows)
            self.directions = F.normalize(table - table.mean(0), dim=-1)  # (N, D): what all names share tells none apart

    def __len__(self) -> int:
        return len(self.directions)


class Warmup:
    """Teaches a copy of the projector; the model is not touched, so a run that is stopped meanwhile begins it again."""

    def __init__(self, steps: Steps, loaded: Loaded, count: int, features: Callable[[Pack], Tensor]):
        """steps: what the run learns from. count: optimizer steps. features: a pack's tiles as the tower sees them."""
        self.names = Names(steps.samples, loaded)
        self.steps, self.count, self.features = steps.in_steps_of(PICTURES, PICTURES * count), count, features
        self.dtype, self.device = loaded.model.dtype, loaded.model.device
        self.projector = copy.deepcopy(loaded.model.mlp1).float().requires_grad_(True)
        self.centre: Tensor | None = None  # (D,): what the tokens of all pictures share before anything is learned

    def run(self, stopped: Callable[[], bool]) -> tuple[float, float] | None:
        """All steps. Gives the share of the pictures that lay nearest to one of their names, in the first step and at the end;
        None when stopped.
        """
        adamw = torch.optim.AdamW(self.projector.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
        rises = max(1, self.count // 12)
        right: list[float] = []
        for step in range(self.count):
            if stopped():
                return None
            adamw.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / rises) * (1 - step / self.count)
            right.append(self.learn(self.steps[step]))
            nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
        last = right[-max(1, self.count // 12) :]
        return right[0], sum(last) / len(last)

    def learn(self, data: StepData) -> float:
        """Gradients of one step; gives the share of its pictures that lie nearest to one of their names."""
        at, right, named = 0, 0, 0
        wanted = [self.names.of[place] for place in data.places]
        total = max(1, sum(bool(some) for some in wanted))
        for pack in data.packs:
            some = wanted[at : at + len(pack.lengths)]
            at += len(some)
            shown = [row for row, names in enumerate(some) if names and pack.tiles_of[row]]
            if not shown:
                continue
            scores = self.scores(self.pooled(pack)[shown])
            share = torch.zeros_like(scores)  # (B, N): 1 / names of the picture at each of them
            for row, place in enumerate(shown):
                share[row, list(some[place])] = 1 / len(some[place])
            (F.cross_entropy(scores, share, reduction="sum") / total).backward()  # type: ignore[no-untyped-call, unused-ignore]
            right += int((share.gather(1, scores.argmax(1, keepdim=True)) > 0).sum())
            named += len(shown)
        return right / max(1, named)

    def pooled(self, pack: Pack) -> Tensor:
        """The mean visual token (R, D) of each row of a pack; zeros where a row shows nothing."""
        features = self.features(pack).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.projector(features, pack.questions)
        nothing = torch.zeros(tokens.shape[-1], device=self.device)
        parts = tokens.float().split(pack.tiles_of)
        return torch.stack([tiles.mean((0, 1)) if len(tiles) else nothing for tiles in parts])

    def scores(self, pooled: Tensor) -> Tensor:
        """pooled (B, D) -> scaled cosines with all names (B, N)."""
        if self.centre is None:
            self.centre = pooled.detach().mean(0)
        return F.normalize(pooled - self.centre, dim=-1) @ self.names.directions.T / TEMPERATURE

    def values(self) -> dict[str, Tensor]:
        """The learned values by their names in an adapter file."""
        return {PARTS["projector"] + name: value.detach() for name, value in self.projector.named_parameters()}
