"""The official folders of tiny models, their text half read by transformers: the same logits.

For InternLM2, which transformers does not know, the tensors are renamed and unfused here by a loop over heads, written
apart from names.py, and run as a Llama.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from tessella.chat import Message, render, text_of
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import load
from tessella.checkpoint.verify import logits_on
from tessella.inputs import Inputs

transformers = pytest.importorskip("transformers", reason="the oracle of this test; PEFT brings it, in the train extra")

RENAMED = {"tok_embeddings": "embed_tokens", "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm"}
RENAMED |= {"ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj"}
RENAMED |= {"feed_forward.w3": "mlp.up_proj", "output.weight": "lm_head.weight"}


def text_half(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "model.safetensors")
    return {name.removeprefix("language_model."): t for name, t in state.items() if name.startswith("language_model.")}


def as_llama(state: dict[str, Tensor], heads: int, groups: int, d: int) -> dict[str, Tensor]:
    """InternLM2's tensors under Llama's names, wqkv taken apart row block by row block."""
    found = {}
    for name, tensor in state.items():
        if "wqkv" in name:
            blocks = list(tensor.split(d))
            q, k, v = [], [], []
            for _ in range(groups):
                q += [blocks.pop(0) for _ in range(heads // groups)]
                k.append(blocks.pop(0))
                v.append(blocks.pop(0))
            for part, rows in (("q", q), ("k", k), ("v", v)):
                found[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = torch.cat(rows)
        else:
            for theirs, llama in RENAMED.items():
                name = name.replace(theirs, llama)
            found[name] = tensor
    return found


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_text_half_of_a_folder_answers_in_transformers_as_with_us(tmp_path: Path, architecture: str) -> None:
    folder = tiny.tiny_folder(tmp_path, architecture)
    language = tiny.tiny_config(architecture).language
    shape: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "max_position_embeddings": language.max_positions,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "tie_word_embeddings": False,
    }
    state = text_half(folder)
    if architecture == "Qwen2ForCausalLM":
        theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, head_dim=language.head_dim))
    if architecture == "InternLM2ForCausalLM":
        state = as_llama(state, language.num_heads, language.num_kv_heads, language.head_dim)
    theirs.load_state_dict(state)
    loaded = load(folder, dtype="float32", device="cpu")
    prompt = loaded.inputs.build([Message("user", "What is the capital of France?")])
    with torch.inference_mode():
        wanted = theirs.eval()(prompt.ids[None]).logits[0]
    found = logits_on(loaded.model, [prompt])[0]
    assert wanted.std() > 0.5 and (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_official_folders_config_tokenizer_and_template_open_in_transformers(tmp_path: Path, family: str) -> None:
    """With our own code for the config, which stands in for the base's where that brought none."""
    config = tiny.family(family)
    base = tiny.tiny_folder(tmp_path / "base", config.language.architecture, config=config)
    out = convert(base, tmp_path / f"out_{config.language.architecture}", Wish(proof="tensors")).folder
    found = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert found.architectures == ["InternVLChatModel"] and found.template == config.template
    assert found.llm_config.hidden_size == config.language.hidden_size
    rope = getattr(found.llm_config, "rope_parameters", None) or {}  # transformers 5 moves it there
    assert rope.get("rope_theta", getattr(found.llm_config, "rope_theta", None)) == config.language.rope_theta
    assert found.vision_config.qk_normalization is config.vision.qk_norm
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = Inputs.load(out, config)
    messages = [Message("user", "<image>\nWhat is in this picture?"), Message("assistant", "A dish."), Message("user", "Which?")]
    text = tokenizer.apply_chat_template(
        [{"role": one.role, "content": one.text} for one in messages], tokenize=False, add_generation_prompt=True
    )
    bos = "<s>" if inputs.template.add_bos and inputs.tokenizer.bos_id is not None else ""
    assert text == bos + text_of(render(messages, inputs.template, open_turn=True))


def test_what_the_base_brought_for_engines_is_left_as_it_is(tmp_path: Path) -> None:
    base = tiny.tiny_folder(tmp_path / "base", "LlamaForCausalLM")
    (base / "configuration_internvl_chat.py").write_text("# theirs")
    raw = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**raw, "chat_template": "theirs"}))
    out = convert(base, tmp_path / "out", Wish(proof="tensors")).folder
    assert (out / "configuration_internvl_chat.py").read_text() == "# theirs" and not (out / "chat_template.jinja").exists()
