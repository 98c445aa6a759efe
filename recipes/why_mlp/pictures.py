"""Tiny-ImageNet for the comparison: pictures by class, the same in the same order for each connector.

In: a folder with tiny-imagenet-train-0.tar, -1.tar, tiny-imagenet-val.tar (a folder of each is a WordNet id) and
tiny-imagenet-classes.json (id -> name).  Out: samples to learn from and samples held out.
"""

import io
import json
import random
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tessella.chat import Message
from tessella.inputs import Picture

TRAIN, HELD_OUT = ("tiny-imagenet-train-0.tar", "tiny-imagenet-train-1.tar"), "tiny-imagenet-val.tar"
QUESTION = "<image>\nWhat is in this picture?"


@dataclass(frozen=True)
class Shown:
    """One picture and its name."""

    picture: Image.Image
    name: str

    @property
    def sample(self) -> tuple[tuple[Message, Message], Picture]:
        return (Message("user", QUESTION), Message("assistant", self.name)), Picture(self.picture, max_tiles=1)


def read(tar: Path, names: dict[str, str], most: int) -> list[Shown]:
    """At most so many pictures of each class, in the order of the file, class after class in turn."""
    by_class: dict[str, list[Shown]] = defaultdict(list)
    with tarfile.open(tar) as archive:
        for member in archive:
            kind = member.name.split("/")[0]
            file = archive.extractfile(member) if kind in names and len(by_class[kind]) < most else None
            if file is not None:
                by_class[kind].append(Shown(Image.open(io.BytesIO(file.read())).convert("RGB"), names[kind]))
    longest = max((len(shown) for shown in by_class.values()), default=0)
    return [shown[i] for i in range(longest) for shown in by_class.values() if i < len(shown)]


def load(data: Path, classes: int, per_class: int, held_out: int) -> tuple[list[Shown], list[Shown]]:
    """Pictures of the first so many classes by id, per_class of each to learn from; held_out of all others of them."""
    every = json.loads((data / "tiny-imagenet-classes.json").read_text(encoding="utf-8"))
    names = {kind: every[kind].split(",")[0] for kind in sorted(every)[:classes]}  # the first of its synonyms
    train = [shown for tar in TRAIN for shown in read(data / tar, names, -(-per_class // len(TRAIN)))]
    random.Random(0).shuffle(train)
    return train, read(data / HELD_OUT, names, -(-held_out // classes))[:held_out]
