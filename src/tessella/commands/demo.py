"""`tessella demo`: its flags."""

from dataclasses import dataclass, field
from pathlib import Path

from tessella.commands.place import Here, Place, Result
from tessella.foods import STYLES


@dataclass(frozen=True)
class Demo:
    model: str = "tessella-nano"
    """The model to teach."""
    styles: tuple[str, ...] = ()
    """Drawing styles to learn from, of those shipped; default: all but the test style."""
    test_style: str = STYLES[-1]
    """Drawing style that is only tested."""
    foods: int | None = None
    """Only the first so many foods; default: all."""
    epochs: float = 4.0
    """Passes over the pictures."""
    output: Path = Path("runs/demo")
    """Folder of everything the demo makes; a stopped demo goes on there, a finished one is done anew."""
    fresh: bool = False
    """Begin again, whatever a stopped demo left in the folder."""
    seed: int = 0
    """Seed of everything that chance decides."""
    open: bool = True
    """Open the report in a browser, where there is a screen."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.demo import Plan, run  # torch, PEFT

        plan = Plan(
            model=self.model,
            styles=self.styles,
            test_style=self.test_style,
            foods=self.foods,
            epochs=self.epochs,
            output=self.output,
            fresh=self.fresh,
            seed=self.seed,
            device=self.place.device,
            dtype=self.place.dtype,
            open=self.open,
        )
        return run(plan).as_json()
