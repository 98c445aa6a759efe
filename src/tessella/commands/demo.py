"""`tessella demo`: its flags."""

from dataclasses import dataclass, field
from pathlib import Path

from tessella.commands.place import Here, Place, Result
from tessella.foods import STYLES

EPOCHS, WARMUP_STEPS = 3.0, 240  # stand here, for --help may not import what demo.py does


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
    epochs: float = EPOCHS
    """Passes over the pictures."""
    projector_warmup_steps: int = WARMUP_STEPS
    """Steps in which the projector alone learns the foods' names first, as `finetune` does it; 0: none."""
    output: Path = Path("runs/demo")
    """Folder of everything the demo makes; a stopped demo goes on there, a finished one is done anew."""
    fresh: bool = False
    """Begin again, whatever a stopped demo left in the folder."""
    seed: int = 0
    """Seed of everything that chance decides."""
    open: bool = True
    """Open the report in a browser, where there is a screen."""
    web_chat: bool = True
    """End with the web chat, both models side by side; in a terminal alone, until Ctrl-C."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from rich.console import Console

        from tessella.demo import Plan, run  # torch, PEFT
        from tessella.demo_chat import command, is_watched, open_chat  # with the rest of what it needs

        plan = Plan(
            model=self.model,
            styles=self.styles,
            test_style=self.test_style,
            foods=self.foods,
            epochs=self.epochs,
            projector_warmup_steps=self.projector_warmup_steps,
            output=self.output,
            fresh=self.fresh,
            seed=self.seed,
            device=self.place.device,
            dtype=self.place.dtype,
            open=self.open,
        )
        console = Console()
        result = run(plan, console).as_json()
        adapter = plan.output / "training"
        if self.web_chat and is_watched(console):
            place = self.place
            open_chat(self.model, adapter, device=place.device, dtype=place.dtype, browser=self.open, console=console)
        else:
            console.print(f"In the browser: {command(self.model, adapter)}", highlight=False, markup=False, soft_wrap=True)
        return result
