"""A room imports only from floors below its own, and rooms on one floor do not know each other.

A room is a file of the package or a folder with everything in it; the files that make up the command line are one room.
Read from the syntax tree, so an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tessella"

FLOORS = {
    "bands": 0,
    "errors": 0,
    "geometry": 0,
    "marks": 1,
    "routes": 0,
    "transfer": 0,
    "files": 1,
    "config": 1,
    "image": 1,
    "chat": 1,
    "tokenizer": 1,
    "wordpiece": 1,
    "sampling": 1,
    "stops": 1,
    "foods": 1,
    "provenance": 1,
    "model": 2,
    "inputs": 2,
    "scenes": 2,
    "generate": 3,
    "decode": 3,
    "engine": 3,
    "checkpoint": 3,
    "train": 4,
    "evaluate": 4,
    "server": 4,
    "ui": 4,
    "cli": 5,
}
# These stand beside cli.py for their length alone: one room. commands/ holds each command's flags.
JOINED_TO_CLI = (
    "commands",
    "terminal",
    "showing",
    "inspection",
    "scoring",
    "demo",
    "mistakes",
    "verification",
    "helptext",
    "serving",
    "webchat",
    "exam",
    "runs",
    "companion",
    "demo_chat",
)
# PEFT brings transformers; only teaching may reach for PEFT, and nothing of ours for transformers.
PEFT_ROOM = "train"
# But for the file that runs transformers in a process of its own, to compare; nothing of ours imports it.
ENGINE_PROBE = "tessella.checkpoint.engine_probe"


def room_of(module: str) -> str:
    """ "tessella.model.attend" -> "model"; the files of the command line -> "cli"; "tessella" itself -> ""."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return "cli" if name in JOINED_TO_CLI else name


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(code: str) -> list[tuple[int, str]]:
    """(line, full name) of everything that code imports, at the top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it in full"
            if node.module == "tessella":
                found += [(node.lineno, f"tessella.{alias.name}") for alias in node.names]
            elif node.module:
                found.append((node.lineno, node.module))
    return found


def faults(module: str, code: str) -> list[str]:
    """What the imports of one module do against the floors, a sentence each."""
    room, told = room_of(module), []
    for line, name in imported_modules(code):
        top = name.split(".")[0]
        if (top == "transformers" and module != ENGINE_PROBE) or name == ENGINE_PROBE or (top == "peft" and room != PEFT_ROOM):
            told.append(f"{module}:{line} imports {name}")
        if top != "tessella":
            continue
        other = room_of(name)
        if other in ("", room):
            continue
        if FLOORS[other] >= FLOORS[room]:
            told.append(f"{module}:{line} on floor {FLOORS[room]} imports {name} on floor {FLOORS[other]}")
    return told


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_of(path) for path in FILES])
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    module = module_of(path)
    if room_of(module):
        assert room_of(module) in FLOORS, f"{module} has no floor: add it to FLOORS, lowest floor that its imports allow"
    assert not faults(module, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("tessella.image", "from tessella.chat import render"),
        ("tessella.chat", "from tessella import inputs"),
        ("tessella.generate", "import tessella.checkpoint.read"),
        ("tessella.model.vision", "def f():\n    from tessella.train.loop import train"),
        ("tessella.evaluate.run", "from tessella.train.dataset import Sample"),
        ("tessella.checkpoint.read", "import transformers"),
        ("tessella.checkpoint.engines", "from tessella.checkpoint.engine_probe import main"),
        ("tessella.cli", "from peft import LoraConfig"),
    ],
)
def test_an_import_upward_or_sideways_is_found(module: str, code: str) -> None:
    assert faults(module, code)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("tessella.inputs", "from tessella.chat import render\nfrom tessella.image import cut_tiles"),
        ("tessella.model.language", "from tessella.model.layers import RMSNorm"),
        ("tessella.train.lora", "def f():\n    import peft"),
        ("tessella.cli", "from tessella import demo, terminal"),
    ],
)
def test_an_import_downward_or_within_a_room_is_not(module: str, code: str) -> None:
    assert not faults(module, code)
