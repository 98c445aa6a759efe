"""What learns, by name; a file of its own, because who only reckons with it needs no PEFT.

In: learning parameters.  Out: their names in an adapter file, the part of the model that each belongs to.
"""

from dataclasses import dataclass

from torch import nn

PARTS = {"language": "language_model.", "tower": "vision_model.", "projector": "mlp1.", "decoders": "routing."}


@dataclass(frozen=True)
class Taught:
    """The learning parameters. Names are those of an adapter file: ours, and <module>.lora_A.weight."""

    parameters: dict[str, nn.Parameter]
    whole: tuple[str, ...]  # modules that are trained whole, by our names
    has_lora: bool

    def part_of(self, name: str) -> str:
        """ "language", "tower", "projector" or "decoders"."""
        return next(part for part, prefix in PARTS.items() if name.startswith(prefix))

    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())
