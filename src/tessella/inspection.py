"""What the model will really see of a picture, of a dataset, and what a model is made of.

In: a path and the model through whose eyes it is seen.  Out: tables on the screen, a drawing of the tiles, the result for --json.
"""

import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from tessella.chat import Message, place_marks
from tessella.checkpoint.adapters import learned_in
from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.hub import has_weights, hub_name
from tessella.checkpoint.names import Layout
from tessella.checkpoint.published import HUB, PUBLISHED, published_config
from tessella.checkpoint.read import check_weights, find_model, layout_of, resolve_head
from tessella.checkpoint.weights import Weights, open_weights
from tessella.config import ModelConfig, load_config, model_config, read_config_json
from tessella.errors import CheckpointError, DataError
from tessella.files import write_whole
from tessella.image import LIMIT_MEGAPIXELS, Tiles, cut_tiles, open_image
from tessella.inputs import Inputs, Picture
from tessella.model.device import choose_device, choose_dtype
from tessella.train.classes import SUFFIXES
from tessella.train.dataset import read_recipe_data
from tessella.train.forecast import epoch_of, forecast, measured
from tessella.train.packing import Packing
from tessella.train.preflight import look as preflight
from tessella.train.reading import ARCHIVES
from tessella.train.recipe import Recipe, load_recipe
from tessella.train.survey import render_survey, runs_of, survey_of
from tessella.train.tables import is_hub

QUESTION = "What is in this picture?"
GAP_PX = 8
ROWS = (".json", ".jsonl")
BUILT_IN = "tessella-nano"


@dataclass(frozen=True)
class Look:
    """How pictures and datasets are looked at."""

    model: str | None = None  # through whose eyes; None: the recipe's, or the built-in one
    output: Path | None = None  # where a picture's tiles are drawn
    max_tiles: int | None = None
    image_root: Path | None = None  # of a dataset
    choices: str = "hidden"  # of FoodieQA
    limit_megapixels: float = LIMIT_MEGAPIXELS
    recipe: Path | None = None  # that the dataset is to be taught with
    columns: tuple[str, ...] = ()  # of a dataset
    boxes: str = "thousandths"  # of a dataset
    places: int = 3  # of each kind of fault that are named
    forecast: bool = False  # measure how long the recipe takes, and how much memory


def inspect(thing: str, look: Look, device: str, dtype: str) -> dict[str, Any]:
    """Look at a picture, a dataset or a model, whichever it is; gives what --json writes. Raises DataError for anything else."""
    if is_hub(thing):
        return inspect_dataset(Path(thing), look, Console())
    path = learned_in(Path(thing).expanduser())
    if not path.exists() and path.suffix.lower() in (*ROWS, *ARCHIVES, *SUFFIXES):
        raise DataError(f"{path}: no such file; check the path")
    if look.recipe is not None and thing == BUILT_IN:
        return inspect_dataset(None, look, Console())
    is_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    console = Console()
    if is_model or not path.exists():
        return inspect_model(thing, device, dtype, console)
    if path.is_dir() or path.suffix.lower() in (*ROWS, *ARCHIVES):
        return inspect_dataset(path, look, console)
    if path.is_file():
        return inspect_image(path, look, console)
    raise DataError(f"{path} is neither a file nor a folder; give a picture, a dataset or a model")


def eyes(model: str, max_tiles: int | None) -> tuple[Inputs, ModelConfig]:
    """Prompts and tiles of a model, without its weights."""
    folder, _ = find_model(model, weights=False)
    config = load_config(folder)
    return Inputs.load(folder, config, max_tiles=max_tiles), config


# ---- a picture


