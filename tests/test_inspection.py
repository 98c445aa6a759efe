"""What `tessella inspect` says of a picture, a dataset and a model is what the model really sees and is."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tessella import cli
from tessella.checkpoint.convert import Wish, convert
from tessella.image import TileRule, cut_tiles
from tessella.inspection import GAP_PX, count_parts, draw_tiles
from tiny import ARCHITECTURES, tiny_config, tiny_folder, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny", "InternLM2ForCausalLM")


def inspected(words: list[str], tmp_path: Path) -> dict[str, object]:
    out = tmp_path / "inspect.json"
    assert cli.main(["inspect", *words, "--json", str(out)]) == 0
    result: dict[str, object] = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"] == "inspect"
    return result


def test_the_drawing_shows_each_tile_unchanged_where_it_lies() -> None:
    chance = np.random.default_rng(0)
    image = Image.fromarray(chance.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    tiles = cut_tiles(image, TileRule(size_px=112, max_tiles=6))
    assert (tiles.grid.columns, tiles.grid.rows, len(tiles.pixels)) == (3, 2, 7)
    sheet = np.asarray(draw_tiles(tiles))
    step = 112 + GAP_PX
    assert sheet.shape == (2 * step + GAP_PX, 4 * step + GAP_PX, 3)
    for number, pixels in enumerate(tiles.pixels):
        row, column = divmod(number, 3) if number < 6 else (0, 3)
        top, left = GAP_PX + row * step, GAP_PX + column * step
        shown = sheet[top : top + 112, left : left + 112]
        # its number covers the upper left; all below is the tile itself
        assert np.array_equal(shown[56:], pixels.permute(1, 2, 0).numpy()[56:])
        assert not np.array_equal(shown, pixels.permute(1, 2, 0).numpy())


def test_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, drawn = tmp_path / "dish.png", tmp_path / "tiles.png"
    Image.new("RGB", (120, 60), "orange").save(path)
    result = inspected([str(path), "--model", str(folder), "--output", str(drawn)], tmp_path)
    expected = {"kind": "image", "columns": 2, "rows": 1, "tiles": 3, "thumbnail": True, "visual_tokens": 12, "width_px": 120}
    assert expected.items() <= result.items()
    assert Image.open(drawn).size == (3 * (56 + GAP_PX) + GAP_PX, 56 + 2 * GAP_PX)
    shown = capsys.readouterr().out
    assert "2 columns x 1 rows and a thumbnail" in shown and "<img>[12 slots]</img>" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dish.png", "--output", "tiles.txt"], "ends in .png"),
        (["dihs.png"], "dihs.png: no such file"),
        (["rows.jsonl"], "rows.jsonl: no such file"),
        (["photos.tar"], "photos.tar is packed; unpack it"),
        (["dish.png", "--limit-megapixels", "0.005"], "120 x 60 px = 0.0 megapixels; at most 0.005"),
    ],
)
def test_what_cannot_be_looked_at_is_told(
    words: list[str], told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (120, 60), "orange").save("dish.png")
    Path("photos.tar").write_bytes(b"")
    assert cli.main(["inspect", *words, "--model", str(folder)]) == 2
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dish.png", "photos.tar"]


def test_pictures_may_lie_apart_from_their_rows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (120, 60), "orange").save(tmp_path / "elsewhere" / "dish.png")
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "An orange."}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "dish.png", "conversations": turns}) + "\n", encoding="utf-8")
    result = inspected([str(rows), "--image-root", str(tmp_path / "elsewhere"), "--model", str(folder)], tmp_path)
    assert result["samples"] == 1 and result["skipped"] == 0


def test_a_dataset(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("soup", "cake"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (60, 60 + number), "orange").save(tmp_path / "photos" / name / f"{number}.png")
    result = inspected([str(tmp_path / "photos"), "--model", str(folder)], tmp_path)
    assert result["kind"] == "dataset" and result["samples"] == 6
    assert "«" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_add_up_to_the_model(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_embeddings=tied)
    parts, model = count_parts(config), tiny_model(config)
    assert parts.total == sum(weight.numel() for weight in model.parameters())
    assert parts.tower == sum(weight.numel() for weight in model.vision_model.parameters())
    assert (parts.head == 0) == tied


def test_a_model(folder: Path, tmp_path: Path) -> None:
    result = inspected([str(folder), "--dtype", "float32", "--device", "cpu"], tmp_path)
    assert isinstance(result["parameters"], dict)
    assert result["weight_bytes"] == 4 * result["parameters"]["total"]
    # keys and values, 2 layers, 2 heads of 16, 4 bytes
    assert result["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    tensors = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert isinstance(result["disk_bytes"], int) and 0.95 * tensors < result["disk_bytes"] <= tensors


@pytest.mark.parametrize("layout", ["official", "native"])
def test_a_model_that_lacks_tensors_is_shown_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Literal["official", "native"]
) -> None:
    place = convert(folder, tmp_path / "whole", Wish(to=layout)).folder
    state = load_file(place / "model.safetensors")
    name = next(name for name in state if "layers.1" in name)
    del state[name]
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["inspect", str(place)]) == 2
    told = capsys.readouterr()
    assert "parameters" in told.out and "1 are missing" in told.err and name in told.err


def test_a_thing_that_is_none_of_them_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture", encoding="utf-8")
    assert cli.main(["inspect", str(text), "--model", str(tiny_folder(tmp_path / "m", "LlamaForCausalLM"))]) == 2
    assert "notes.txt" in capsys.readouterr().err
