"""Are two folders the same model? Config, every tensor, the rendered prompts, and logits where arithmetic was involved.

In: two Sources.  Out: Proofs, with a table for people, or an error.
Where only names, files and rows moved, every tensor is compared bit by bit, and with equal configs and prompts there is
nothing left that could differ. Where an adapter was merged, the merge is done again in float64 and each number must be the
nearest of the stored type; then the logits of the unmerged model are compared too, if it fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import mul
from typing import Any, Literal

import psutil
import torch

from tessella.chat import render, text_of
from tessella.checkpoint.progress import byte_bar
from tessella.checkpoint.routing import RoutingProof, compare_routing
from tessella.checkpoint.source import Source
from tessella.checkpoint.tensor_proof import TensorProof, Verdict, compare_tensors
from tessella.checkpoint.verify import LIMITS, Proof, compare, conversations, logits_on, probes
from tessella.errors import CheckpointError
from tessella.inputs import Inputs

Mode = Literal["auto", "tensors", "logits"]
LOGITS_BYTES = 16 * 2**30  # a larger model in float32 is not run unasked: on a CPU that takes longer than the conversion
SAME_ARITHMETIC = dict.fromkeys(("InternLM2ForCausalLM", "InternLM3ForCausalLM"), "LlamaForCausalLM")  # names for one decoder


@dataclass(frozen=True)
class PromptProof:
    """The rendered prompts and their ids, character for character."""

    prompts: int
    characters: int
    tokens: int
    differing: tuple[str, ...]

    def __str__(self) -> str:
        if self.differing:
            return "; ".join(self.differing[:3])
        if not self.prompts:  # of a GGUF file
            return f"{self.tokens} tokens of the vocabulary, a template of {self.characters} characters"
        return f"{self.prompts} prompts, {self.characters} characters, {self.tokens} tokens"


@dataclass(frozen=True)
class Proofs:
    """All that was compared."""

    config: tuple[str, ...]  # fields that differ, a sentence each
    fields: int
    tensors: TensorProof
    prompts: PromptProof
    logits: Proof | None
    why_no_logits: str
    routing: RoutingProof | None = None  # None where neither has any

    @property
    def holds(self) -> bool:
        return all(equal is not False for _, _, equal in self.rows())

    @property
    def largest_difference(self) -> float:
        """Of the logits; 0 when they cannot differ because nothing does."""
        return 0.0 if self.logits is None else self.logits.largest_difference

    def rows(self) -> list[tuple[str, str, bool | None]]:
        """(what was compared, what came out, whether it is equal, or None when it was not compared), for a table."""
        config = "; ".join(self.config) if self.config else f"{self.fields} fields"
        logits = (f"not run: {self.why_no_logits}", None) if self.logits is None else (str(self.logits), self.logits.holds)
        return [
            ("config", config, not self.config),
            ("tensors", str(self.tensors), not self.tensors.differing and not self.tensors.drowned),
            ("prompts and ids", str(self.prompts), not self.prompts.differing),
            ("logits", *logits),
            *([] if self.routing is None else [("routing", str(self.routing), not self.routing.differing)]),
        ]

    def __str__(self) -> str:
        return (
            f"{self.tensors}; {self.prompts}; "
            + (f"{self.logits}" if self.logits else f"logits not run: {self.why_no_logits}")
            + (f"; routing: {self.routing}" if self.routing else "")
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "config": {"fields": self.fields, "differing": list(self.config)},
            "tensors": {**asdict(self.tensors), "differing": list(self.tensors.differing)},
            "prompts": {**asdict(self.prompts), "differing": list(self.prompts.differing)},
            "logits": None if self.logits is None else {**asdict(self.logits), "holds": self.logits.holds},
            "why_no_logits": self.why_no_logits,
            "routing": None if self.routing is None else {**asdict(self.routing), "differing": list(self.routing.differing)},
        }

    def require(self, what: str) -> None:
        """Raises CheckpointError with what differs unless all is equal."""
        if self.tensors.drowned and not self.tensors.differing:
            raise CheckpointError(
                f"{what} loses the adapter: it changes the weights by {self.tensors.effect_rms:.2g} (root mean square), and only "
                f"{self.tensors.kept:.0%} of that is left when they are rounded; it was not kept. Teach longer, or convert in "
                "float32 (--dtype float32)"
            )
        for name, told, equal in self.rows():
            if name == "logits" and self.logits is not None:
                self.logits.require(what)
            if equal is False:
                raise CheckpointError(f"{what} is not the same model as before: {name}: {told}; it was not kept")


def prove(
    a: Source,
    b: Source,
    *,
    mode: Mode = "auto",
    device: torch.device | None = None,
    rounding: bool = False,
    known: Mapping[str, Verdict] | None = None,
) -> Proofs:
    """Compare two models. rounding: another type of storage is no difference, if the numbers are equal in the coarser one.

    device: where logits are computed.  mode: "tensors" never runs the models, "logits" always, "auto" where it tells more.
    known: verdicts on parameters that were compared before, see compare_tensors.
    """
    where = device or torch.device("cpu")
    config, fields = compare_configs(a, b)
    ahead = 2 * min(a.num_bytes(), b.num_bytes()) - sum(verdict.num_bytes for verdict in (known or {}).values())
    with byte_bar("comparing", ahead) as advance:
        tensors = compare_tensors(a, b, rounding=rounding, advance=advance, known=known)
    prompts = compare_prompts(a, b)
    why = _why_not(a, b, mode, where, bool(config or tensors.differing or prompts.differing), tensors)
    logits = None if why else compare_logits(a, b, where)
    return Proofs(config, fields, tensors, prompts, logits, why, compare_routing(a.routing, b.routing))


def _why_not(a: Source, b: Source, mode: Mode, device: torch.device, differs: bool, tensors: TensorProof) -> str:
    """The reason not to compare logits, "" to do so."""
    if a.shapes.keys() != b.shapes.keys() or a.config.language.vocab_size != b.config.language.vocab_size:
        return "the two have not the same parameters"
    if mode == "logits":
        return ""
    if mode == "tensors":
        return "asked not to (--proof logits runs the models)"
    if not differs and not tensors.merged and not tensors.rounded:
        return "weights, config and prompts are equal, so logits are too (--proof logits runs the models all the same)"
    need = 4 * sum(reduce(mul, shape, 1) for shape in a.shapes.values())
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    limit = min(LOGITS_BYTES, 0.8 * room)
    if need > limit:
        return (
            f"in float32 the model is {need / 2**30:.1f} GiB, and unasked at most {limit / 2**30:.1f} GiB are run; "
            "--proof logits runs it all the same"
        )
    return ""


def compare_configs(a: Source, b: Source) -> tuple[tuple[str, ...], int]:
    """The fields that change the arithmetic, the tiles or the prompt -> (those that differ, how many there are)."""
    left, right = _flat(asdict(a.config)), _flat(asdict(b.config))
    differing = [
        f"{key} is {left.get(key)} and {right.get(key)}" for key in left.keys() | right.keys() if left.get(key) != right.get(key)
    ]
    return tuple(sorted(differing)), len(left)


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "layer_scale_init":  # tells how training began, not what was learned
            flat[prefix + key] = SAME_ARITHMETIC.get(value, value) if key == "architecture" else value
    return flat


def compare_prompts(a: Source, b: Source) -> PromptProof:
    """Rendered text, ids and tiles of the conversations of verify.py, and the tokens that end an answer."""
    left, right = (Inputs.load(source.folder, source.config) for source in (a, b))
    differing, characters, tokens = [], 0, 0
    talks = conversations()
    for number, (messages, pictures) in enumerate(talks, 1):
        texts = [text_of(render(messages, inputs.template, open_turn=True)) for inputs in (left, right)]
        one, other = (inputs.build(messages, pictures) for inputs in (left, right))
        characters += len(texts[0])
        tokens += len(one)
        if texts[0] != texts[1]:
            differing.append(f"prompt {number} differs {_first_difference(*texts)}")
        elif not torch.equal(one.ids, other.ids):
            differing.append(
                f"prompt {number} reads the same, but its ids differ {_first_difference(one.ids.tolist(), other.ids.tolist())}"
            )
        elif one.digests != other.digests:
            differing.append(f"prompt {number} is cut into other tiles: {len(one.digests)} and {len(other.digests)}")
    if set(left.stop_ids) != set(right.stop_ids):
        differing.append(f"answers end at the ids {left.stop_ids} and {right.stop_ids}")
    return PromptProof(len(talks), characters, tokens, tuple(differing))


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> str:
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"from place {place}: {a[place : place + 20]!r} and {b[place : place + 20]!r}"


def compare_logits(a: Source, b: Source, device: torch.device) -> Proof:
    """Both models, unmerged where they hold an adapter, on the conversations; one of them is in memory at a time."""
    prompts = probes(Inputs.load(a.folder, a.config))
    first, other = (b, a) if a.adapter is None and b.adapter is not None else (a, b)  # the first is nearer to the exact numbers
    types = rounded_types(a, b)
    untaught = shaken = None
    if first.adapter is not None and other.adapter is None:
        untaught = logits_on(first.model(device, taught=False), prompts[:2])  # enough to see how much the adapter changes
    if types:
        shaken = logits_on(first.shaken_model(device, types), prompts)
    wanted, found = (logits_on(source.model(device), prompts) for source in (first, other))
    coarsest = max([torch.float32, *types.values()], key=lambda dtype: LIMITS.get(dtype, 0.0))
    return compare(wanted, found, coarsest, shaken=shaken, untaught=untaught)


def rounded_types(a: Source, b: Source) -> dict[str, torch.dtype]:
    """The parameters whose numbers were rounded on the way from one side to the other -> to which type."""
    rounded: dict[str, torch.dtype] = {}
    for name in a.shapes:
        left, right = a.dtype(name), b.dtype(name)
        if a.touches(name) != b.touches(name):
            rounded[name] = right if a.touches(name) else left
        elif left != right:
            rounded[name] = max(left, right, key=lambda dtype: torch.finfo(dtype).eps)
    return rounded
