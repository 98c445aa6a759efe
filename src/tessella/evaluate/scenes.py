"""Models side by side on scenes, or on one's own pictures with boxes: routed, boxed, outlined, grounded, named.

In: names of models, and requests.  Out: a SceneRow a model, a table, a page with overlays, and JSON.
Held-out scenes show the drawing style that no recipe of ours teaches, under numbers that no scene that teaches has.
"""

import gc
import io
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tessella.chat import Message, place_marks
from tessella.checkpoint.read import Loaded, load
from tessella.decode import decode_routed
from tessella.errors import DataError
from tessella.evaluate.boxes import SceneAnswer, SceneScore, score_answers
from tessella.evaluate.judge import Judged, judge_at
from tessella.evaluate.run import Settings
from tessella.files import write_whole
from tessella.foods import STYLES
from tessella.generate import generate_batch
from tessella.inputs import Picture
from tessella.marks import boxes_in, draw_boxes
from tessella.model.routing import Routed
from tessella.provenance import provenance
from tessella.sampling import GREEDY
from tessella.scenes.coco import CocoRequest, read_coco
from tessella.scenes.compose import SIDE_PX, Kit, photos_in
from tessella.scenes.requests import ASK, BOX_KINDS, PICTURE_KINDS, PLAIN_KINDS, Asks, Request, name_of

FAINT = 0.05  # objects down to this score count for AP50, which looks at the whole curve
MOST_CARDS = 60


@dataclass(frozen=True)
class SceneWish:
    """Which scenes are asked. coco: files of one's own pictures in their place."""

    count: int = 0
    kinds: tuple[str, ...] = (*BOX_KINDS, *PLAIN_KINDS)
    style: str = STYLES[-1]
    photos: Path | None = None
    most_objects: int = 5
    foods: int | None = None
    seed: int = 0
    coco: tuple[Path, ...] = ()
    image_root: Path | None = None
    max_tokens: int = 160
    judge: Path | None = None  # file of the independent judge of drawn foods; made there when it is missing

    def requests(self) -> list[Asks]:
        """Raises DataError when there is nothing to ask."""
        known = (*BOX_KINDS, *PLAIN_KINDS, *PICTURE_KINDS)
        odd = [kind for kind in self.kinds if kind not in known]
        if odd or not self.kinds:
            raise DataError(f"scene kinds are {list(self.kinds)}; name some of {', '.join(known)}")
        if self.style not in STYLES:
            raise DataError(f'scene style is "{self.style}"; name one of {", ".join(STYLES)}')
        photos = () if self.photos is None else photos_in(self.photos)
        kit = Kit((self.style,), photos, self.most_objects, self.seed, self.foods, held_out=True)
        asks: list[Asks] = [Request(kit, number, self.kinds) for number in range(self.count)]
        for path in self.coco:
            pictures, skipped = read_coco(path, self.image_root)
            for place, reason in skipped:
                Console(stderr=True).print(f"{place} is left out: {reason}", highlight=False, markup=False)
            asks += [CocoRequest(picture, number, self.seed) for number, picture in enumerate(pictures)]
        if not asks:
            raise DataError("there are no scenes to score; say --scenes 200, or --coco FILE with your own pictures")
        return asks


@dataclass(frozen=True)
class SceneRow:
    model: str
    score: SceneScore
    answers: tuple[SceneAnswer, ...]
    seconds: float
    device: str
    dtype: str


def score_scenes(models: Sequence[str], wish: SceneWish, settings: Settings, html: Path | None = None) -> dict[str, Any]:
    """Ask every model, show the table, write the page; gives what --json writes."""
    if not models:
        raise DataError("there is no model to score; give one MODEL or more")
    asks, console = wish.requests(), Console()
    judge = None if wish.judge is None else judge_at(wish.judge, Console(stderr=True).print)
    rows = []
    for model in models:
        rows.append(_row(model, asks, wish, settings, judge))
        gc.collect()
    console.print(_table(rows))
    if judge is not None:
        console.print(f"the judge itself names {judge.right:,} of {judge.views:,} unseen views of the shipped drawings right")
    origin = provenance()
    if html is not None:
        write_whole(html, _page(rows, str(origin.date), origin.command))
        console.print(f"report: {html}", highlight=False)
    listed = [
        {"model": row.model, **row.score.as_json(), "seconds": row.seconds, "device": row.device, "dtype": row.dtype}
        for row in rows
    ]
    known = {} if judge is None else {"judge": {"right": judge.right, "views": judge.views}}
    return {"task": "scenes", "requests": len(asks), "style": wish.style, "origin": asdict(origin), **known, "models": listed}


