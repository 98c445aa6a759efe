"""Learning to prefer: DPO, and MPO's mix of preference, quality and generation, on pairs of answers.

In: packs whose rows are, pair by pair, a chosen and a rejected answer to one prompt.  Out: the loss of a step.
The reference is the model before: LoRA switched off, and parts that are taught whole as they were.  A row's log probability is
the sum over its learned tokens; r = beta * (its log probability now - in the reference) is its reward.
    DPO  -log sigmoid(r+ - r-)
    BCO  -log sigmoid(r+ - d) - log sigmoid(-(r- - d)), d the mean of all rewards of the steps before
    SFT  cross-entropy of the chosen answers, a mean over their tokens
    MPO  0.8 DPO + 0.2 BCO + 1.0 SFT
Each is one mean over the pairs (or tokens) of a whole step, so the split into passes changes no gradient.
Source: arXiv:2305.18290 (DPO), arXiv:2404.04656 (BCO), arXiv:2411.10442 (MPO); losses "sigmoid", "bco_pair" and "sft" of TRL.
R rows of a pack, L learned tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from tessella.chat import Message
from tessella.errors import DataError, ImageError, PromptError
from tessella.inputs import Inputs, ModelInput
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack, StepData, Steps, order_of, pack
from tessella.train.optimiser import Optimiser
from tessella.train.packing import Plan, plan_epoch, plan_passes
from tessella.train.passes import Passes
from tessella.train.recipe import Recipe
from tessella.train.sample import Sample
from tessella.train.streamed import Streamed
from tessella.train.taught import Taught


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Rewards of the chosen and the rejected answers, one each a pair -> the loss of each pair."""
    return -F.logsigmoid(chosen - rejected)


def bco(chosen: Tensor, rejected: Tensor, shift: Tensor) -> Tensor:
    """The same for an answer being good by itself: a reward above the shift is good, below it bad."""
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)


class PairSteps(Steps):
    """Steps over pairs: a look at a sample brings two rows, the chosen answer and behind it the rejected one."""

    def __init__(
        self, samples: Sequence[Sample], inputs: Inputs, *, looks: int, samples_per_step: int, tokens_per_pass: int, seed: int,
        augmentation: str = "none", packing: str = "in_order",
    ):  # fmt: skip
        """A pair is packed as one piece. Raises DataError when a sample is no pair."""
        if isinstance(samples, Streamed):
            raise DataError("pairs are not streamed; leave --stream away")
        alone = [sample for sample in samples if not sample.rejected]
        if alone:
            raise DataError(
                f"{len(alone):,} of {len(samples):,} samples are no pairs, as {alone[0].place}: methods dpo and mpo want rows "
                "with chosen and rejected; or say --method sft"
            )
        self.pairs = len(samples)
        rows = [row for sample in samples for row in (sample, turned(sample))]
        super().__init__(
            rows, inputs, looks=looks, samples_per_step=samples_per_step, tokens_per_pass=tokens_per_pass, seed=seed,
            augmentation=augmentation, packing=packing,
        )  # fmt: skip

    def __getitem__(self, step: int) -> StepData:
        pairs: list[list[ModelInput]] = []
        places, skipped = [], []
        first = step * self.samples_per_step
        for look in range(first, min(first + self.samples_per_step, self.looks)):
            epoch, turn = divmod(look, self.pairs)
            index = self._in_order(epoch)[turn]
            place = self.samples[2 * index].place
            try:
                pairs.append([self.row(2 * index, epoch), self.row(2 * index + 1, epoch)])
                places.append(place)
            except (ImageError, PromptError, DataError) as error:  # not swallowed: it goes into the ledger, which stops the run
                skipped.append((place, f"while training: {error}"))
        lengths = [sum(len(row) for row in pair) for pair in pairs]
        plan = plan_passes(lengths, self.tokens_per_pass, packing=self.packing, alone_over=self.alone_over)
        packs = [pack([row for index in some for row in pairs[index]]) for some in plan]
        return StepData(packs, tuple(places), tuple(skipped))

    def plan(self, epoch: int) -> Plan:
        """The passes of an epoch, about: what was measured is the chosen answer, and the rejected one is taken for as long."""
        lengths = [2 * self.samples[2 * index].tokens for index in range(self.pairs)]
        order = self._in_order(epoch)
        return plan_epoch(lengths, order, self.samples_per_step, self.tokens_per_pass, self.packing, self.alone_over)

    def _order_of(self, epoch: int) -> Sequence[int]:
        return order_of(self.pairs, self.seed, epoch)


