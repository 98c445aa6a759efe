"""Tower, connector and decoder joined: visual tokens are set into the slots of the text's embeddings.

In: ids (T,) of all rows back to back, slots (T,) true where a visual token goes, tiles (N, 3, S, S).
Out: hidden states (T, D); the caller asks for the logits it needs. A model with routing has its own rows behind the V others.
Source: modeling_internvl_chat.py of OpenGVLab/InternVL at 2410d1d.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessella.config import ModelConfig
from tessella.geometry import Window
from tessella.image import normalise
from tessella.model.attend import Attend
from tessella.model.connectors import Connector
from tessella.model.language import LanguageModel
from tessella.model.routing import Routing
from tessella.model.vision import VisionTower


class VisionLanguageModel(nn.Module):
    """InternVL and its relatives. mlp1, the connector, turns features (N, P, P, C) into visual tokens (N, slots, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config.vision, config.select_layer)
        self.mlp1 = Connector(config)
        self.language_model = LanguageModel(config.language)
        self.routing: Routing | None = None  # attached by whoever reads or teaches one

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def features(self, tiles: Tensor) -> Tensor:
        """tiles (N, 3, S, S) uint8 -> features (N, P, P, C); the part that a frozen tower computes once."""
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        return self.vision_model(normalise(tiles, dtype, self.config.vision.statistics))

    def visual_tokens(self, tiles: Tensor, questions: Sequence[Sequence[int]] = ()) -> Tensor:
        """tiles (N, 3, S, S) uint8, questions: ids for each tile where they are read -> visual tokens (N, slots, D)."""
        return self.mlp1(self.features(tiles), questions)

    def embed_text(self, ids: Tensor, queries: Tensor | None = None) -> Tensor:
        """ids (T,) -> embeddings (T, D). queries (T,): the super-link query that stands at a place, else -1."""
        if self.routing is None:
            return self.language_model.embed(ids)
        return self.routing.embed(self.language_model.embed, ids, queries)

    def embed(
        self,
        ids: Tensor,
        slots: Tensor,
        visual: Tensor | None,
        windows: Sequence[Window] = (),
        queries: Tensor | None = None,
    ) -> Tensor:
        """ids (T,), slots (T,) bool, visual (N, slots, D) or None without pictures -> embeddings (T, D).

        windows: what of each picture's map is shown, where the tile rule pads (Connector.laid_out).  queries: as embed_text.
        """
        embeddings = self.embed_text(ids, queries)
        if visual is None:
            return embeddings
        shown = self.mlp1.laid_out(visual, windows)
        # On a GPU the sum would make the host wait at every step of a training run; inputs.py makes both from one count.
        assert slots.is_cuda or int(slots.sum()) == len(shown), "slots and visual tokens differ in number"
        return embeddings.masked_scatter(slots[:, None], shown.to(embeddings.dtype))

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend, length: int) -> Tensor:
        """embeddings (T, D), positions (T,) -> hidden states (T, D); length as in LanguageModel.forward."""
        return self.language_model(embeddings, positions, attend, length)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, D) -> logits (T, V), those of the routing tokens behind them where there are any."""
        said = self.language_model.logits(hidden)
        return said if self.routing is None else torch.cat((said, self.routing.logits(hidden)), dim=-1)
