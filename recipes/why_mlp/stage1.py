"""BLIP-2's first stage for the comparison's Q-Former: pictures with their names as captions, the language model not needed.

In: kept features of the pictures, their names.  Out: the Q-Former's queries and layers, without the text half.
The captions are few words, so the Q-Former gets a vocabulary of its own: the ids that the captions use, three in front.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from connectors import QFORMER
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessella.model.qformer import Queries
from tessella.tokenizer import Tokenizer
from tessella.train.optimiser import learning_rate_factor
from tessella.train.qformer import StageOne

PAD, TEXT, GENERATE = 0, 1, 2
FIRST = 3
RATE, WARMUP = 5e-4, 0.05


class Captions:
    """Names as rows of ids, padded; TEXT stands in front."""

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer):
        rows = {name: tokenizer.encode(f"a photo of a {name}.") for name in sorted(set(names))}
        known = {token: FIRST + place for place, token in enumerate(sorted({token for row in rows.values() for token in row}))}
        self.size = FIRST + len(known)
        self.rows = {name: torch.tensor([TEXT, *(known[token] for token in row)]) for name, row in rows.items()}

    def ids(self, names: Sequence[str]) -> Tensor:
        return pad_sequence([self.rows[name] for name in names], batch_first=True, padding_value=PAD)


def distinct_batches(names: Sequence[str], size: int, steps: int, seed: int) -> list[list[int]]:
    """Places of pictures whose names all differ: two alike would be taken for a wrong pair."""
    chance = random.Random(seed)
    by_name: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        by_name.setdefault(name, []).append(place)
    size = min(size, len(by_name))
    return [[chance.choice(by_name[name]) for name in chance.sample(sorted(by_name), size)] for _ in range(steps)]


def teach(
    features: Tensor, names: Sequence[str], tokenizer: Tokenizer, *, steps: int, batch: int, seed: int
) -> tuple[Queries, dict]:
    """features (N, P, P, C) on the device -> the queries, and the first and last losses."""
    captions = Captions(names, tokenizer)
    torch.manual_seed(seed)
    stage = StageOne(replace(QFORMER, text=True, vocab_size=captions.size)).to(features.device)
    optimiser = torch.optim.AdamW(stage.parameters(), lr=RATE, weight_decay=0.05)
    chance = torch.Generator(features.device).manual_seed(seed)
    told = []
    for step, places in enumerate(distinct_batches(names, batch, steps, seed)):
        for group in optimiser.param_groups:
            group["lr"] = RATE * learning_rate_factor(step, steps, WARMUP)
        ids = captions.ids([names[place] for place in places]).to(features.device)
        losses = stage(features[places].flatten(1, 2).float(), ids, ids != PAD, generate_id=GENERATE, chance=chance)
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimiser.step()
        if step in (0, steps - 1):
            told.append([round(float(loss.detach()), 4) for loss in (losses.contrast, losses.match, losses.generate)])
    return stage.queries, {"first_losses": told[0], "last_losses": told[-1]}


def take_over(connector_queries: Queries, taught: Queries) -> None:
    """What the second stage keeps: all but the text's half."""
    wanted = connector_queries.state_dict()
    connector_queries.load_state_dict({name: tensor for name, tensor in taught.state_dict().items() if name in wanted})
