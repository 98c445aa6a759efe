"""The command line: words in, one deed, a result on the screen and, if asked, as JSON. The flags of each command: commands/.

Every room that needs torch is imported inside the command that needs it: torch alone takes longer to import than the half second
in which `tessella --help` must answer. The Recipe is plain data and is imported at the top, because each of its fields is a flag.
"""

import difflib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from tessella.commands.chat import Chat
from tessella.commands.convert import Convert, Verify
from tessella.commands.demo import Demo
from tessella.commands.evaluate import Evaluate
from tessella.commands.finetune import Finetune
from tessella.commands.inspect import Inspect
from tessella.commands.runs import Runs
from tessella.errors import ConfigError, TessellaError, is_out_of_memory
from tessella.files import check_place, write_whole
from tessella.helptext import ABOUT, CHAT, CONVERT, DEMO, EVALUATE, FINETUNE, INSPECT, RUNS, SERVE, UI, VERIFY
from tessella.mistakes import MENDABLE, OPTIONAL, OUT_OF_MEMORY, tell
from tessella.serving import Serve
from tessella.train.recipe import load_recipe
from tessella.webchat import Ui

Command = Chat | Finetune | Convert | Verify | Evaluate | Serve | Inspect | Demo | Ui | Runs
# Each with what its own --help says; the list of commands shows the first line.
COMMANDS: dict[str, tuple[type[Command], str]] = {
    "demo": (Demo, DEMO),
    "chat": (Chat, CHAT),
    "finetune": (Finetune, FINETUNE),
    "convert": (Convert, CONVERT),
    "verify": (Verify, VERIFY),
    "evaluate": (Evaluate, EVALUATE),
    "serve": (Serve, SERVE),
    "inspect": (Inspect, INSPECT),
    "runs": (Runs, RUNS),
    "ui": (Ui, UI),
}

FORM = (tyro.conf.DisallowNone,)  # leaving a flag out is how one says None


def recipe_among(words: Sequence[str]) -> Path | None:
    """The RECIPE of `finetune`, which must be read before the flags are, since its values are their defaults."""
    return next((Path(word) for word in words if word.endswith(".toml") and not word.startswith("-")), None)


def parse(words: Sequence[str]) -> Command:
    """The words after `tessella` -> one command. Ends the program when help was asked for (0) or the words make no command (2).

    Raises ConfigError for a bad recipe.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(front_page())
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        sys.exit(tell(f'"{name}" is no command; {hint} (tessella --help tells more)'))
    kind, about = COMMANDS[name]
    if kind is Finetune:
        recipe = recipe_among(words[1:])
        default = Finetune.of(load_recipe(recipe))
        finetune = tyro.cli(
            Finetune, prog="tessella finetune", description=about, args=list(words[1:]), default=default, config=FORM
        )
        if finetune.recipe_file is not None and finetune.recipe_file != recipe:
            raise ConfigError(f"{finetune.recipe_file} is no recipe: a recipe is a .toml file; data goes behind --data")
        if finetune.recipe_file is None and recipe in finetune.recipe.data:
            raise ConfigError(f"{recipe} was read as data; the recipe goes first: tessella finetune {recipe} --data …")
        return finetune
    command: Command = tyro.cli(kind, prog=f"tessella {name}", description=about, args=list(words[1:]), config=FORM)
    return command


def front_page() -> str:
    """What `tessella --help` prints: the commands with a line each, then examples."""
    lines = [f"  {name:<10}{about.partition(chr(10))[0]}" for name, (_, about) in COMMANDS.items()]
    first, _, rest = ABOUT.partition("\n")
    return "\n".join([f"usage: tessella {{{','.join(COMMANDS)}}} …", "", first, "", "commands:", *lines, rest])


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code: 0 done, 1 verify found a difference, 2 something a person can mend, 130 Ctrl-C."""
    words = sys.argv[1:] if words is None else list(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no Chinese shows "?" and loses no answer
    try:
        command = parse(words)
        path = command.json if isinstance(command, (Finetune, Serve, Ui, Runs)) else command.place.json
        if path is not None:
            check_place("--json", path.expanduser())  # now, not after an hour's work
        result = {"command": type(command).__name__.lower(), "version": 1, **command.run()}
        if path is not None:
            write_whole(path.expanduser(), json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        if result.get("stopped_by") == "interrupted":  # finetune saves on Ctrl-C and ends in good order
            return 130
        return 1 if result.get("differs") else 0
    except TessellaError as error:
        return tell(str(error))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left, as `| head` does; leave quietly
        return 0
    except MemoryError:
        return tell(OUT_OF_MEMORY)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        return tell(f"{error.name} is not installed; {OPTIONAL[error.name]}")
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        return tell(f"{error.filename or 'a file'}: {error.strerror}; {MENDABLE[error.errno]}")
    except RuntimeError as error:  # torch's out-of-memory error is one, and torch must not be imported here to name it
        if not is_out_of_memory(error):
            raise
        return tell(f"{OUT_OF_MEMORY}\n({str(error).splitlines()[0]})")


if __name__ == "__main__":
    sys.exit(main())
