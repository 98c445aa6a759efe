"""`tessella runs`: its flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tessella.commands.place import Result


@dataclass(frozen=True)
class Runs:
    folders: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="[FOLDER | RUN | RUN RUN]", help="A folder of runs to list, one run to look at, or two to compare."),
    ] = (Path("runs"),)
    html: Path | None = None
    """Write it as a page there too; of one run its own report.html is written anew without being asked."""
    json: Path | None = None
    """Write the result there too; docs/json.md lists the keys."""

    def run(self) -> Result:
        from tessella.runs.show import show  # matplotlib

        return show(self.folders, self.html)
