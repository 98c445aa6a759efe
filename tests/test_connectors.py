"""Every kind of connector, between a tiny tower and a tiny decoder: its tokens, its slots, and its way through a folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from tessella.chat import Message
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import load, load_model
from tessella.config import ConnectorConfig, ModelConfig, QFormerConfig, load_config
from tessella.errors import CheckpointError, ConfigError
from tessella.generate import all_logits
from tessella.inputs import Picture
from tessella.model.connectors import CONNECTORS, Connector, average, concatenate
from test_relatives import changed
from tiny import tiny_config, tiny_folder

LLAMA = "LlamaForCausalLM"
FORMER = QFormerConfig(24, 48, num_layers=3, num_heads=2, image_width=32, num_queries=5)
KINDS = {
    "pixel_shuffle": (ConnectorConfig(), 4),
    "linear": (ConnectorConfig("linear"), 16),
    "mlp": (ConnectorConfig("mlp", bias=False), 16),
    "pool": (ConnectorConfig("pool", factor=4), 1),
    "concat": (ConnectorConfig("concat"), 4),
    "qformer": (ConnectorConfig("qformer", qformer=FORMER), 5),
}


def config_with(kind: str) -> ModelConfig:
    return replace(tiny_config(LLAMA), connector=KINDS[kind][0])


def test_each_kind_is_tested_here() -> None:
    assert KINDS.keys() == CONNECTORS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_connector_gives_as_many_tokens_as_its_config_counts(kind: str) -> None:
    config = config_with(kind)
    tokens = Connector(config)(torch.randn(2, 4, 4, 32))
    assert tokens.shape == (2, config.slots_per_tile, 64) and config.slots_per_tile == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_it_is_written_read_and_answers(kind: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", LLAMA, config=config_with(kind))
    assert load_config(base) == config_with(kind)
    done = convert(base, tmp_path / "again", Wish(to="official"))
    assert done.proof.holds
    ours, again = (load(folder, device="cpu", dtype="float32") for folder in (base, tmp_path / "again"))
    picture = Picture(Image.linear_gradient("L").resize((150, 60)).convert("RGB"))
    one = ours.inputs.build([Message("user", "<image>\nWhat is it?")], [picture])
    assert int(one.slots.sum()) == len(one.tiles) * KINDS[kind][1]
    assert torch.equal(all_logits(ours.model, one), all_logits(again.model, one))
    if kind != "pixel_shuffle":
        with pytest.raises(ConfigError, match=f'connector is "{kind}".*keep the official layout'):
            convert(base, tmp_path / "native", Wish(to="native"))


def test_neighbours_are_joined_in_the_order_of_the_row() -> None:
    x = torch.randn(2, 4, 4, 3)
    joined = concatenate(x, 4)
    assert torch.equal(joined[1, 2], torch.cat([x[1, 2, i] for i in range(4)]))  # the third token is the third row, as here P = 4


def test_pooling_is_adaptive_average_pooling() -> None:
    x = torch.randn(2, 6, 6, 3)
    wanted = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 3).flatten(2).transpose(1, 2)
    assert (average(x, 2) - wanted).abs().max() < 1e-6


# ---- bad input


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"kind": "perceiver"}, 'connector is a "perceiver"; known are pixel_shuffle, linear'),
        ({"kind": "linear", "width": 3}, "has width; known are kind"),
        ({"kind": "pool", "factor": 0}, "factor is 0"),
        ({"kind": "pool", "factor": 3}, "multiple of 3 patches"),
        ({"kind": "pool", "factor": "2"}, "must be of type int"),
        ({"kind": "qformer"}, "without the sizes of a Q-Former"),
        ({"kind": "qformer", "qformer": {"hidden_size": 24}}, "has no intermediate_size"),
    ],
    ids=str,
)
def test_a_connector_that_we_do_not_have_is_refused_by_name(section: dict[str, Any], told: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", LLAMA)
    with pytest.raises(ConfigError, match=told):
        load_config(changed(base, tmp_path, tessella={"connector": section}))


def test_a_qformer_for_another_tower_is_told() -> None:
    with pytest.raises(ConfigError, match="features 40 wide, but the tower's are 32 wide"):
        replace(tiny_config(LLAMA), connector=ConnectorConfig("qformer", qformer=replace(FORMER, image_width=40)))


def test_a_qformer_folder_without_its_query_tokens_is_told(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", LLAMA, config=config_with("qformer"))
    state = load_file(base / "model.safetensors")
    del state["mlp1.0.query_tokens"]
    save_file(state, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 are missing: mlp1\.0\.query_tokens"):
        load_model(base)
