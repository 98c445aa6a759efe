"""`tessella convert` and `tessella verify`: their flags."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from tessella.commands.place import Here, Place, Result


@dataclass(frozen=True)
class Convert:
    source: Annotated[Positional[str], arg(metavar="IN", help="Model, adapter, LoRA checkpoint, .pth, or tessella-nano.")]
    out: Annotated[Positional[Path], arg(metavar="OUT", help="Folder to make.")]
    to: Literal["official", "native", "adapter", "gguf"] = "official"
    """Layout of OUT; adapter: only what was taught, apart from its base; gguf: two files for llama.cpp."""
    names: Literal["ours", "official", "native"] = "ours"
    """Whose names an adapter's modules get; official has InternLM2's fused wqkv, native is for transformers' own class."""
    base: str | None = None
    """The base model; default: the one that the adapter names."""
    xtuner_config: Path | None = None
    """Of a .pth: XTuner's config file, where its lora_alpha stands; it is read as text, not run."""
    lora_alpha: float | None = None
    """Of a .pth: lora_alpha of the language model's LoRA, instead of the config."""
    tower_lora_alpha: float | None = None
    """Of a .pth: lora_alpha of the tower's LoRA."""
    shard_gb: float = 5.0
    """Most GB (10^9 bytes) a file of weights holds; a model of more is written as shards."""
    proof: Literal["auto", "tensors", "logits"] = "auto"
    """tensors never runs the models, logits always does."""
    force: bool = False
    """Write over OUT if Tessella made it."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.checkpoint.convert import Wish, convert  # torch
        from tessella.checkpoint.source import Origin  # torch

        wish = Wish(
            to=self.to,
            names=self.names,
            dtype="base" if self.place.dtype == "auto" else self.place.dtype,  # auto: each tensor in its own type
            shard_bytes=int(self.shard_gb * 1e9),
            force=self.force,
            proof=self.proof,
            device=self.place.device,
        )
        origin = Origin(self.base, self.xtuner_config, self.lora_alpha, self.tower_lora_alpha)
        try:
            result = convert(self.source, self.out, wish, origin)
        except KeyboardInterrupt:
            if any(self.out.parent.glob(f".{self.out.name}.*.part")):
                print("\nFinished shards are kept; the same command goes on from there.", file=sys.stderr)
            raise
        print(f"{result.folder}: {result.about}\nproved: {result.proof}")
        return result.as_json()


@dataclass(frozen=True)
class Verify:
    a: Annotated[Positional[str], arg(metavar="A", help="A model in any form that convert takes.")]
    b: Annotated[Positional[str], arg(metavar="B", help="Another.")]
    proof: Literal["auto", "tensors", "logits"] = "auto"
    """tensors never runs the models, logits always does."""
    engines: str = ""
    """Other engines that answer from B with their own code, comma between them: transformers, vllm, lmdeploy."""
    engine_python: tuple[str, ...] = ()
    """ENGINE=/path/to/python of an engine that lives in an environment of its own, one or more of them."""
    place: Here = field(default_factory=Place)

    def run(self) -> Result:
        from tessella.verification import verify  # torch

        return verify(self.a, self.b, self.proof, self.place.device, self.engines, self.engine_python)