def _row(model: str, asks: Sequence[Asks], wish: SceneWish, settings: Settings, judge: Judged | None) -> SceneRow:
    loaded = load(model, device=settings.device, dtype=settings.dtype, max_tiles=settings.max_tiles, system=settings.system)
    loaded.inputs.limit_megapixels = settings.limit_megapixels
    begun = time.monotonic()
    answers: list[SceneAnswer] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(model, total=len(asks))
        for some in _answers(loaded, asks, wish.max_tokens, settings.batch_items):
            answers += some if judge is None else [judged_by(judge, answer) for answer in some]
            progress.advance(bar, len(some))
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return SceneRow(
        model, score_answers(answers), tuple(answers), round(time.monotonic() - begun, 1), str(loaded.model.device), dtype
    )


def _answers(loaded: Loaded, asks: Sequence[Asks], max_tokens: int, batch_items: int) -> Iterator[list[SceneAnswer]]:
    """Answers a batch at a time."""
    params = replace(GREEDY, max_tokens=max_tokens)
    for at in range(0, len(asks), batch_items):
        some = [(ask.place, ask.make()) for ask in asks[at : at + batch_items]]
        pictures = [[] if asked.picture is None else [Picture(asked.picture)] for _, asked in some]
        inputs = [
            loaded.inputs.build(asked.messages[:-1], shown, room=max_tokens)
            for (_, asked), shown in zip(some, pictures, strict=True)
        ]
        routed: list[Routed] = []
        ids = generate_batch(loaded.model, inputs, params, loaded.stop_ids, rows_at_once=batch_items, routed=routed.append)
        answers = []
        for row, (place, asked) in enumerate(some):
            mine = [one for one in routed if one.row == row]
            size = None if asked.picture is None else asked.picture.size
            shown = decode_routed(loaded.model, loaded.tokenizer, inputs[row], ids[row], mine, size, sure=FAINT)
            answers.append(SceneAnswer(place, asked, loaded.tokenizer.decode(ids[row]).strip(), tuple(shown)))
        yield [read_back(loaded, answer) for answer in answers]


def read_back(loaded: Loaded, answer: SceneAnswer) -> SceneAnswer:
    """The answer with what the model calls the picture that it drew; as it was where it drew none."""
    drawn = [one.picture for one in answer.shown if one.picture is not None]
    if answer.asked.kind != "draw" or not drawn:
        return answer
    language = "zh" if has_chinese(answer.asked.truths[0].label) else "en"
    question = Message("user", place_marks(ASK["name"][language][0], 1))
    prompt = loaded.inputs.build([question], [Picture(drawn[0].resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))])
    ids = generate_batch(loaded.model, [prompt], replace(GREEDY, max_tokens=24), loaded.stop_ids)[0]
    return replace(answer, read_back=loaded.tokenizer.decode(ids).strip())


def judged_by(judge: Judged, answer: SceneAnswer) -> SceneAnswer:
    """The answer with what the judge calls the picture that was drawn; "" where none was drawn though one was asked for."""
    if answer.asked.kind != "draw":
        return answer
    drawn = [one.picture for one in answer.shown if one.picture is not None]
    language = "zh" if has_chinese(answer.asked.truths[0].label) else "en"
    return replace(answer, judged=name_of(judge.name(drawn[0]), language) if drawn else "")


def has_chinese(text: str) -> bool:
    return any("\u3400" <= letter <= "\u9fff" for letter in text)


def _table(rows: Sequence[SceneRow]) -> Table:
    table = Table(title=f"scenes: {len(rows[0].answers):,} requests", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row.model)
    for lines in zip(*(row.score.rows() for row in rows), strict=True):
        table.add_row(lines[0][0], *(told for _, told in lines))
    return table


def _page(rows: Sequence[SceneRow], date: str, command: str) -> str:
    """One HTML page with the scores, and the first requests with what was found drawn on their pictures."""
    places = Path(__file__).parent / "templates"
    page = Environment(loader=FileSystemLoader(places), autoescape=True, undefined=StrictUndefined)
    cards = [
        {"asked": first.asked, "answers": [(row.model, *_drawn(row.answers[k])) for row in rows]}
        for k, first in enumerate(rows[0].answers[:MOST_CARDS])
    ]
    return page.get_template("scenes.html.j2").render(rows=rows, cards=cards, date=date, command=command, dict=dict)


def _drawn(answer: SceneAnswer) -> tuple[str, str]:
    """The words, and the picture with what was found (a data: address; "" without a picture)."""
    if answer.asked.picture is None:
        return answer.text, ""
    sure = [
        (box, one) for shown in answer.shown for box, one in zip(shown.boxes(), shown.objects, strict=True) if one.score >= 0.3
    ]
    words = boxes_in(answer.text)
    masks = [one.mask.numpy() for _, one in sure]
    image = draw_boxes(answer.asked.picture, [box for box, _ in sure] + words, masks)
    image.thumbnail((320, 320), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=70)
    return answer.text, "data:image/webp;base64," + b64encode(stream.getvalue()).decode()
