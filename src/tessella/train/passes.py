"""Forward passes: the loss of a pack.

In: Packs.  Out: summed cross-entropy over the learned tokens.
T tokens, L of them learned, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tessella.errors import ConfigError
from tessella.model.attend import Attend, Causal
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack, StepData
from tessella.train.features import Kept, chosen
from tessella.train.flops import rate_of, work_of
from tessella.train.lora import lowest_taught
from tessella.train.multitask.teach import Decoders, View
from tessella.train.recipe import Recipe

TILES_AT_ONCE = 64  # on a GPU
LOGITS_AT_ONCE = 2**27  # numbers of a piece of logits: 512 MiB in float32
# Tiles, or what a frozen tower says of them, and the questions that a connector may read beside them -> one tensor a tile.
Look = Callable[[Tensor, Sequence[Sequence[int]]], Tensor]


class LossParts:
    """What words and decoders add to the loss, before their weights, step by step; a GPU is waited for only when it is told."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0.0

    def add(self, parts: Mapping[str, Tensor], share: float) -> None:
        """share: of the step that these parts are of."""
        self.steps += share
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def told(self) -> dict[str, float]:
        """Means over the steps since it was last asked."""
        found = {f"loss_{name}": float(value) / self.steps for name, value in self.sums.items()} if self.steps else {}
        self.sums, self.steps = {}, 0.0
        return found


