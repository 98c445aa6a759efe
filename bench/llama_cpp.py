"""Does llama.cpp answer like us? A model becomes GGUF (language model and mmproj, every number in float32), and both are asked.

In: an official folder, or tessella-nano: Llama, InternLM2 or Qwen2 shaped, a tower of InternViT-300M's kind, byte-level BPE.
Out: a table. A trial, not a converter: docs/convert.md says what came of it and what is missing.

    pip install xllamacpp
    python bench/llama_cpp.py tessella-nano WORK --pre smollm
"""

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from PIL import Image
from torch import Tensor

from tessella.chat import Message, template_named
from tessella.checkpoint.jinja import chat_template
from tessella.checkpoint.layout import IMAGENET_MEAN, IMAGENET_STD
from tessella.checkpoint.read import Loaded, load
from tessella.checkpoint.verify import logits_on
from tessella.generate import generate
from tessella.inputs import Picture
from tessella.sampling import SamplingParams

ARCHITECTURES = {"InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
LANGUAGE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOWER = {
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "norm1": "ln1",
    "norm2": "ln2",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5
ANSWER_TOKENS = 24


def put(file: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    file.add_tensor(name, tensor.detach().float().contiguous().numpy())


def write_language(loaded: Loaded, path: Path, pre: str) -> None:
    """The language model. llama.cpp turns neighbours in "llama", where others turn the halves of a head: rows of q and k move."""
    language, state = loaded.config.language, dict(loaded.model.named_parameters())
    kind = ARCHITECTURES[language.architecture]
    file = gguf.GGUFWriter(str(path), kind)
    file.add_context_length(language.max_positions)
    file.add_embedding_length(language.hidden_size)
    file.add_block_count(language.num_layers)
    file.add_feed_forward_length(language.intermediate_size)
    file.add_head_count(language.num_heads)
    file.add_head_count_kv(language.num_kv_heads)
    file.add_key_length(language.head_dim)
    file.add_value_length(language.head_dim)
    file.add_rope_dimension_count(language.head_dim)
    file.add_rope_freq_base(language.rope_theta)
    file.add_layer_norm_rms_eps(language.norm_eps)
    file.add_vocab_size(language.vocab_size)
    write_tokenizer(loaded, file, pre)
    put(file, "token_embd.weight", state["language_model.model.embed_tokens.weight"])
    put(file, "output_norm.weight", state["language_model.model.norm.weight"])
    if not language.tie_embeddings:
        put(file, "output.weight", state["language_model.lm_head.weight"])
    heads = {"self_attn.q_proj": language.num_heads, "self_attn.k_proj": language.num_kv_heads}
    for layer in range(language.num_layers):
        for ours, theirs in LANGUAGE.items():
            for leaf in ("weight", "bias"):
                tensor = state.get(f"language_model.model.layers.{layer}.{ours}.{leaf}")
                if tensor is not None and kind == "llama" and ours in heads:
                    rest = tensor.shape[1:]
                    tensor = tensor.reshape(heads[ours], 2, -1, *rest).transpose(1, 2).reshape(tensor.shape)
                if tensor is not None:
                    put(file, f"blk.{layer}.{theirs}.{leaf}", tensor)
    finish(file)


def write_tokenizer(loaded: Loaded, file: gguf.GGUFWriter, pre: str) -> None:
    """pre: llama.cpp's name of the rule by which text is cut before the merges; it knows a list, and no other."""
    raw = json.loads((loaded.folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: text for text, number in raw["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in raw["added_tokens"]}
    names |= added
    ids = range(loaded.config.language.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list([names.get(number, f"[PAD{number}]") for number in ids])
    file.add_token_types([CONTROL if number in added else NORMAL if number in names else UNUSED for number in ids])
    file.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    file.add_eos_token_id(loaded.stop_ids[0])
    file.add_add_bos_token(False)
    template = template_named(loaded.config.template)
    bos = loaded.tokenizer.bos_id if template.add_bos else None
    if bos is not None:
        file.add_bos_token_id(bos)
    file.add_chat_template(chat_template(template, None if bos is None else loaded.tokenizer.name_of(bos)))


def write_tower(loaded: Loaded, path: Path, *, as_they_do: bool) -> None:
    """Tower and projector. llama.cpp lays the class token behind the patches, so its place must lie behind theirs too.

    as_they_do: the table of places in the checkpoint's order, as llama.cpp's own converter leaves it.
    """
    config, vision, state = loaded.config, loaded.config.vision, dict(loaded.model.named_parameters())
    file = gguf.GGUFWriter(str(path), "clip")
    file.add_type("mmproj")
    file.add_string("clip.projector_type", "internvl")
    file.add_bool("clip.has_vision_encoder", True)
    file.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": vision.num_layers,
        "projection_dim": config.language.hidden_size,
        "attention.head_count": vision.num_heads,
        "projector.scale_factor": round(1 / config.downsample_ratio),
        "preproc_min_tiles": config.min_tiles,
        "preproc_max_tiles": config.max_tiles,
    }
    for key, number in numbers.items():
        file.add_uint32(f"clip.vision.{key}", number)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", vision.norm_eps)
    file.add_array("clip.vision.image_mean", list(IMAGENET_MEAN))
    file.add_array("clip.vision.image_std", list(IMAGENET_STD))
    put(file, "v.class_embd", state["vision_model.embeddings.class_embedding"].reshape(-1))
    put(file, "v.patch_embd.weight", state["vision_model.embeddings.patch_embedding.weight"])
    put(file, "v.patch_embd.bias", state["vision_model.embeddings.patch_embedding.bias"])
    places = state["vision_model.embeddings.position_embedding"].reshape(-1, vision.hidden_size)
    put(file, "v.position_embd.weight", places if as_they_do else torch.cat([places[1:], places[:1]]))
    for layer in range(vision.num_layers):
        path_of_layer = f"vision_model.encoder.layers.{layer}"
        for ours, theirs in TOWER.items():
            for leaf in ("weight", "bias"):
                put(file, f"v.blk.{layer}.{theirs}.{leaf}", state[f"{path_of_layer}.{ours}.{leaf}"])
        for scale in ("ls1", "ls2"):
            put(file, f"v.blk.{layer}.{scale}.weight", state[f"{path_of_layer}.{scale}"])
    for part in (0, 1, 3):
        for leaf in ("weight", "bias"):
            put(file, f"mm.model.mlp.{part}.{leaf}", state[f"mlp1.{part}.{leaf}"])
    finish(file)


def finish(file: gguf.GGUFWriter) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def server(language: Path, tower: Path) -> Any:
    """llama.cpp with its keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(language), str(tower)
    params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def row(loaded: Loaded, theirs: Any, name: str, message: Message, pictures: list[Image.Image], **limits: int) -> str:
    """One question, asked of both."""
    ours = loaded.inputs.build([message], [Picture(picture, **limits) for picture in pictures])
    wanted = logits_on(loaded.model, [ours])[0][-1].log_softmax(-1)
    ids = list(generate(loaded.model, ours, SamplingParams(max_tokens=ANSWER_TOKENS), loaded.stop_ids))
    content: Any = message.text
    if pictures:
        text = {"type": "text", "text": message.text.replace("<image>", "")}
        content = [*({"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in pictures), text]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS, "temperature": 0, "top_k": 1}
    answer = theirs.handle_chat_completions({**request, "logprobs": True, "top_logprobs": 20, "cache_prompt": False})
    said = answer["choices"][0]["logprobs"]["content"]
    difference = max(abs(float(wanted[one["id"]]) - one["logprob"]) for one in said[0]["top_logprobs"])
    # Their list leaves tokens out that are no whole character, so these count on neither side.
    mine, other = (
        [one for one in found if "\ufffd" not in loaded.tokenizer.decode([one])] for found in (ids, [one["id"] for one in said])
    )
    same = "yes" if mine == other else "no"
    return f"| {name} | {len(ours)} | {answer['usage']['prompt_tokens']} | {difference:.2g} | {same} |"


def data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--pre", default="smollm", help="llama.cpp's name of the tokenizer's first cut")
    told = parser.parse_args()
    loaded = load(told.model, device="cpu", dtype="float32")
    told.work.mkdir(parents=True, exist_ok=True)
    write_language(loaded, told.work / "model.gguf", told.pre)
    side = loaded.config.tile_size_px
    square = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    wide = Image.radial_gradient("L").resize((2 * side, side)).convert("RGB")
    asked = Message("user", "<image>\nWhat is in this picture?")
    print("| question | our tokens | theirs | largest difference of 20 log probabilities | same answer |")
    print("| --- | --- | --- | --- | --- |")
    for as_they_do in (False, True):
        write_tower(loaded, told.work / "mmproj.gguf", as_they_do=as_they_do)
        theirs = server(told.work / "model.gguf", told.work / "mmproj.gguf")
        word = "places as their converter leaves them" if as_they_do else "places moved"
        if not as_they_do:
            print(row(loaded, theirs, "text", Message("user", "What is the capital of France?"), []))
        print(row(loaded, theirs, f"one tile, {word}", asked, [square], max_tiles=1))
        print(row(loaded, theirs, f"two tiles and the thumbnail, {word}", asked, [wide]), flush=True)


if __name__ == "__main__":
    main()
