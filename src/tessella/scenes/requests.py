"""What is asked of a scene, and the right answer: in words, and behind each routing token.

In: a Kit and a number.  Out: a Request, made the same whoever asks and when; its picture is drawn only when it is asked for.
English and Chinese take turns. Kinds: "detect", "everything", "ground", "segment", "text" (boxes as words), "name", "count",
"talk" (no picture), "draw", "edit".
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageOps

from tessella.chat import Message, place_marks
from tessella.foods import Food, foods
from tessella.scenes.compose import Kit, Scene, Thing, compose, cut_out
from tessella.scenes.truth import Box, Truth

DRAWN_PX = 64  # side of a picture that is drawn
BOX_KINDS = ("detect", "everything", "ground", "segment")
PLAIN_KINDS = ("text", "name", "count", "talk")
PICTURE_KINDS = ("draw", "edit")

ASK: dict[str, dict[str, tuple[str, ...]]] = {
    "detect": {"en": ("Detect {names}.", "Find every {names} in the picture."), "zh": ("检测{names}。", "找出图中的{names}。")},
    "everything": {"en": ("Detect all foods.", "Which foods are where?"), "zh": ("检测所有食物。", "图中有哪些食物，在哪里？")},
    "ground": {"en": ("Point at the {name} {where}.", "Ground: the {name} {where}."), "zh": ("指出{where}的{name}。",)},
    "segment": {"en": ("Segment the {name}.", "Outline every {name}."), "zh": ("分割{name}。", "勾出{name}的轮廓。")},
    "text": {
        "en": ("Please provide the bounding box coordinate(s) of the region this sentence describes: <ref>{name}</ref>",),
        "zh": ("请给出这句话所描述区域的边界框坐标：<ref>{name}</ref>",),
    },
    "name": {"en": ("What foods are in this picture?",), "zh": ("图中有哪些食物？",)},
    "count": {"en": ("How many foods are there?",), "zh": ("图中有几个食物？",)},
    "talk": {"en": ("What is the Chinese word for {name}?",), "zh": ("{name}用英语怎么说？",)},
    "draw": {"en": ("Draw a picture of {name}.", "Paint {name}."), "zh": ("画{name}。", "画一张{name}的图。")},
}
SEPARATOR = {"en": ", ", "zh": "、"}
PLACES = {
    "left": {"en": "on the left", "zh": "左边"},
    "right": {"en": "on the right", "zh": "右边"},
    "top": {"en": "at the top", "zh": "上面"},
    "bottom": {"en": "at the bottom", "zh": "下面"},
}
CHANGES = {
    "grey": {"en": "Make it black and white.", "zh": "把它变成黑白。"},
    "mirror": {"en": "Mirror it.", "zh": "左右翻转。"},
    "flip": {"en": "Turn it upside down.", "zh": "上下翻转。"},
    "negative": {"en": "Invert its colours.", "zh": "反转颜色。"},
}


class Asks(Protocol):
    """A conversation that is made when its turn has come."""

    @property
    def place(self) -> str: ...
    @property
    def key(self) -> str: ...
    def make(self) -> "Asked": ...


@dataclass(frozen=True)
class Request:
    """One conversation about a scene: lazily, because composing costs milliseconds and most numbers are asked once."""

    kit: Kit
    number: int
    kinds: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.kit.chance(self.number, "kind").choice(self.kinds)

    @property
    def language(self) -> str:
        return self.kit.chance(self.number, "language").choice(("en", "zh"))

    @property
    def place(self) -> str:
        return f"scene {self.number}" + (" (held out)" if self.kit.held_out else "")

    @property
    def key(self) -> str:
        """Equal for requests that are equal in everything that decides them."""
        kit = self.kit
        words = (kit.seed, kit.styles, len(kit.photos), kit.most_objects, kit.foods, kit.held_out, self.kinds)
        return f"scene {self.number} of {words}"

    def make(self) -> "Asked":
        """Compose the scene and say what is asked and right."""
        kind, language = self.kind, self.language
        chance = self.kit.chance(self.number, "request")
        if kind in ("talk", "draw", "edit"):
            return MAKERS_ALONE[kind](self.kit, language, chance)
        scene = compose(self.kit, self.number)
        return MAKERS[kind](scene, language, chance)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with its right answer."""

    kind: str
    messages: tuple[Message, ...]  # the user's question, the assistant's answer
    picture: Image.Image | None
    truths: tuple[Truth, ...]  # one for each routing token of the answer, in order
    things: tuple[Thing, ...] = ()  # all that the picture shows


def name_of(food: Food, language: str) -> str:
    return food.english if language == "en" else food.chinese


def name_list(names: Sequence[str], language: str) -> str:
    return SEPARATOR[language].join(names)


def make_asked(
    kind: str, question: str, answer: str, picture: Image.Image | None, truths: Sequence[Truth], things: Sequence[Thing] = ()
) -> Asked:
    text = place_marks(question, 0 if picture is None else 1)
    return Asked(kind, (Message("user", text), Message("assistant", answer)), picture, tuple(truths), tuple(things))


def phrase(kind: str, language: str, chance: random.Random) -> str:
    return chance.choice(ASK[kind][language])


def truth_of(route: str, label: str, things: Sequence[Thing]) -> Truth:
    return Truth(route, label, tuple(thing.box for thing in things), tuple(thing.mask for thing in things))


def _classes(scene: Scene) -> dict[str, list[Thing]]:
    """Things by their food, from left to right."""
    found: dict[str, list[Thing]] = {}
    for thing in sorted(scene.things, key=lambda thing: thing.box.left):
        found.setdefault(thing.food.key, []).append(thing)
    return found


