"""BLIP-2's first stage: a Q-Former learns from pictures and their captions what of a picture can be said.

In: features (N, P, Cv) of a frozen tower, ids (N, T) of the captions, real (N, T) false on padding.  Out: three losses.
N pairs of a batch, M pairs of all processes, Q queries, P patches, T tokens, C width, W width that picture and text share.
The first token of a caption stands for the whole text (BERT's [CLS]); where the caption is to be generated, another token
stands in its place and says so (BLIP-2's [DEC]).
Source: BLIP-2, arXiv:2301.12597; blip2_qformer.py of salesforce/LAVIS at lavis/models/blip2_models.
"""

from dataclasses import dataclass

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from tessella.config import QFormerConfig
from tessella.errors import ConfigError, TrainingError
from tessella.model.qformer import Queries, begin_small, sight

SMOOTHING = 0.1
START_TEMPERATURE = 0.07
LEAST_CHANCE = 1e-4  # of a negative, beside what the softmax gives it


@dataclass(frozen=True)
class StageOneLosses:
    """Each a mean over its samples; they weigh alike."""

    contrast: Tensor
    match: Tensor
    generate: Tensor

    @property
    def total(self) -> Tensor:
        return self.contrast + self.match + self.generate


class StageOne(nn.Module):
    """The Q-Former with both halves, and the heads of the three losses. queries is what the second stage goes on with."""

    def __init__(self, config: QFormerConfig, shared_width: int = 256):
        if not config.text:
            raise ConfigError("the first stage reads captions; give the Q-Former a text half (text=True)")
        super().__init__()
        c = config.hidden_size
        self.queries = Queries(config)
        self.picture_head, self.text_head = nn.Linear(c, shared_width), nn.Linear(c, shared_width)
        self.match_head = nn.Linear(c, 2)
        self.word_head = nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.LayerNorm(c, eps=config.norm_eps))
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.temperature = nn.Parameter(torch.tensor(START_TEMPERATURE))
        begin_small(self)

    def forward(self, image: Tensor, ids: Tensor, real: Tensor, *, generate_id: int, chance: torch.Generator) -> StageOneLosses:
        """generate_id: the token that begins a caption to be generated. Raises TrainingError for a batch without negatives."""
        pictures, texts = self.pictures(image), self.texts(ids, real)
        to_text, to_picture, first = similarities(pictures, texts, self.temperature)
        targets = first + torch.arange(len(ids), device=ids.device)
        both = (F.cross_entropy(scores, targets, label_smoothing=SMOOTHING) for scores in (to_text, to_picture))
        contrast = sum(both, start=to_text.new_zeros(())) / 2
        return StageOneLosses(
            contrast,
            self.match_loss(image, ids, real, to_text.detach(), to_picture.detach(), first, chance),
            self.generate_loss(image, ids, real, generate_id),
        )

    # ---- contrast: queries and text never see each other

    def pictures(self, image: Tensor) -> Tensor:
        """image (N, P, Cv) -> unit vectors (N, Q, W)."""
        return F.normalize(self.picture_head(self.queries(image)), dim=-1)

    def texts(self, ids: Tensor, real: Tensor) -> Tensor:
        """ids (N, T) -> unit vectors (N, W), from the first token's state."""
        states = self.queries.former(None, None, ids, sight("apart", 0, real))
        return F.normalize(self.text_head(states[:, 0]), dim=-1)

    # ---- matching: all see all

    def match_logits(self, image: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """Whether a text tells of a picture: (N, 2), the mean over the queries."""
        tokens = self.queries.query_tokens.expand(len(image), -1, -1)
        states = self.queries.former(tokens, image, ids, sight("together", tokens.shape[1], real))
        return self.match_head(states[:, : tokens.shape[1]]).mean(1)

    def match_loss(
        self, image: Tensor, ids: Tensor, real: Tensor, to_text: Tensor, to_picture: Tensor, first: int, chance: torch.Generator
    ) -> Tensor:
        """Each pair, each text with a picture that is nearly its own, and each picture with such a text."""
        images, all_ids, all_real = gathered(image), gathered(ids), gathered(real)
        same = same_text(ids, all_ids)
        picture_of = hard_negatives(to_picture, same, first, chance)
        text_of = hard_negatives(to_text, same, first, chance)
        logits = self.match_logits(
            torch.cat((image, images[picture_of], image)),
            torch.cat((ids, ids, all_ids[text_of])),
            torch.cat((real, real, all_real[text_of])),
        )
        labels = torch.zeros(len(logits), dtype=torch.int64, device=ids.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)

    # ---- generation: text sees the queries and what stands before it, queries see no text

    def word_logits(self, image: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """The next token's logits (N, T, V) after each token."""
        tokens = self.queries.query_tokens.expand(len(image), -1, -1)
        states = self.queries.former(tokens, image, ids, sight("generate", tokens.shape[1], real))
        return F.linear(self.word_head(states[:, tokens.shape[1] :]), self.queries.former.words.weight, self.word_bias)

    def generate_loss(self, image: Tensor, ids: Tensor, real: Tensor, generate_id: int) -> Tensor:
        begun = torch.cat((torch.full_like(ids[:, :1], generate_id), ids[:, 1:]), dim=1)
        logits, learned = self.word_logits(image, begun, real)[:, :-1], real[:, 1:]
        return F.cross_entropy(logits[learned], ids[:, 1:][learned], label_smoothing=SMOOTHING)


def similarities(pictures: Tensor, texts: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, int]:
    """pictures (N, Q, W), texts (N, W) -> of each picture with all texts and of each text with all pictures, (N, M) each, and
    the place of this process's first pair among all. A picture is as near to a text as the nearest of its queries.
    """
    all_pictures, all_texts = gathered(pictures), gathered(texts)
    to_text = torch.einsum("nqw,mw->nmq", pictures, all_texts).amax(-1) / temperature
    to_picture = torch.einsum("nw,mqw->nmq", texts, all_pictures).amax(-1) / temperature
    first = distributed.get_rank() * len(texts) if distributed.is_initialized() else 0
    return to_text, to_picture, first


def same_text(ids: Tensor, all_ids: Tensor) -> Tensor:
    """(N, M) bool: which captions say the same, token for token. LAVIS takes such for negatives; of few captions many are."""
    return (ids[:, None] == all_ids[None]).all(-1)


def hard_negatives(scores: Tensor, same: Tensor, first: int, chance: torch.Generator) -> Tensor:
    """One place among all pairs for each row, drawn by the softmax of the scores (N, M); never one that says the same.

    Raises TrainingError when a row has no other caption to be told from.
    """
    weights = scores.softmax(-1) + LEAST_CHANCE
    rows = torch.arange(len(scores), device=scores.device)
    weights[rows, first + rows] = 0
    weights = weights.masked_fill(same, 0)
    if not bool((weights.sum(-1) > 0).all()):
        raise TrainingError(
            f"all {scores.shape[1]} captions of a batch are alike, so none can be told from another; more pairs a batch"
        )
    return torch.multinomial(weights, 1, generator=chance)[:, 0]


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to the process that made them."""
    return torch.cat(all_gather(x.contiguous())) if distributed.is_initialized() else x