class Passes:
    """Runs packs through the model. Frozen parts are asked once: a tower (and projector) for each tile, and when these are
    frozen, the layers of the language model below the first one that learns, for each row.
    """

    def __init__(self, model: VisionLanguageModel, recipe: Recipe):
        if model.dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"teaching computes in bfloat16 or float32, not in {model.dtype}")
        self.model = model
        self.frozen: Look | None = None  # what is constant of a tile (and its question): features, or visual tokens
        self.after: Look | None = None  # what still learns behind it
        still = recipe.tower == recipe.projector == "frozen"
        constant = still and recipe.language == "lora" and not recipe.decoders  # queries learn below all layers
        self.lowest = lowest_taught(model, recipe) if constant else 0  # layers that are constant
        self.decoders, self.parts = Decoders(model, recipe), LossParts()
        if recipe.tower == "frozen":
            self.frozen = model.visual_tokens if still else lambda tiles, _: model.features(tiles)
            self.after = None if still else model.mlp1
        keep, on_cpu = recipe.caches_features, model.device.type == "cpu"
        self.tiles = Kept(model.device, at_once=1 if on_cpu else TILES_AT_ONCE, keep=keep and not self.lowest)
        self.rows = Kept(model.device, keep=keep)
        self.work, self.rate, self.done = work_of(model, recipe, self.lowest), rate_of(model.device, model.dtype), 0.0
        self.now: Attend | None = None
        self.handed: Attend | None = None  # what compiled layers are handed in place of it
        if recipe.compile:
            compile_layers(model)
            # One function for the whole run: a new one for each pass would be a new thing to compile for, without an end.
            self.handed = torch.compiler.disable(self._attend_now)

    def share(self, pack: Pack, step: StepData) -> Tensor:
        """What a pack adds to the loss of its step: a mean over its learned tokens, and the decoders' over its routed rows."""
        pack, seen = pack.to(self.model.device), self.tiles.computed
        # Decoders read other places than the head does.
        hidden = self.hidden(pack) if self.decoders.present else None
        states = self.learned(pack) if hidden is None else hidden.index_select(0, pack.predict)
        loss = words = self.token_losses(states, pack).sum() / step.learned
        self.done += self.work.of(pack, len(pack.tiles) if self.frozen is None else self.tiles.computed - seen)
        if hidden is None:
            return loss
        parts = {"words": words.detach()}
        for kind, missed in self.decoders.losses(View(hidden, pack.tiles, pack.tiles_of), pack.placed).items():
            loss = loss + self.decoders.weight(kind) * missed / step.routed
            parts[kind] = missed.detach() / step.routed
        self.parts.add(parts, len(pack.targets) / step.learned)
        return loss

    def loss(self, pack: Pack) -> Tensor:
        """Cross-entropy summed over the learned tokens of a pack, a scalar."""
        pack = pack.to(self.model.device)
        return self.token_losses(self.learned(pack), pack).sum()

    def learned(self, pack: Pack) -> Tensor:
        """The hidden states (L, D) behind which a token is learned; the last layer answers at these places alone."""
        return self.hidden(pack, pack.predict)

    def hidden(self, pack: Pack, wanted: Tensor | None = None) -> Tensor:
        """The hidden states (T, D) of a pack that lies on the device, or (L, D) of the places wanted."""
        if self.lowest:
            states = torch.cat(self.rows(pack.keys, lambda places: [self.below(pack.row(place)) for place in places]))
        else:
            states = self.embed(pack)
        longest = max(pack.lengths)
        return self.model.language_model(states, pack.positions, self.attend(pack), longest, first=self.lowest, wanted=wanted)

    def token_losses(self, states: Tensor, pack: Pack) -> Tensor:
        """Cross-entropy of each learned token, (L,) float32, from the hidden states (L, D) before it.

        Logits are made at these L positions alone, and in pieces: beyond one piece they are made again in the backward pass.
        """
        rows = max(1, LOGITS_AT_ONCE // self.model.config.language.vocab_size)
        pieces = zip(states.split(rows), pack.targets.split(rows), strict=True)
        if len(states) <= rows or not torch.is_grad_enabled():
            return torch.cat([self._piece_losses(*piece) for piece in pieces])
        return torch.cat([checkpoint(self._piece_losses, *piece, use_reentrant=False) for piece in pieces])

    def _piece_losses(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model.logits(states).float(), targets, reduction="none")

    def told(self, seconds: float) -> dict[str, float]:
        """Numbers of the steps since it was last asked, for the log; they took so many seconds."""
        speed, self.done = self.done / max(seconds, 1e-9), 0.0
        return {"tflop_per_s": speed / 1e12, "mfu": speed / self.rate, **self.parts.told()}

    def below(self, pack: Pack) -> Tensor:
        """The states (T, D) of a pack before the first layer that learns."""
        longest = max(pack.lengths)
        return self.model.language_model(self.embed(pack), pack.positions, self.attend(pack), longest, end=self.lowest)

    def embed(self, pack: Pack) -> Tensor:
        """The embeddings (T, D) of a pack, visual tokens in their slots."""
        embeddings = self.model.embed_text(pack.ids, pack.queries)
        visual = self.see(pack)
        if visual is None:
            return embeddings
        # As model.embed does it with a mask; but a mask's gradient makes the host wait for the GPU, and positions do not.
        shown = self.model.mlp1.laid_out(visual, [window for row in pack.windows for window in row])
        return embeddings.index_copy(0, pack.slots, shown.to(embeddings.dtype))

    def attend(self, pack: Pack) -> Attend:
        self.now = Causal(pack.lengths, self.model.device)
        return self.now if self.handed is None else self.handed

    def _attend_now(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the pass under way. It stays outside what is compiled, for its lengths change with every pass."""
        assert self.now is not None
        return self.now(layer, q, k, v)

    def see(self, pack: Pack) -> Tensor | None:
        """The visual tokens (N, slots, D) of a pack's tiles, None without tiles."""
        if not len(pack.tiles):
            return None
        device, frozen = self.model.device, self.frozen
        if frozen is None:
            return self.model.visual_tokens(pack.tiles.to(device, non_blocking=True), pack.questions)
        constant = self.constant(pack, frozen)
        return constant if self.after is None else self.after(constant, pack.questions)

    def constant(self, pack: Pack, frozen: Look) -> Tensor:
        """What frozen says of each tile of a pack, kept where the recipe keeps it."""

        def ask(some: list[int]) -> Tensor:
            questions = [pack.questions[place] for place in some] if pack.questions else []
            return frozen(chosen(pack.tiles, some).to(self.model.device, non_blocking=True), questions)

        return torch.stack(self.tiles(pack.digests, ask))

    def features(self, pack: Pack) -> Tensor:
        """What the tower says (N, P, P, C) of a pack's tiles; kept, for a projector that learns sees nothing else."""
        return self.constant(pack, lambda tiles, _: self.model.features(tiles))


def compile_layers(model: VisionLanguageModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer in place. All layers of a kind share their graphs, and these serve every length."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # the layer's number is no reason to compile it again
    for layer in (*model.language_model.model.layers, *model.vision_model.encoder.layers):
        layer.compile(dynamic=True, backend=backend)
