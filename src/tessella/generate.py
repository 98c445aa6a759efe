"""The plain way from a prompt to an answer: one prefill, then one token at a time, rows side by side without padding.

In: ModelInputs.  Out: ids as they come, pieces of text, or whole answers.
T tokens of all rows back to back, V vocabulary.  engine/ is what one runs for many users; this is what one reads.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tessella.errors import MemoryError_, NumbersError, is_out_of_memory
from tessella.inputs import ModelInput
from tessella.model.attend import Causal, Dense
from tessella.model.device import free_bytes
from tessella.model.vision_language import VisionLanguageModel
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
    return model.embed(ids, slots, visual_tokens(model, inputs), [window for one in inputs for window in one.windows])


@torch.inference_mode()
def all_logits(model: VisionLanguageModel, one: ModelInput) -> Tensor:
    """The logits (T, V) after every token of one prompt, without a cache; for proofs and scores."""
    positions = torch.arange(len(one), device=model.device)
    return model.logits(model(embed(model, [one]), positions, Causal([len(one)], model.device), len(one)))


def generate_rows(
    model: VisionLanguageModel, inputs: Sequence[ModelInput], params: SamplingParams, stop_ids: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(row, id) as they come. A row ends at a stop id, which is not given out, or after params.max_tokens.

    Raises MemoryError_ with an estimate, and NumbersError where logits are not finite.
    """
    try:
        yield from _rows(model, inputs, params, stop_ids)
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


@torch.inference_mode()
def _rows(
    model: VisionLanguageModel, inputs: Sequence[ModelInput], params: SamplingParams, stop_ids: Sequence[int]
) -> Iterator[tuple[int, int]]:
    lengths = [len(one) for one in inputs]
    total = max(lengths) + params.max_tokens  # fixed at the start: a cached row turns by the same angles throughout
    attend = Dense(len(inputs), model.config.language.num_layers, model.device)
    attend.begin(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(model.device)
    hidden = model(embed(model, inputs), positions, attend, total)
    ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    logits = model.logits(hidden[ends])
    samplers = [Sampler(params) for _ in inputs]
    prompts: list[list[int]] = [one.ids.tolist() for one in inputs]
    answers: list[list[int]] = [[] for _ in inputs]
    rows = list(range(len(inputs)))
    for step in range(params.max_tokens):
        require_finite(logits, model)
        ids = next_ids(logits, [samplers[row] for row in rows], [prompts[row] for row in rows], [answers[row] for row in rows])
        alive = [k for k, token in enumerate(ids) if token not in stop_ids]
        for k in alive:
            answers[rows[k]].append(ids[k])
            yield rows[k], ids[k]
        if not alive or step + 1 == params.max_tokens:
            return
        attend.keep(alive)
        rows, ids = [rows[k] for k in alive], [ids[k] for k in alive]
        attend.begin([1] * len(rows))
        positions = torch.tensor([lengths[row] + step for row in rows], device=model.device)
        embeddings = model.language_model.embed(torch.tensor(ids, device=model.device))
        logits = model.logits(model(embeddings, positions, attend, total))


def generate(model: VisionLanguageModel, one: ModelInput, params: SamplingParams, stop_ids: Sequence[int]) -> Iterator[int]:
    """The ids of the answer to one prompt, as they come."""
    for _, token in generate_rows(model, [one], params, stop_ids):
        yield token


def generate_batch(
    model: VisionLanguageModel,
    inputs: Sequence[ModelInput],
    params: SamplingParams,
    stop_ids: Sequence[int],
    progress: Callable[[int], None] | None = None,
    rows_at_once: int = 16,
) -> list[list[int]]:
    """The ids of the answer to each prompt, in order. progress is told how many rows have just been finished.

    Rows longer than the trained length run alone, because stretched RoPE depends on the longest row of a batch.
    """
    answers: list[list[int]] = [[] for _ in inputs]
    for batch in _batches(model, inputs, params, rows_at_once):
        for row, token in generate_rows(model, [inputs[i] for i in batch], params, stop_ids):
            answers[batch[row]].append(token)
        if progress:
            progress(len(batch))
    return answers


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