def turned(sample: Sample) -> Sample:
    """The sample with the rejected answer in the chosen one's place, and the same key, so that both see one picture."""
    return replace(sample, messages=(*sample.messages[:-1], Message("assistant", sample.rejected)))


class Preference(Passes):
    """Passes over pairs. The optimiser keeps the sum of all rewards, so that a resumed run has it."""

    def __init__(self, model: VisionLanguageModel, recipe: Recipe, taught: Taught, optimiser: Optimiser):
        super().__init__(model, recipe)
        self.optimiser, self.beta, self.mixed = optimiser, recipe.beta, recipe.method == "mpo"
        self.weights = recipe.mpo_weights
        self.adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
        # Parts that are taught whole have no adapter to switch off: a copy of them stays as the reference.
        self.before = {
            name: (parameter, parameter.detach().clone()) for name, parameter in taught.parameters.items() if ".lora_" not in name
        }
        self.unread: list[Tensor] = []  # of each pass: pairs, sum of margins, pairs that are in the right order

    def share(self, pack: Pack, step: StepData) -> Tensor:
        pack = pack.to(self.model.device)
        self.done += self.work.of(pack, 0) * 1.5  # two passes forward and one backward
        with torch.no_grad(), self.reference():
            reference = self.row_sums(-self.token_losses(self.learned(pack), pack), pack)
        losses = self.token_losses(self.learned(pack), pack)
        rewards = (self.beta * (self.row_sums(-losses, pack) - reference)).view(-1, 2)
        chosen, rejected = rewards.unbind(1)
        self.unread.append(torch.stack(((chosen - rejected).sum(), (chosen > rejected).sum(), rewards.new_tensor(len(rewards)))))
        pairs = len(step.places)
        if not self.mixed:
            return dpo(chosen, rejected).sum() / pairs
        preference, quality, generation = self.weights
        total, count = self.optimiser.sums
        mixed = preference * dpo(chosen, rejected) + quality * bco(chosen, rejected, total / count.clamp_min(1))
        self.optimiser.add(rewards.detach())
        is_chosen = self.row_of(pack) % 2 == 0
        said = sum(chosen_tokens(one) for one in step.packs)
        return mixed.sum() / pairs + generation * (losses * is_chosen).sum() / said

    def row_of(self, pack: Pack) -> Tensor:
        """The row of each learned token, (L,)."""
        ends = torch.tensor(pack.lengths, device=pack.predict.device).cumsum(0)
        return torch.searchsorted(ends, pack.predict, right=True)

    def row_sums(self, numbers: Tensor, pack: Pack) -> Tensor:
        """numbers (L,) -> their sum in each row, (R,)."""
        return numbers.new_zeros(len(pack.lengths)).index_add(0, self.row_of(pack), numbers)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is as it was before it was taught."""
        training = self.model.training
        self.model.eval()  # no dropout
        for parameter, start in self.before.values():
            parameter.data, start.data = start.data, parameter.data
        for adapter in self.adapters:
            adapter._disable_adapters = True  # enable_adapters() would also switch requires_grad, which autograd still needs
        try:
            yield
        finally:
            for adapter in self.adapters:
                adapter._disable_adapters = False
            for parameter, start in self.before.values():
                parameter.data, start.data = start.data, parameter.data
            self.model.train(training)

    def told(self, seconds: float) -> dict[str, float]:
        """Besides: by how much chosen answers are preferred, and in how many pairs."""
        values = super().told(seconds)
        if not self.unread:
            return values
        margin, right, pairs = torch.stack(self.unread).sum(0).tolist()
        self.unread = []
        return {**values, "reward_margin": margin / pairs, "reward_accuracy": right / pairs}


def chosen_tokens(pack: Pack) -> int:
    """Learned tokens of the chosen rows of a pack; counted on the CPU, where packs are made."""
    ends = torch.tensor(pack.lengths).cumsum(0)
    return int((torch.searchsorted(ends, pack.predict, right=True) % 2 == 0).sum())
