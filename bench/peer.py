"""transformers' own generate on the same weights, one prompt after the other.

In: a model folder, ModelInputs.  Out: ids and seconds.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tessella.checkpoint.read import Loaded
from tessella.checkpoint.weights import entries_of
from tessella.checkpoint.write import write_native
from tessella.image import normalise
from tessella.inputs import ModelInput


def native_model(loaded: Loaded) -> Any:
    """transformers' class with the loaded weights, written in the native layout to a folder that is removed again."""
    entries = entries_of({name: weight.detach() for name, weight in loaded.model.named_parameters()})
    with tempfile.TemporaryDirectory() as home:
        folder = write_native(entries, Path(home) / "native", loaded.config, end_ids=loaded.stop_ids, base_folder=loaded.folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=loaded.model.dtype)
    return model.eval().to(loaded.model.device)


@torch.inference_mode()
def one_by_one(model: Any, prompts: Sequence[ModelInput], max_tokens: int) -> tuple[list[list[int]], float, float]:
    """Greedy, max_tokens ids each -> the ids of each answer, seconds of all, seconds of this process's CPU."""
    model.generation_config.eos_token_id = None
    answers, start, cpu = [], time.perf_counter(), time.process_time()
    for one in prompts:
        ids = one.ids[None].to(model.device)
        pictures = {"pixel_values": normalise(one.tiles.to(model.device), model.dtype)} if len(one.tiles) else {}
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
        out = model.generate(input_ids=ids, **told, **pictures)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers, time.perf_counter() - start, time.process_time() - cpu