def inspect_image(path: Path, look: Look, console: Console) -> dict[str, Any]:
    """Draw the tiles and print what they cost. Raises DataError when the drawing would be no PNG, and ImageError."""
    output = look.output or Path(f"{path.stem}-tiles.png")
    if output.suffix.lower() != ".png":
        raise DataError(f"--output {output}: the tiles are drawn as a PNG; give a name that ends in .png")
    inputs, config = eyes(look.model or BUILT_IN, look.max_tiles)
    inputs.limit_megapixels = look.limit_megapixels
    tiles = cut_tiles(open_image(path, limit_megapixels=look.limit_megapixels), inputs.rule())
    prompt = inputs.build([Message("user", place_marks(QUESTION, 1))], [Picture(path)])
    drawing = io.BytesIO()
    draw_tiles(tiles).save(drawing, "PNG")
    write_whole(output, drawing.getvalue())
    total, grid = len(tiles.pixels), tiles.grid
    thumbnail, window = tiles.whole is not None, inputs.window(tiles.width_px, tiles.height_px)
    each = f"{config.slots_per_tile} visual tokens each"
    if window is not None:  # a part of each tile may be padding, and rows end in a newline
        each = f"{config.slots_per_tile} visual tokens of the whole picture, {window.tokens} of its tiles without padding"
    with_whole = "" if not thumbnail else " and a thumbnail" if tiles.whole else " and the whole picture"
    facts = {
        "size": f"{tiles.width_px} x {tiles.height_px} px",
        "grid": f"{grid.columns} columns x {grid.rows} rows{with_whole}",
        "tiles": f"{total} of {config.tile_size_px} px, {each}",
        "prompt": f"{len(prompt)} tokens, {int(prompt.slots.sum())} of them visual; the model takes {config.context_tokens}",
        "drawn": str(output),
    }
    print_facts(str(path), facts, console)
    console.print(f"\nThe prompt for “{QUESTION}”:", highlight=False)
    console.print("".join(run.text for run in runs_of(prompt, inputs)), markup=False, highlight=False)
    return {
        "kind": "image",
        "path": str(path),
        "width_px": tiles.width_px,
        "height_px": tiles.height_px,
        "columns": grid.columns,
        "rows": grid.rows,
        "tiles": total,
        "thumbnail": thumbnail,
        "visual_tokens": int(prompt.slots.sum()),
        "prompt_tokens": len(prompt),
        "context_tokens": config.context_tokens,
        "drawn": str(output),
    }


