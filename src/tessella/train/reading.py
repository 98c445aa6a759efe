"""How the rows of a dataset are understood, whichever way they are stored.

In: a path or hf:NAME, and a Reading.  Out: Found: drafts, and each bad row with its place and reason.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tessella.chat import place_marks
from tessella.errors import ConfigError, DataError, PromptError
from tessella.train.classes import Asking, class_name, read_folder
from tessella.train.foodieqa import drafts_of_sivqa, is_sivqa
from tessella.train.meta import Part, read_meta
from tessella.train.pairs import is_pair, split_pair
from tessella.train.readers import HALF_CHARACTER, VIDEO_FRAMES, Draft, Found, draft_row, read_rows
from tessella.train.recipe import Recipe
from tessella.train.tables import Table, is_hub, open_table

FORMATS = ("auto", "llava", "openai", "folder", "foodieqa")
ARCHIVES = (".gz", ".tgz", ".zip", ".7z", ".arrow", ".tar", ".parquet")
CAPTIONS = {"en": "Please describe the picture shortly.", "zh": "请简短描述这张图片。"}
# Keys of other people's rows that mean what ours mean.
OTHER_NAMES = {"texts": "messages"}


@dataclass(frozen=True)
class Reading:
    """What is asked of the rows."""

    format: str = "auto"
    image_root: Path | None = None
    asking: Asking = field(default_factory=Asking)
    choices: str = "hidden"  # of FoodieQA
    columns: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs
    boxes: str = "thousandths"
    video_frames: int = VIDEO_FRAMES

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(f'format is "{self.format}", must be one of {", ".join(FORMATS)}')

    @classmethod
    def of(cls, recipe: Recipe) -> "Reading":
        asking = Asking(recipe.question_language, recipe.questions, recipe.answer, recipe.seed)
        return cls(
            recipe.format,
            recipe.image_root,
            asking,
            recipe.choices,
            columns_of(recipe.columns),
            recipe.boxes,
            recipe.video_frames,
        )


def columns_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """("image=photo",) -> {"image": "photo"}. Raises ConfigError when a column is named twice."""
    columns = dict(pair.split("=", 1) for pair in pairs)
    if len(columns) != len(pairs):
        raise ConfigError(f"columns names one of ours twice: {' '.join(pairs)}; give each once")
    return columns


def find(path: Path, reading: Reading) -> Found:
    """Drafts of a dataset, whatever its format. Raises DataError when it is none."""
    if not is_hub(path) and not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder; check the path")
    table = open_table(path)
    if table is not None:
        root = reading.image_root or (Path.cwd() if is_hub(path) else path if path.is_dir() else path.parent)
        return _from_rows(_rows_of(table), root, reading)
    if path.suffix.lower() in ARCHIVES and path.is_file():
        raise DataError(f"{path} is packed; unpack it and give the folder, or the JSON file in it")
    if path.is_dir():
        if reading.format not in ("auto", "folder"):
            raise DataError(f'{path} is a folder, but format is "{reading.format}"; give the file in it, or format "folder"')
        return read_folder(path, reading.asking)
    if reading.format == "folder":
        raise DataError(f'{path} is a file, but format is "folder"; give a folder of folders, or format "auto"')
    parts = read_meta(path)
    if parts is not None:
        return _from_parts(parts, reading)
    return _from_rows(read_rows(path), reading.image_root or path.parent, reading)


def _from_parts(parts: list[Part], reading: Reading) -> Found:
    """All datasets of a meta file, each draft with what its part says of it."""
    whole = Found()
    for part in parts:
        found = find(part.annotation, replace(reading, image_root=part.root))
        rows = len(found.drafts) + len(found.skipped)
        if part.length is not None and part.length != rows:
            whole.notes.append(f"{part.name}: length says {part.length:,}, {rows:,} rows were found; all found are used")
        whole.drafts += [
            replace(
                draft,
                repeat=draft.repeat * part.repeat,
                jpeg=part.jpeg,
                max_tiles=part.max_tiles if draft.max_tiles is None else draft.max_tiles,
            )
            for draft in found.drafts
        ]
        whole.skipped += found.skipped
        whole.notes += [*part.notes, *found.notes]
    return whole


def _rows_of(table: Table) -> Iterator[tuple[str, Any]]:
    for number in range(len(table)):
        yield table.place(number), table.row(number)


def _from_rows(rows: Iterator[tuple[str, Any]], root: Path, reading: Reading) -> Found:
    found = Found()
    for place, row in rows:
        try:
            found.drafts += drafts_of(place, row, root, reading)
        except (DataError, PromptError) as error:  # not swallowed: it goes into the ledger, which stops the run when it fills up
            found.skipped.append((place, str(error)))
    return found


def drafts_of(place: str, row: object, root: Path, reading: Reading) -> list[Draft]:
    """One row of a file -> drafts. Raises DataError with the reason, also one that reading the line met."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"no row: it is a {type(row).__name__}, must be an object")
    row = _renamed(row, reading.columns)
    if is_pair(row):
        chosen, rejected = split_pair(row)
        return [replace(draft, rejected=rejected) for draft in drafts_of(place, chosen, root, replace(reading, columns={}))]
    if reading.format == "foodieqa" or (reading.format == "auto" and is_sivqa(row)):
        return _sound(drafts_of_sivqa(place, row, root, language=reading.asking.language, choices=reading.choices))
    if "class" in row and not {"answer", "conversations", "messages"} & row.keys():
        return _sound([_class_draft(place, row, root, reading.asking)])
    wanted = {"llava": ("conversations",), "openai": ("messages",)}.get(reading.format, ("conversations", "messages", "question"))
    if not any(key in row for key in wanted):
        row = _captioned(row, wanted, reading.asking)
    if reading.format == "openai" and "conversations" in row:
        row = {key: value for key, value in row.items() if key != "conversations"}
    return _sound([draft_row(place, row, root, video_frames=reading.video_frames)])


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under our names. Raises DataError for a column that it lacks."""
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(
            f'no column: the row has no "{missing[0]}", it has {", ".join(list(row)[:8]) or "no key"}; mend --columns'
        )
    ours = {name: row[theirs] for name, theirs in columns.items()}
    plain = {OTHER_NAMES.get(key, key): value for key, value in row.items() if key not in columns.values()}
    if isinstance(plain.get("messages"), list) and "texts" in row:
        plain["messages"] = _exchanges(plain["messages"])
    return {**plain, **ours}


def _exchanges(pairs: list[Any]) -> list[Any]:
    """[{user, assistant}, …], as the Cauldron writes them -> messages; anything else as it is."""
    if not all(isinstance(pair, Mapping) and {"user", "assistant"} <= pair.keys() for pair in pairs):
        return pairs
    return [{"role": role, "content": pair[role]} for pair in pairs for role in ("user", "assistant")]


def _captioned(row: Mapping[str, Any], wanted: tuple[str, ...], asking: Asking) -> Mapping[str, Any]:
    """An answer alone is a caption. Raises DataError for a row without one."""
    if not isinstance(row.get("answer"), str) or "question" not in wanted:
        raise DataError(f"no conversation: the row has {', '.join(list(row)[:6]) or 'no key'}, must have {' or '.join(wanted)}")
    asked = asking.questions[0] if asking.questions else CAPTIONS["zh" if asking.language == "zh" else "en"]
    return {**row, "question": asked}


def _class_draft(place: str, row: Mapping[str, Any], root: Path, asking: Asking) -> Draft:
    """A picture and its class, asked as a folder of classes is."""
    name = class_name(str(row["class"]))
    if not name:
        raise DataError("empty answer")
    question = place_marks(asking.ask(name, place, held_out=False), 1)
    turns = {**row, "question": question, "answer": asking.answer.replace("{name}", name)}
    return replace(draft_row(place, turns, root), stratum=name, label=name)


def _sound(drafts: list[Draft]) -> list[Draft]:
    """The same drafts. Raises DataError for half characters, which JSON can write (\\ud800) and no tokenizer can read."""
    for draft in drafts:
        for text in (*(message.text for message in draft.messages), *draft.names, draft.label):
            if HALF_CHARACTER.search(text):
                raise DataError("broken text: half a surrogate pair in it; write the character in UTF-8")
    return drafts
