"""Open a native folder with whichever transformers this Python has, and compare its ids and logits with ours.

In: the folder, and what tests/matrix/run.py wrote: prompts with our logits and greedy ids.  Out: one line of JSON.
Nothing of ours is imported: this runs in environments that hold transformers and torch alone.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

NATIVE = "InternVLForConditionalGeneration"


def open_whole(folder: Path) -> Any:
    """transformers' own InternVL in float32."""
    new = tuple(int(number) for number in transformers.__version__.split(".")[:2]) >= (4, 56)
    dtype = {"dtype" if new else "torch_dtype": torch.float32}  # the name changed, and the old one is going away
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **dtype).eval()


def open_text_half(folder: Path) -> Any:
    """The language model alone, for a transformers that has no InternVL: its config section and its tensors by name."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    config = transformers.AutoConfig.for_model(**section)
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "language_model." in name or name.endswith("lm_head.weight"):
                inner = name.rpartition("language_model.")[2]
                state[inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"] = tensor
    found = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if found.unexpected_keys or sorted(found.missing_keys) not in ([], tied):
        raise SystemExit(f"the text half does not fit: missing {found.missing_keys}, unknown {found.unexpected_keys}")
    model.tie_weights()
    return model.eval()


def inputs_of(prompt: dict[str, Any]) -> dict[str, torch.Tensor]:
    ids = prompt["ids"][None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"pixel_values": prompt["pixels"]} if "pixels" in prompt else {})


@torch.inference_mode()
def compare(folder: Path, truth: Path) -> dict[str, Any]:
    """What this transformers makes of the folder. differences: of logits, largest, by prompt; None: it cannot be asked."""
    whole = hasattr(transformers, NATIVE)
    model = open_whole(folder) if whole else open_text_half(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stored, texts = load_file(truth / "truth.safetensors"), json.loads((truth / "texts.json").read_text(encoding="utf-8"))
    differences: dict[str, float | None] = {}
    same_ids, same_answers = True, True
    for name, text in texts.items():
        prompt = {key.rpartition(":")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{name}:")}
        same_ids &= tokenizer(text, add_special_tokens=False)["input_ids"] == prompt["ids"].tolist()
        if "pixels" in prompt and not whole:
            differences[name] = None
            continue
        logits = model(**inputs_of(prompt)).logits[0]
        differences[name] = float((logits - prompt["logits"]).abs().max())
        answer = model.generate(**inputs_of(prompt), max_new_tokens=len(prompt["answer"]), do_sample=False, eos_token_id=-1)
        same_answers &= answer[0, len(prompt["ids"]) :].tolist() == prompt["answer"].tolist()
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "opened": type(model).__name__,
        "whole": whole,
        "same_ids": same_ids,
        "same_answers": same_answers,
        "differences": differences,
    }


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
