"""Turn tessella-nano's LoRA aside from plain text, in closed form: what it says of pictures stays, what it does to text goes.

In: the packed LoRA that ships, rows with pictures (make_data.py) and rows of text (chat.jsonl).  Out: lora.safetensors, packed.
A layer's change is D = B A (O, I). Sought is the D' = B A' of the same rank that is like D on what the layer meets in rows with
pictures (mean of x x^T over their tokens: S, of the taught model) and nothing on what it meets in text (T, of the untouched
language model): D' minimises E|(D' - D) x|^2 over S + weight * E|D' x|^2 over T, so A' = A S (S + weight T)^-1, whatever B is.
I inputs, O outputs, r rank: A (r, I), B (O, r).  Source: the least squares of RegMean, arXiv:2212.09849.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from teach import samples_of
from torch import Tensor, nn

from tessella.chat import IMAGE_MARK, Message
from tessella.checkpoint.builtin import ASSETS, LORA, PROJECTOR, TOWER, nano_folder, write_nano
from tessella.checkpoint.packing import read_packed, write_packed
from tessella.checkpoint.read import Loaded, load
from tessella.generate import embed
from tessella.inputs import ModelInput
from tessella.model.attend import Causal
from tessella.model.vision_language import VisionLanguageModel

# The layers whose inputs differ; q_proj, k_proj and v_proj read the same numbers, and so do gate_proj and up_proj.
READERS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
READERS |= {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
PASS_TOKENS = 1000
RIDGE = 1e-6  # of the mean diagonal, so that the sum can be inverted


class Moments:
    """Mean of x x^T over the tokens that each watched layer of a model reads: module name -> (I, I)."""

    def __init__(self, model: VisionLanguageModel):
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        for name, module in model.named_modules():
            kind = name.rsplit(".", 1)[-1]
            if isinstance(module, nn.Linear) and name.startswith("language_model.model.layers.") and READERS.get(kind) == kind:
                module.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str):
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].detach().float()
            self.sums[name] = self.sums.get(name, 0) + x.t() @ x

        return add

    def of(self, module: str) -> Tensor:
        head, _, kind = module.rpartition(".")
        return self.sums[f"{head}.{READERS[kind]}"].double().cpu() / self.tokens


def moments(loaded: Loaded, rows: Iterable[ModelInput], most_tokens: int) -> Moments:
    """Run rows through a model, many in a pass, until most_tokens were met."""
    found, some = Moments(loaded.model), []
    with torch.inference_mode():
        for row in rows:
            some.append(row)
            lengths = [len(one) for one in some]
            if sum(lengths) < PASS_TOKENS:
                continue
            device = loaded.model.device
            positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
            loaded.model(embed(loaded.model, some), positions, Causal(lengths, device), max(lengths))
            found.tokens += sum(lengths)
            some = []
            if found.tokens >= most_tokens:
                break
    return found


def with_pictures(loaded: Loaded, path: Path, chance: random.Random) -> Iterator[ModelInput]:
    samples = [sample for sample in samples_of(path) if sample.pictures]
    for sample in chance.sample(samples, len(samples)):
        yield loaded.inputs.build(sample.messages, sample.pictures, open_turn=False)


def with_text(loaded: Loaded, path: Path, chance: random.Random) -> Iterator[ModelInput]:
    """Each conversation in the model's template, and its words as they stand, in turns."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    for messages in chance.sample(rows, len(rows)):
        yield loaded.inputs.build([Message(m["role"], m["content"]) for m in messages], open_turn=False)
        yield loaded.inputs.build_text("\n\n".join(m["content"] for m in messages if IMAGE_MARK not in m["content"]))


def turned(a: Tensor, seen: Tensor, text: Tensor, weight: float) -> Tensor:
    """A (r, I) -> A S (S + weight T)^-1; see the head of the file."""
    total = seen + weight * text
    total = total + RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
    return torch.linalg.solve(total, (a.double() @ seen).t()).t().float()


def untouched(folder: Path, assets: Path, device: str) -> Loaded:
    """The built-in model without its LoRA."""
    state = [read_packed(assets / name) for name in (TOWER, PROJECTOR)]
    return load(write_nano(*state, None, folder), device=device, dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="instruct.jsonl of make_data.py")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "chat.jsonl", help="rows of messages")
    parser.add_argument("--tokens", type=int, default=60_000, help="of each kind that are met")
    parser.add_argument("--weight", type=float, default=0.6, help="weight of a token of text beside one of a row with pictures")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="packed weights that are read")
    parser.add_argument("--out", type=Path, default=ASSETS / LORA, help="packed LoRA that is written")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu: where the rows are run")
    args = parser.parse_args()
    chance = random.Random(0)
    taught = load(nano_folder(assets=args.assets), device=args.device, dtype="bfloat16")
    seen = moments(taught, with_pictures(taught, args.rows, chance), args.tokens)
    with tempfile.TemporaryDirectory() as aside:
        plain = untouched(Path(aside) / "untouched", args.assets, args.device)
        text = moments(plain, with_text(plain, args.text, chance), args.tokens)
    lora = read_packed(args.assets / LORA)
    for name, a in lora.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            lora[name] = turned(a, seen.of(module), text.of(module), args.weight)
    size = write_packed(args.out, lora)
    print(f"{args.out}: {size:,} bytes; {seen.tokens:,} tokens with pictures, {text.tokens:,} of text, weight {args.weight:g}")


if __name__ == "__main__":
    main()
