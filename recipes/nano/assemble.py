"""Put the stages of tessella-nano together: a folder to start from, and the packed weights that ship.

start: tower pieces of tower.py + a fresh projector + SmolLM2 -> a model folder in the official layout, for the align stage.
again: packed weights -> a model folder without LoRA and an adapter on it (LoRA, tower, projector), to be taught further.
pack:  a model folder (tower, projector) + an adapter of the instruct stage -> src/tessella/assets/nano.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tessella.checkpoint.adapters import AdapterSettings, save_adapter, state_of
from tessella.checkpoint.builtin import (
    ASSETS,
    LORA,
    PROJECTOR,
    TOWER,
    adapter_of,
    base_state,
    lora_state,
    nano_config,
    write_assets,
    write_nano,
)
from tessella.checkpoint.lowrank import combined
from tessella.checkpoint.packing import read_packed, write_packed
from tessella.checkpoint.read import load
from tessella.image import TileRule, cut_tiles, normalise, open_image
from tessella.model.connectors import Connector
from tessella.model.vision import VisionTower


def fresh_projector(tower: dict[str, Tensor], spread: float, pictures: list[Path]) -> dict[str, Tensor]:
    """A random projector whose tokens have the spread of the embedding table; otherwise nothing is learned."""
    torch.manual_seed(0)
    config = nano_config()
    model, projector = VisionTower(config.vision), Connector(config)
    model.load_state_dict({name.removeprefix("vision_model."): value for name, value in tower.items()})
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    rule = TileRule(size_px=config.tile_size_px, max_tiles=1)
    tiles = torch.cat([cut_tiles(open_image(path), rule).pixels for path in pictures])
    with torch.no_grad():
        tokens = projector(model(normalise(tiles, torch.float32)))
        projector[3].weight *= spread / tokens.std()
    return {f"mlp1.{name}": value for name, value in projector.state_dict().items()}


def read_tower(path: Path) -> dict[str, Tensor]:
    """Pieces of tower.py in a folder, or one packed file."""
    if path.is_file():
        return read_packed(path)
    pieces = sorted(path.glob("tower-*.safetensors"))
    return {name: value.float() for piece in pieces for name, value in load_file(piece).items()}


def start(args: argparse.Namespace) -> None:
    tower = read_tower(Path(args.tower))
    spread = float(base_state()["language_model.model.embed_tokens.weight"].std())
    pictures = sorted(Path(args.parts).glob("emoji/noto/*"))[:64]
    projector = fresh_projector(tower, spread, pictures)
    print(write_nano(tower, projector, None, Path(args.out), force=True), f"embedding spread {spread:.3f}")


def pack(args: argparse.Namespace) -> None:
    """The adapter's own tower and projector win over the folder's."""
    learned = lora_state(Path(args.adapter))
    state = {
        **load(args.model, device="cpu", dtype="float32").model.state_dict(),
        **{n: t for n, t in learned.items() if ".lora_" not in n},
    }
    part = {p: {n: t for n, t in state.items() if n.startswith(p)} for p in ("vision_model.", "mlp1.")}
    lora = {n: t for n, t in learned.items() if ".lora_" in n}
    if args.lora:
        lora = state_of(combined(adapter_of(read_packed(Path(args.lora))), adapter_of(lora)))
    print(write_assets(part["vision_model."], part["mlp1."], lora, Path(args.out)))


def again(args: argparse.Namespace) -> None:
    """again.toml goes on from OUT/adapter with further = "same": scale 2, as its rank and alpha say."""
    assets, out = Path(args.assets), Path(args.out)
    tower, projector, lora = (read_packed(assets / name) for name in (TOWER, PROJECTOR, LORA))
    base = write_nano(tower, projector, None, out / "base", force=True)
    rank, scale = next(value.shape[0] for name, value in lora.items() if ".lora_A" in name), 2.0
    state = {name: value / scale if ".lora_B" in name else value for name, value in lora.items()} | tower | projector
    settings = AdapterSettings(str(base.resolve()), rank, scale * rank, modules_to_save=("vision_model", "mlp1"))
    print(save_adapter(out / "adapter", state, settings, force=True))


def pack_tower(args: argparse.Namespace) -> None:
    print(write_packed(Path(args.out), read_tower(Path(args.tower))), "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for deed, flags in (
        (start, {"--tower": "folder of tower.py, or a packed tower", "--parts": "folder of collect.py", "--out": "model folder"}),
        (
            pack,
            {
                "--model": "folder that was taught",
                "--adapter": "what it learned",
                "--out": f"default {ASSETS}",
                "--lora": "packed LoRA that the folder was made with and that is to be kept beside the new one; by default none",
            },
        ),
        (again, {"--assets": "folder of packed weights", "--out": "folder for base/ and adapter/"}),
        (pack_tower, {"--tower": "folder of tower.py", "--out": "packed file"}),
    ):
        command = commands.add_parser(deed.__name__.replace("_", "-"))
        for flag, text in flags.items():
            default = str(ASSETS) if flag == "--out" else ""
            command.add_argument(flag, help=text, required="default" not in text, default=default)
        command.set_defaults(deed=deed)
    args = parser.parse_args()
    args.deed(args)


if __name__ == "__main__":
    main()
