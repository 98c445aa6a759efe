"""Pictures by diffusion: a tiny UNet learns by heart, is saved and read; a Stable Diffusion folder behind the same interface."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tessella.checkpoint.routing import read_routing, write_routing
from tessella.errors import CheckpointError
from tessella.model.decoders.pictures import PictureConfig, PictureDecoder
from tessella.model.routing import Routing
from tessella.routes import routes_for
from tessella.scenes.captions import read_captions
from tessella.train.multitask.teach import as_tensor

pytest.importorskip("diffusers")
WIDTH = 24
TINY = PictureConfig(WIDTH, side_px=16, channels=(16, 32), condition_width=32, condition_tokens=4, pooled=True)


@pytest.fixture(scope="module")
def decoder() -> PictureDecoder:
    """Taught that one state means red and the other blue."""
    torch.manual_seed(0)
    decoder = PictureDecoder(TINY)
    states, pictures = two_colours()
    adam = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(50):
        loss = decoder.loss(states.repeat(4, 1, 1), pictures.repeat(4, 1, 1, 1), None).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return decoder.eval()


def two_colours() -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    states = torch.randn(2, 64, WIDTH, generator=chance)
    return states, torch.stack([as_tensor(Image.new("RGB", (40, 40), colour), 16) for colour in ("red", "blue")])


def test_each_condition_draws_its_own_picture(decoder: PictureDecoder) -> None:
    states, _ = two_colours()
    red, blue = decoder.paint(states, None, steps=12, guidance=2.0)
    assert float(red[0].mean() - red[2].mean()) > 0.5 and float(blue[2].mean() - blue[0].mean()) > 0.5


def test_a_seed_draws_the_same_picture_and_another_seed_another(decoder: PictureDecoder) -> None:
    states, _ = two_colours()
    one, again, other = (decoder.paint(states[:1], None, steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_what_is_edited_is_seen(decoder: PictureDecoder) -> None:
    states, pictures = two_colours()
    a, b = (decoder.paint(states[:1], before[None], steps=2) for before in pictures)
    assert not torch.equal(a, b)


def test_the_decoder_is_saved_beside_the_rest_and_read_again(decoder: PictureDecoder, tmp_path: Path) -> None:
    routing = Routing(routes_for(512), WIDTH)
    routing.pictures = decoder
    write_routing(tmp_path, routing)
    again = read_routing(tmp_path / "routing", 512, WIDTH)
    assert again.pictures is not None and again.boxes is None
    kept = {name: weight.half().float() for name, weight in decoder.named_parameters()}
    torch.testing.assert_close(dict(again.pictures.named_parameters()), kept, atol=0, rtol=0)


def test_what_was_told_reaches_the_time_embedding_too(decoder: PictureDecoder) -> None:
    """Same tokens to look at, another mean: only the pooled way can tell."""
    seen, when = torch.zeros(1, 6, 16, 16), torch.tensor([500])
    condition = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    assert decoder.pool is not None
    with torch.no_grad():
        plain = decoder._run(seen, when, condition)
        kept = decoder.pool.bias.clone()
        decoder.pool.bias += 1.0
        moved = decoder._run(seen, when, condition)
        decoder.pool.bias.copy_(kept)
    assert not torch.allclose(plain, moved)


def test_a_folder_from_before_the_pooled_way_is_read_without_it(tmp_path: Path) -> None:
    routing = Routing(routes_for(512), WIDTH)
    routing.pictures = PictureDecoder(PictureConfig(WIDTH, side_px=16, channels=(16, 32), condition_width=32, condition_tokens=4))
    write_routing(tmp_path, routing)
    path = tmp_path / "routing" / "routing.json"
    raw = json.loads(path.read_text())
    del raw["pictures"]["pooled"]
    path.write_text(json.dumps(raw))
    again = read_routing(tmp_path / "routing", 512, WIDTH)
    assert again.pictures is not None and again.pictures.pool is None


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in Stable Diffusion 1.5's form with tiny random weights; its UNet sees a picture beside the noise."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("sd")
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=4, cross_attention_dim=12, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16,
        **blocks,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(folder / "scheduler")
    return folder


def test_a_stable_diffusion_folder_draws_and_edits_and_only_the_mapper_is_taught(stable_diffusion: Path) -> None:
    decoder = PictureDecoder(PictureConfig(WIDTH, folder=str(stable_diffusion)))
    assert all(name.startswith("mapper.") for name, _ in decoder.named_parameters()) and decoder.edits
    states, pictures = two_colours()
    decoder.loss(states, pictures, pictures).sum().backward()
    assert all(weight.grad is not None for weight in decoder.mapper.parameters())
    painted = decoder.paint(states, pictures, steps=2)
    assert painted.shape == (2, 3, 16, 16) and bool(torch.isfinite(painted).all())


def test_a_folder_that_is_no_stable_diffusion_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no unet and no vae and no scheduler"):
        PictureDecoder(PictureConfig(WIDTH, folder=str(tmp_path)))


def test_captions_are_read_strictly(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    rows = [
        '{"caption": "a red square", "picture": "red.png"}',
        '{"caption": "make it blue", "before": "red.png", "picture": "red.png"}',
        '{"caption": "  ", "picture": "red.png"}',
        '{"caption": "gone", "picture": "gone.png"}',
        '{"caption": "odd", "picture": "red.png", "size": 3}',
        "{",
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    found, skipped = read_captions(tmp_path / "captions.jsonl")
    drawn, edited = (one.make() for one in found)
    assert drawn.messages[1].text == "a red square[GEN]" and drawn.picture is None
    assert edited.messages[1].text == "[EDIT]" and edited.picture is not None and edited.truths[0].picture is not None
    reasons = [reason.split(":")[0] for _, reason in skipped]
    assert reasons == ["empty caption", "picture missing", "no caption row", "not JSON"]