def _detect(scene: Scene, language: str, chance: random.Random) -> Asked:
    """Some classes of the scene, now and then one that is not there."""
    classes = _classes(scene)
    chosen = [things[0].food for things in chance.sample(list(classes.values()), chance.randint(1, min(3, len(classes))))]
    if chance.random() < 0.15:
        absent = chance.choice([food for food in foods() if food.key not in classes])
        chosen.insert(chance.randint(0, len(chosen)), absent)
    names = name_list([name_of(food, language) for food in chosen], language)
    truths = [truth_of("[DET]", name_of(food, language), classes.get(food.key, [])) for food in chosen]
    return make_asked(
        "detect",
        phrase("detect", language, chance).format(names=names),
        said(truths, language),
        scene.picture,
        truths,
        scene.things,
    )


def _everything(scene: Scene, language: str, chance: random.Random) -> Asked:
    truths = [truth_of("[DET]", name_of(things[0].food, language), things) for things in _classes(scene).values()]
    return make_asked(
        "everything", phrase("everything", language, chance), said(truths, language), scene.picture, truths, scene.things
    )


def _ground(scene: Scene, language: str, chance: random.Random) -> Asked:
    """One thing, told from others of its kind by where it is."""
    things = chance.choice(list(_classes(scene).values()))
    side = chance.choice(list(PLACES))
    order = {"left": lambda t: t.box.left, "right": lambda t: -t.box.right, "top": lambda t: t.box.top}
    thing = min(things, key=order.get(side, lambda t: -t.box.bottom))
    name = name_of(thing.food, language)
    truths = [truth_of("[GRD]", name, [thing])]
    question = phrase("ground", language, chance).format(name=name, where=PLACES[side][language])
    return make_asked("ground", question, said(truths, language), scene.picture, truths, scene.things)


def _segment(scene: Scene, language: str, chance: random.Random) -> Asked:
    things = chance.choice(list(_classes(scene).values()))
    name = name_of(things[0].food, language)
    truths = [truth_of("[SEG]", name, things)]
    question = phrase("segment", language, chance).format(name=name)
    return make_asked("segment", question, said(truths, language), scene.picture, truths, scene.things)


def _text(scene: Scene, language: str, chance: random.Random) -> Asked:
    things = chance.choice(list(_classes(scene).values()))
    name = name_of(things[0].food, language)
    boxes = ", ".join(str(in_thousandths(thing.box)) for thing in things)
    question = phrase("text", language, chance).format(name=name)
    return make_asked("text", question, f"<ref>{name}</ref><box>[{boxes}]</box>", scene.picture, (), things)


def in_thousandths(box: Box) -> list[int]:
    return [round(1000 * side) for side in box]


def _name(scene: Scene, language: str, chance: random.Random) -> Asked:
    names = dict.fromkeys(name_of(things[0].food, language) for things in _classes(scene).values())
    return make_asked("name", phrase("name", language, chance), SEPARATOR[language].join(names), scene.picture, (), scene.things)


def _count(scene: Scene, language: str, chance: random.Random) -> Asked:
    return make_asked("count", phrase("count", language, chance), str(len(scene.things)), scene.picture, (), scene.things)


def _talk(kit: Kit, language: str, chance: random.Random) -> Asked:
    food = chance.choice(kit.pick())
    other = "zh" if language == "en" else "en"
    return make_asked(
        "talk", phrase("talk", language, chance).format(name=name_of(food, language)), name_of(food, other), None, ()
    )


def _draw(kit: Kit, language: str, chance: random.Random) -> Asked:
    food = chance.choice(kit.pick())
    name = name_of(food, language)
    drawn = cut_out(food, chance.choice(kit.styles))[0].resize((DRAWN_PX, DRAWN_PX), Image.Resampling.BICUBIC)
    return make_asked(
        "draw", phrase("draw", language, chance).format(name=name), f"{name}[GEN]", None, [Truth("[GEN]", name, picture=drawn)]
    )


def _edit(kit: Kit, language: str, chance: random.Random) -> Asked:
    food, change = chance.choice(kit.pick()), chance.choice(list(CHANGES))
    before = cut_out(food, chance.choice(kit.styles))[0].resize((DRAWN_PX * 2, DRAWN_PX * 2), Image.Resampling.BICUBIC)
    after = changed(before, change).resize((DRAWN_PX, DRAWN_PX), Image.Resampling.BICUBIC)
    question = CHANGES[change][language]
    return make_asked(
        "edit", question, f"{name_of(food, language)}[EDIT]", before, [Truth("[EDIT]", name_of(food, language), picture=after)]
    )


def changed(picture: Image.Image, change: str) -> Image.Image:
    """One of CHANGES, done."""
    if change == "grey":
        return ImageOps.grayscale(picture).convert("RGB")
    if change == "mirror":
        return ImageOps.mirror(picture)
    return ImageOps.flip(picture) if change == "flip" else ImageOps.invert(picture)


def said(truths: Sequence[Truth], language: str) -> str:
    """The answer's words: "red apple[DET], pizza[DET]"."""
    return SEPARATOR[language].join(f"{truth.label}{truth.route}" for truth in truths)


MAKERS = {
    "detect": _detect,
    "everything": _everything,
    "ground": _ground,
    "segment": _segment,
    "text": _text,
    "name": _name,
    "count": _count,
}
MAKERS_ALONE = {"talk": _talk, "draw": _draw, "edit": _edit}
