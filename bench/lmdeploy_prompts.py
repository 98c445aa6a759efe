"""Does LMDeploy read our official folders as we do? Prompts, ids and tiles, without its engines, which want a GPU.

In: folders, and the Python of an environment with LMDeploy.  Out: a row for each folder; the exit code is 1 when one differs.

    python bench/lmdeploy_prompts.py FOLDER... --python ENV/bin/python

Without folders: tessella-nano and a tiny random model of each family, converted to the official layout for it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tessella.chat import IMAGE_MARK, Message, render, text_of
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.verify import conversations
from tessella.config import load_config
from tessella.image import normalise
from tessella.inputs import Inputs, Picture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

PROBE = Path(__file__).with_name("lmdeploy_probe.py")
SLOT = "<img><IMG_CONTEXT></img>"  # how LMDeploy writes a picture into a prompt


@dataclass(frozen=True)
class Reading:
    """What LMDeploy made of one folder, beside ours."""

    version: str
    template: str  # the class it reads the chat template with
    differing: tuple[str, ...]
    characters: int
    ids: int
    tiles: int
    largest: float  # difference of a tile's numbers, which LMDeploy rounds to the weights' type

    def row(self, name: str) -> str:
        told = "; ".join(self.differing) or "equal"
        return (
            f"| {name} | {self.template} | {told} | {self.characters:,} characters, {self.ids:,} ids | "
            f"{self.tiles} tiles, by at most {self.largest:.4f} |"
        )


def ask(python: str, folder: Path, place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The probe's answer. -P: the probe's own folder is no place to import from."""
    talks = []
    for number, (messages, pictures) in enumerate(conversations()):
        files = [place / f"{number}-{i}.png" for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.source.save(file)  # type: ignore[union-attr]
        talks.append(
            {
                "messages": [{"role": one.role, "content": one.text.replace(IMAGE_MARK, "<image>")} for one in messages],
                "pictures": [str(file) for file in files],
                "limits": [{"max_dynamic_patch": picture.max_tiles} for picture in pictures],
            }
        )
    (place / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    out = place / "out.json"
    command = [python, "-P", str(PROBE), str(folder), str(place / "talks.json"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"LMDeploy failed on {folder}:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text(encoding="utf-8")), load_file(out.with_suffix(".safetensors"))


def compare(python: str, folder: Path) -> Reading:
    """All conversations of the proof, as LMDeploy and as we build them."""
    with tempfile.TemporaryDirectory() as place:
        found, tiles = ask(python, folder, Path(place))
    inputs = Inputs.load(folder, load_config(folder))
    differing, characters, ids, count, largest = [], 0, 0, 0, 0.0
    talks: list[tuple[list[Message], list[Picture]]] = conversations()
    for number, ((messages, pictures), theirs) in enumerate(zip(talks, found["talks"], strict=True)):
        one = inputs.build(messages, pictures)
        bos = inputs.tokenizer.bos_id if inputs.template.add_bos else None
        begins = "" if bos is None else inputs.tokenizer.name_of(bos)
        text = begins + text_of(render(messages, inputs.template, open_turn=True)).replace(IMAGE_MARK, SLOT)
        if theirs["prompt"] != text:
            differing.append(f"prompt {number + 1}: {theirs['prompt']!r} for {text!r}")
        if theirs["ids"] != one.ids.tolist():
            differing.append(f"ids {number + 1}: {len(theirs['ids'])} for {len(one)}")
        characters, ids = characters + len(text), ids + len(one)
        places = [name for name in sorted(tiles) if name.startswith(f"{number}:")]
        begin = 0
        for place_name in places:
            their_tiles = tiles[place_name]
            our_tiles = normalise(one.tiles[begin : begin + len(their_tiles)], their_tiles.dtype)
            largest = max(largest, float((our_tiles - their_tiles).abs().max()))
            begin += len(their_tiles)
        if begin != len(one.tiles):
            differing.append(f"tiles {number + 1}: {begin} for {len(one.tiles)}")
        count += len(one.tiles)
    return Reading(found["version"], found["template"], tuple(differing), characters, ids, count, largest)


def own_folders(place: Path) -> dict[str, Path]:
    """What `convert --to official` writes for the built-in model and for a tiny model of each family."""
    folders = {"tessella-nano": convert("tessella-nano", place / "nano").folder}
    for name in tiny.FAMILIES:
        config = tiny.family(name)
        base = tiny.tiny_folder(place / f"base-{name}", config.language.architecture, config=config)
        folders[f"tiny {name}"] = convert(base, place / name, Wish(proof="tensors")).folder
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--python", required=True, help="of an environment with LMDeploy")
    told = parser.parse_args()
    equal = True
    with tempfile.TemporaryDirectory() as place:
        folders = {folder.name: folder for folder in told.folders} or own_folders(Path(place))
        print("| folder | template read by | prompts and ids | of | tiles |\n| --- | --- | --- | --- | --- |")
        for name, folder in folders.items():
            reading = compare(told.python, folder)
            equal &= not reading.differing
            print(reading.row(name), flush=True)
    print(f"\nLMDeploy {reading.version}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
