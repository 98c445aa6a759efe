"""The plain way from a prompt to an answer: one prefill, then one token at a time, rows side by side without padding.

In: ModelInputs.  Out: ids as they come, pieces of text, or whole answers.
T tokens of all rows back to back, V vocabulary.  engine/ is what one runs for many users; this is what one reads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tessella.errors import MemoryError_, NumbersError, is_out_of_memory
from tessella.inputs import ModelInput
from tessella.model.attend import Causal, Dense
from tessella.model.device import free_bytes
from tessella.model.routing import Routed
from tessella.model.vision_language import VisionLanguageModel
from tessella.routes import Route
from tessella.sampling import Sampler, SamplingParams, next_ids
from tessella.stops import StopText
from tessella.tokenizer import Tokenizer

TILES_AT_ONCE = 32  # tiles that run through the tower together; bounds memory, changes no number


@torch.inference_mode()
def visual_tokens(model: VisionLanguageModel, inputs: Sequence[ModelInput]) -> Tensor | None:
    """The visual tokens (N, slots, D) of all tiles in order, None when there is no tile; equal tiles are seen once."""
    digests = [digest for one in inputs for digest in one.digests]
    if not digests:
        return None
    places = {digest: place for place, digest in enumerate(digests)}  # of one tile of each kind
    tiles = torch.cat([one.tiles for one in inputs])[list(places.values())]
    every = [question for one in inputs for question in one.questions]
    asked = [every[place] for place in places.values()] if every else []
    starts = range(0, len(tiles), TILES_AT_ONCE)
    parts = [(tiles[start : start + TILES_AT_ONCE], asked[start : start + TILES_AT_ONCE]) for start in starts]
    seen = torch.cat([model.visual_tokens(some.to(model.device), questions) for some, questions in parts])
    number = {digest: row for row, digest in enumerate(places)}
    return seen[[number[digest] for digest in digests]]


@torch.inference_mode()
def embed(model: VisionLanguageModel, inputs: Sequence[ModelInput]) -> Tensor:
    """The embeddings (T, D) of all rows, pictures in their slots."""
    ids = torch.cat([one.ids for one in inputs]).to(model.device)
    slots = torch.cat([one.slots for one in inputs]).to(model.device)
    windows = [window for one in inputs for window in one.windows]
    return model.embed(ids, slots, visual_tokens(model, inputs), windows, queries_of(inputs, model.device))


def queries_of(inputs: Sequence[ModelInput], device: torch.device) -> Tensor | None:
    """The super-link query (T,) of each place of all rows, else -1; None where no row has one."""
    if all(one.queries is None for one in inputs):
        return None
    rows = [one.ids.new_full((len(one),), -1) if one.queries is None else one.queries for one in inputs]
    return torch.cat(rows).to(device)


@torch.inference_mode()
def all_logits(model: VisionLanguageModel, one: ModelInput) -> Tensor:
    """The logits (T, V) after every token of one prompt, without a cache; for proofs and scores."""
    positions = torch.arange(len(one), device=model.device)
    return model.logits(model(embed(model, [one]), positions, Causal([len(one)], model.device), len(one)))


OnRouted = Callable[[Routed], None]


def generate_rows(
    model: VisionLanguageModel,
    inputs: Sequence[ModelInput],
    params: SamplingParams,
    stop_ids: Sequence[int],
    routed: OnRouted | None = None,
) -> Iterator[tuple[int, int]]:
    """(row, id) as they come. A row ends at a stop id, which is not given out, or after params.max_tokens.

    routed: told of each routing token that the model chose, when its queries have been run; then the text goes on. The
    queries count as tokens of the answer; a token whose queries have no room left ends the row.
    Raises MemoryError_ with an estimate, and NumbersError where logits are not finite.
    """
    try:
        yield from _rows(model, inputs, params, stop_ids, routed)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        need, free = (count / 2**30 for count in (estimate_bytes(model, inputs, params), free_bytes(model.device)))
        tokens, tiles = sum(map(len, inputs)), sum(len(one.tiles) for one in inputs)
        raise MemoryError_(
            f"out of memory on {model.device}: {len(inputs)} prompts of {tokens:,} tokens and {tiles} tiles, answered in up to "
            f"{params.max_tokens:,} tokens each, need about {need:.1f} GiB with the weights; {free:.1f} GiB are free now. Lower "
            "--max-tiles, --max-tokens or --batch-items, or take --dtype bfloat16, which halves the weights of float32"
        ) from error


def estimate_bytes(model: VisionLanguageModel, inputs: Sequence[ModelInput], params: SamplingParams) -> int:
    """About what answering needs: weights, the keys and values of all tokens, and what the largest layer holds meanwhile."""
    language, vision, size = model.config.language, model.config.vision, model.dtype.itemsize
    tokens, tiles = sum(map(len, inputs)), sum(len(one.tiles) for one in inputs)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache = 2 * language.num_layers * language.num_kv_heads * language.head_dim * (tokens + len(inputs) * params.max_tokens)
    prefill = tokens * (8 * language.hidden_size + 3 * language.intermediate_size)
    patches = min(tiles, TILES_AT_ONCE) * (vision.image_size_px // vision.patch_size_px) ** 2
    tower = patches * (6 * vision.hidden_size + 2 * vision.intermediate_size)
    return weights + size * (cache + max(prefill, tower))


def require_finite(logits: Tensor, model: VisionLanguageModel) -> None:
    """Raises NumbersError naming the broken weights, or, where none is, the type: else the answer would be any token, or none."""
    if bool(torch.isfinite(logits).all()):
        return
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    kind = str(model.dtype).removeprefix("torch.")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise NumbersError(
            f"the model's logits are NaN or infinite, because {', '.join(broken[:3])}{more} hold such numbers; fetch or convert "
            "the weights again, or teach anew at a lower learning rate"
        )
    raise NumbersError(
        f"the model's logits are NaN or infinite, though its weights are not: {kind} is too narrow for it; take --dtype "
        + ("bfloat16 or float32" if model.dtype == torch.float16 else "float32")
    )


@dataclass
class _Row:
    """One answer under way. waiting: (id, super-link query or -1) of what is to be run before it speaks again."""

    number: int
    sampler: Sampler
    prompt: list[int]
    room: int  # tokens that may still be given out or run
    answer: list[int] = field(default_factory=list)
    run: int = 0  # tokens run behind the prompt
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    route: Route | None = None
    states: list[Tensor] = field(default_factory=list)

    def say(self, token: int, route: Route | None) -> None:
        """The next token of the answer; behind a routing token its queries wait, if there is room for them."""
        self.answer.append(token)
        self.room -= 1
        self.waiting.append((token, -1))
        if route is not None and route.queries > self.room:
            self.room = 0
        elif route is not None:
            self.room -= route.queries
            self.waiting.extend((token, route.first + k) for k in range(route.queries))
            self.route = route

    def heard(self, query: int, hidden: Tensor) -> Routed | None:
        """What was run became hidden (D,); gives what goes to a decoder when the last query has been run."""
        self.run += 1
        if query >= 0:
            self.states.append(hidden)
        if self.route is None or self.waiting:
            return None
        found = Routed(self.number, self.route, len(self.answer), torch.stack(self.states))
        self.route, self.states = None, []
        return found


@torch.inference_mode()
def _rows(
    model: VisionLanguageModel,
    inputs: Sequence[ModelInput],
    params: SamplingParams,
    stop_ids: Sequence[int],
    routed: OnRouted | None,
) -> Iterator[tuple[int, int]]:
    lengths = [len(one) for one in inputs]
    total = max(lengths) + params.max_tokens  # fixed at the start: a cached row turns by the same angles throughout
    attend = Dense(len(inputs), model.config.language.num_layers, model.device)
    attend.begin(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(model.device)
    hidden = model(embed(model, inputs), positions, attend, total)
    hidden = hidden[torch.tensor(lengths, device=model.device).cumsum(0) - 1]  # (R, D), of each row's last token
    rows = [_Row(k, Sampler(params), one.ids.tolist(), params.max_tokens) for k, one in enumerate(inputs)]
    while rows:
        speaking = [k for k, row in enumerate(rows) if not row.waiting]  # the others are still running their queries
        ended = set()
        if speaking:
            logits = model.logits(hidden if len(speaking) == len(rows) else hidden[speaking])
            require_finite(logits, model)
            some = [rows[k] for k in speaking]
            ids = next_ids(logits, [row.sampler for row in some], [row.prompt for row in some], [row.answer for row in some])
            for k, token in zip(speaking, ids, strict=True):
                if token in stop_ids:
                    ended.add(k)
                    continue
                rows[k].say(token, None if model.routing is None else model.routing.routes.of(token))
                yield rows[k].number, token
                if not rows[k].room and rows[k].route is None:
                    ended.add(k)
        alive = [k for k in range(len(rows)) if k not in ended]
        if not alive:
            return
        attend.keep(alive)
        rows = [rows[k] for k in alive]
        hidden = _run_one_each(model, rows, lengths, attend, total)
        queries = [row.waiting.popleft()[1] for row in rows]
        for k, (row, query) in enumerate(zip(rows, queries, strict=True)):
            found = row.heard(query, hidden[k])
            if found is not None and routed is not None:
                routed(found)
        full = [k for k, row in enumerate(rows) if not row.room and not row.waiting]  # its last query filled it
        if full:
            left = [k for k in range(len(rows)) if k not in full]
            if not left:
                return
            attend.keep(left)
            rows, hidden = [rows[k] for k in left], hidden[left]


def _run_one_each(model: VisionLanguageModel, rows: Sequence[_Row], lengths: Sequence[int], attend: Dense, total: int) -> Tensor:
    """Run what each row waits for first -> hidden (R, D)."""
    attend.begin([1] * len(rows))
    ids, queries = (torch.tensor([row.waiting[0][i] for row in rows], device=model.device) for i in (0, 1))
    positions = torch.tensor([lengths[row.number] + row.run for row in rows], device=model.device)
    return model(model.embed_text(ids, queries if model.routing is not None else None), positions, attend, total)


def generate(
    model: VisionLanguageModel,
    one: ModelInput,
    params: SamplingParams,
    stop_ids: Sequence[int],
    routed: OnRouted | None = None,
) -> Iterator[int]:
    """The ids of the answer to one prompt, as they come. routed: as in generate_rows."""
    for _, token in generate_rows(model, [one], params, stop_ids, routed):
        yield token


def generate_batch(
    model: VisionLanguageModel,
    inputs: Sequence[ModelInput],
    params: SamplingParams,
    stop_ids: Sequence[int],
    progress: Callable[[int], None] | None = None,
    rows_at_once: int = 16,
    routed: OnRouted | None = None,
) -> list[list[int]]:
    """The ids of the answer to each prompt, in order. progress is told how many rows have just been finished.

    routed: as in generate_rows; its rows are places in inputs.
    Rows longer than the trained length run alone, because stretched RoPE depends on the longest row of a batch.
    """
    answers: list[list[int]] = [[] for _ in inputs]
    for batch in _batches(model, inputs, params, rows_at_once):
        renumbered = None if routed is None else _renumbered(routed, batch)
        for row, token in generate_rows(model, [inputs[i] for i in batch], params, stop_ids, renumbered):
            answers[batch[row]].append(token)
        if progress:
            progress(len(batch))
    return answers


def _renumbered(routed: OnRouted, batch: Sequence[int]) -> OnRouted:
    """routed, told the place in all inputs instead of the row of a batch."""
    return lambda found: routed(replace(found, row=batch[found.row]))


def _batches(
    model: VisionLanguageModel, inputs: Sequence[ModelInput], params: SamplingParams, rows_at_once: int
) -> Iterator[list[int]]:
    """Indices of rows that may run together, in order."""
    batch: list[int] = []
    for i, one in enumerate(inputs):
        stretched = len(one) + params.max_tokens > model.config.language.unstretched_tokens
        if batch and (stretched or len(batch) == rows_at_once):
            yield batch
            batch = []
        batch.append(i)
        if stretched:
            yield batch
            batch = []
    if batch:
        yield batch


def stream_text(
    model: VisionLanguageModel, one: ModelInput, params: SamplingParams, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> Iterator[str]:
    """The answer as pieces of text in whole characters, ended before the first of params.stop.

    Text that may yet become a stop string is held back until it is clear.
    """
    stream, stop = tokenizer.stream(), StopText(params.stop)
    for token in generate(model, one, params, stop_ids):
        if text := stop.push(stream.push(token)):
            yield text
        if stop.found:
            return
    if rest := stop.push(stream.end()) + stop.end():
        yield rest
