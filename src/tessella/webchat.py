"""`tessella ui`: its flags, the built-in foods by kind, and the way into the page. Stands beside cli.py.

In: flags.  Out: the page, served until Ctrl-C; or, for `tessella serve --ui`, a process of its own beside the server.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from tessella.errors import ConfigError
from tessella.foods import STYLES, foods, picture

if TYPE_CHECKING:
    from tessella.ui.shelf import Row

# The first food of each kind, in the order in which Unicode's charts have them -> its name in English and Chinese.
KINDS = {
    "grapes": ("Fruit", "水果"),
    "avocado": ("Vegetables", "蔬菜"),
    "bread": ("Dishes", "菜肴"),
    "bento-box": ("Asian dishes", "亚洲美食"),
    "soft-ice-cream": ("Sweets", "甜点"),
    "baby-bottle": ("Drinks", "饮品"),
}
KEY = "TESSELLA_API_KEY"


@dataclass(frozen=True)
class Ui:
    server: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="URL", help="A server to ask; again for more of them.")] = ()
    pictures: Path | None = None
    """Folder of pictures for the quick bar, a subfolder a kind; default: the built-in foods."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs the password."""
    port: int | None = None
    """Port to listen on; default: the first free one from 7860."""
    password: str | None = None
    """Asked of whoever opens the page (user: tessella); default: none here, a fresh one on any other address."""
    allowed_host: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="NAME", help="A name by which a reverse proxy calls the page.")
    ] = ()
    compare: Annotated[
        tuple[str, ...] | None, arg(metavar="[A,B]", help="Open with two models side by side; without names, the first two.")
    ] = None
    share: bool = False
    """Open a public tunnel through Gradio's company; asks first."""
    open: bool = True
    """Open the page in a browser, where there is a screen."""
    json: Path | None = None
    """Write where the page was and what it asked there, when it ends; docs/json.md lists the keys."""

    def run(self) -> dict[str, Any]:
        from tessella.ui.client import Server  # httpx2
        from tessella.ui.launch import Options, serve  # gradio
        from tessella.ui.shelf import rows_of_folder  # with the rest of its room

        urls = self.server or ("http://127.0.0.1:8000",)
        options = Options(
            servers=tuple(Server(url.rstrip("/").removesuffix("/v1"), os.environ.get(KEY)) for url in urls),
            rows=rows_of_folder(self.pictures.expanduser()) if self.pictures else food_rows(),
            host=self.host,
            port=self.port,
            password=self.password,
            allowed_hosts=self.allowed_host,
            compare=None if self.compare is None else two_names(self.compare),
            share=self.share,
            open=self.open and has_screen(),
        )
        addresses: list[str] = []

        def ready(address: str) -> None:
            addresses.append(address)
            print(f"web chat on {address}, asking {', '.join(urls)}; Ctrl-C ends it", flush=True)

        serve(options, ready)
        return {"url": addresses[0], "servers": list(urls)}


def two_names(words: Sequence[str]) -> tuple[str, ...]:
    """A,B or A B -> both names; nothing stays nothing. Raises ConfigError."""
    names = tuple(name.strip() for word in words for name in word.split(","))
    if names and (len(names) != 2 or not all(names)):
        raise ConfigError(f'--compare is "{" ".join(words)}", must be two names of models, like tessella-nano,foods, or none')
    return names


def has_screen() -> bool:
    """Whether a browser would open a window; without a screen some open in the terminal and wait there."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def food_rows() -> "list[Row]":
    """The shipped foods by kind, in the style that the demo does not teach: so a taught model shows what it has understood."""
    from tessella.ui.shelf import Item, Row  # with the rest of its room

    rows: list[tuple[dict[str, str], list[Item]]] = []
    for food in foods():
        if food.key in KINDS:
            rows.append((dict(zip(("en", "zh"), KINDS[food.key], strict=True)), []))
        rows[-1][1].append(Item(picture(food, STYLES[-1]), {"en": food.english, "zh": food.chinese}))
    return [Row(names, items) for names, items in rows]


def check_extra() -> None:
    """Raises ConfigError when the page's packages are not installed: better before a model is read than after."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--ui needs the ui extra: pip install 'tessella[ui]'")


@contextmanager
def beside(url: str, key: str | None, words: Sequence[str]) -> Iterator[None]:
    """The web chat for the server at url, in a process of its own, so that it takes no time from the engine's.

    words: further flags of `tessella ui`. It ends with us, also when we are killed: companion.py.
    """
    command = [sys.executable, "-m", "tessella.companion", "ui", "--server", url, *words]
    environment = {**os.environ, **({KEY: key} if key else {})}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            process.terminate()