def draw_tiles(tiles: Tiles) -> Image.Image:
    """The tiles on their grid with gaps and numbers, the whole picture to the right: what goes into the tower, in that order."""
    side, grid = tiles.pixels.shape[-1], tiles.grid
    step = side + GAP_PX
    columns = grid.columns + (0 if tiles.whole is None else 1)
    sheet = Image.new("RGB", (columns * step + GAP_PX, max(grid.rows, 1) * step + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(10, side // 12))
    for number, pixels in enumerate(tiles.pixels):
        if number == tiles.whole:
            row, column = 0, grid.columns
        else:
            row, column = divmod(number - (1 if tiles.whole == 0 else 0), grid.columns)
        corner = (GAP_PX + column * step, GAP_PX + row * step)
        sheet.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), corner)
        label = f"{number + 1} {'thumbnail' if number else 'whole'}" if number == tiles.whole else str(number + 1)
        place = (corner[0] + side // 28, corner[1] + side // 28)
        draw.rectangle(draw.textbbox(place, label, font=font), fill="black")
        draw.text(place, label, fill="white", font=font)
    return sheet


# ---- a dataset


def inspect_dataset(path: Path | None, look: Look, console: Console) -> dict[str, Any]:
    """Read it whole (None: the data of the recipe), print the table and what is wrong with it, and what a run will take."""
    recipe = recipe_of(path, look)
    inputs, _ = eyes(recipe.model, recipe.max_tiles)
    inputs = Inputs(
        inputs.config, inputs.tokenizer, max_tiles=recipe.max_tiles, context_tokens=recipe.context_tokens, system=recipe.system,
        limit_megapixels=recipe.limit_megapixels,
    )  # fmt: skip
    data = read_recipe_data(replace(recipe, max_bad_share=1.0), inputs, decode=None)
    found = preflight(data, recipe.preflight_s, recipe.limit_megapixels)
    plan = epoch_of(recipe, data, inputs)
    packing = None if look.recipe is None else Packing.of(plan, recipe.packing)
    seen = survey_of(", ".join(map(str, recipe.data)), data, inputs, found, packing)
    console.print(render_survey(seen, look.places), markup=False, highlight=False, soft_wrap=True)
    if not look.forecast:
        return {"kind": "dataset", **seen.as_dict()}
    will = forecast(recipe, data, plan, inputs, measured(recipe))
    console.print(will.told(), markup=False, highlight=False, soft_wrap=True)
    return {"kind": "dataset", **seen.as_dict(), "forecast": will.as_dict()}


def recipe_of(path: Path | None, look: Look) -> Recipe:
    """The recipe with what the flags say instead. Without one all of the data is looked at, and nothing held out."""
    if look.places < 0:
        raise DataError(f"places is {look.places}, must be 0 (all of them) or more")
    flags: dict[str, Any] = {} if path is None else {"data": (path,)}
    if look.recipe is None:
        flags |= {"held_out": 0.0, "model": look.model or BUILT_IN}
    elif look.model is not None:
        flags["model"] = look.model
    given = {"max_tiles": look.max_tiles, "image_root": look.image_root, "columns": look.columns or None}
    flags |= {name: value for name, value in given.items() if value is not None}
    changed: dict[str, tuple[Any, Any]] = {"choices": (look.choices, "hidden"), "boxes": (look.boxes, "thousandths")}
    changed |= {"limit_megapixels": (look.limit_megapixels, LIMIT_MEGAPIXELS)}
    flags |= {name: value for name, (value, usual) in changed.items() if value != usual}
    recipe = load_recipe(look.recipe, flags)
    if recipe.stream:
        raise DataError("a streamed set is not read whole; look at one of its files without stream in the recipe")
    return recipe


# ---- a model


@dataclass(frozen=True)
class Parts:
    """Parameters of each part; a tied head counts once, as embeddings."""

    tower: int
    projector: int
    embeddings: int
    layers: int
    head: int

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.embeddings + self.layers + self.head


def count_parts(config: ModelConfig) -> Parts:
    """Count on the meta device: nothing is allocated."""
    model = blank_model(config)
    language = model.language_model

    def count(module: torch.nn.Module | None) -> int:
        return 0 if module is None else sum(weight.numel() for weight in module.parameters())

    table = count(language.model.embed_tokens)
    return Parts(
        tower=count(model.vision_model),
        projector=count(model.mlp1),
        embeddings=table,
        layers=count(language.model) - table,
        head=count(language.lm_head),
    )


@dataclass(frozen=True)
class Found:
    """What a name stands for, and what is known of it without loading weights."""

    config: ModelConfig
    folder: Path | None  # None: a published model's built-in config
    adapters: tuple[Path, ...]  # the lowest first
    disk_bytes: int | None  # None: the weights are not here
    fault: str = ""  # why the weights are not those of the config

    @property
    def place(self) -> str:
        if self.folder is None:
            return "none: this is the built-in config of a published model"
        return str(self.folder) + "".join(f", with the adapter {adapter}" for adapter in self.adapters)


def find(name: str) -> Found:
    """A published name by its built-in config alone; anything else by its folder, its weights not fetched."""
    if name in PUBLISHED and not Path(name).is_dir():
        return Found(published_config(name), None, (), None)
    folder, adapters = find_model(name, weights=False)
    raw = read_config_json(folder)
    config = model_config(raw)
    if hub_name(name) and not Path(name).is_dir() and not has_weights(folder):
        return Found(config, folder, adapters, None)
    weights = open_weights(folder)
    config = resolve_head(config, weights, layout_of(raw))
    return Found(config, folder, adapters, weights.num_bytes(), fault_of(weights, config, layout_of(raw)))


def fault_of(weights: Weights, config: ModelConfig, layout: Layout) -> str:
    """What is missing, left over or misshapen among the tensors, by their names alone; "" when nothing is."""
    shapes = {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}
    try:
        check_weights(weights, shapes, layout, config.language)
    except CheckpointError as error:
        return str(error)
    return ""


def inspect_model(name: str, device: str, dtype: str, console: Console) -> dict[str, Any]:
    """Parts, parameters and memory of a model, its weights not loaded. Raises CheckpointError when tensors are missing."""
    found = find(name)
    config, parts = found.config, count_parts(found.config)
    where = choose_device(device)
    number = choose_dtype(dtype, where)
    size = number.itemsize
    language = config.language
    cache = 2 * language.num_layers * language.num_kv_heads * language.head_dim * size
    weight_bytes, chat_bytes = parts.total * size, parts.total * size + cache * config.context_tokens
    word = str(number).removeprefix("torch.")
    facts = {
        "folder": found.place,
        **facts_of_parts(config, parts),
        "on disk": on_disk(name, found, parts),
        f"in memory, {word}": f"{gib(weight_bytes)} of weights, and {cache:,} bytes a token of conversation: "
        f"{gib(chat_bytes)} when the context is full",
    }
    print_facts(name, facts, console)
    if found.fault:
        raise CheckpointError(f"{found.folder} is no whole model: {found.fault}")
    return {
        "kind": "model",
        "model": name,
        "folder": None if found.folder is None else str(found.folder),
        "adapter": str(found.adapters[-1]) if found.adapters else None,
        "parameters": {**asdict(parts), "total": parts.total},
        "dtype": word,
        "device": str(where),
        "disk_bytes": found.disk_bytes,
        "weight_bytes": weight_bytes,
        "cache_bytes_per_token": cache,
        "full_context_bytes": chat_bytes,
        "context_tokens": config.context_tokens,
        "slots_per_tile": config.slots_per_tile,
        "tile_size_px": config.tile_size_px,
        "max_tiles": config.max_tiles,
        "template": config.template,
    }


def facts_of_parts(config: ModelConfig, parts: Parts) -> dict[str, str]:
    """A line for each part."""
    vision, language = config.vision, config.language
    whole = config.tile_rule == "anyres" or (config.tile_rule == "closest" and config.use_thumbnail and config.max_tiles > 1)
    most = config.max_tiles + (1 if whole else 0)
    return {
        "tower": f"{millions(parts.tower)}: {vision.num_layers} layers of {vision.hidden_size}, {vision.norm}, "
        f"tiles of {config.tile_size_px} px in patches of {vision.patch_size_px} px",
        "projector": f"{millions(parts.projector)}: {config.slots_per_tile} visual tokens a tile, {connector_words(config)}",
        "language model": f"{millions(parts.layers)}: {language.architecture}, "
        f"{language.num_layers} layers of {language.hidden_size}, "
        f"{language.num_heads} heads on {language.num_kv_heads}",
        "embeddings": f"{millions(parts.embeddings)}: {language.vocab_size:,} tokens"
        + (", the head is the same table" if not parts.head else f"; the head {millions(parts.head)}"),
        "all": f"{millions(parts.total)}: {parts.total:,} parameters",
        "prompt": f"template {config.template}, {config.context_tokens:,} tokens; 1 to {most} tiles a picture, thumbnail counted",
    }


def connector_words(config: ModelConfig) -> str:
    """The kind of connector, and how the tiles are cut where it is not InternVL's way."""
    kind = config.connector.kind
    words = f"pixel shuffle {config.pixel_shuffle_version}" if kind == "pixel_shuffle" else kind
    return words if config.tile_rule == "closest" else f"{words}, tile rule {config.tile_rule}"


def on_disk(name: str, found: Found, parts: Parts) -> str:
    if found.disk_bytes is not None:
        return gib(found.disk_bytes)
    hub = f"{HUB}/{name}" if found.folder is None else name
    return f"not here; {hub} fetches about {gib(2 * parts.total)}"  # all were published in bfloat16


def gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def print_facts(title: str, facts: dict[str, str], console: Console) -> None:
    """A table of two columns without lines, which a terminal and a pipe show alike."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, words in facts.items():
        table.add_row(name, words)
    console.print(table, highlight=False)
