"""Tiny random relatives of InternVL as transformers' own classes write them, with a tokenizer and the processor's file.

In: a name of NAMES and a folder.  Out: the folder; (folder, transformers' model).
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import nn

from tiny import tiny_tokenizer

SIDE, PATCH = 56, 14
NAMES = ("llava", "llava next vicuna", "llava next mistral", "blip2", "instructblip")
# (height, width) in px; tiles of 56 px
POINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56], [56, 224], [224, 56]]


# Of the tokenizer with which InstructBLIP's Q-Former reads the question.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *LETTERS, *(f"##{letter}" for letter in LETTERS), "what", "picture")


def spread(model: nn.Module, seed: int = 0) -> None:
    """Seeded random weights with which logits differ clearly."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=chance)
            if weight.dim() == 1 and "embedding" not in name and "newline" not in name:
                weight.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise)
            elif weight.dim() == 1 or "embedding" in name or "embed_tokens" in name:
                weight.copy_(noise if weight.dim() != 4 else noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)


def tokenizer_files(path: Path) -> Tokenizer:
    """A tokenizer with <image> among its tokens, and a bos that it sets in front."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(words))
    return tokenizer


def model_of(name: str, vocabulary: int, image_token: int) -> Any:
    """transformers' model, random, in eval mode."""
    import transformers as t  # heavy: only where it is the oracle

    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
    )
    size = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    mistral = name.endswith("mistral")
    text = t.MistralConfig(**size, sliding_window=None) if mistral else t.LlamaConfig(**size)
    parts = {"vision_config": vision, "text_config": text, "image_token_index": image_token}
    if name in ("blip2", "instructblip"):
        kind = "Blip2" if name == "blip2" else "InstructBlip"
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        tower = getattr(t, f"{kind}VisionConfig")(**shape, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH)
        words = {} if name == "blip2" else {"vocab_size": len(WORDS)}
        former = getattr(t, f"{kind}QFormerConfig")(
            **shape | {"hidden_size": 24}, num_hidden_layers=3, encoder_hidden_size=32, **words
        )
        parts |= {"vision_config": tower, "qformer_config": former, "num_query_tokens": 5}
        model = getattr(t, f"{kind}ForConditionalGeneration")(getattr(t, f"{kind}Config")(**parts))
    elif name == "llava":
        model = t.LlavaForConditionalGeneration(t.LlavaConfig(**parts, image_seq_length=(SIDE // PATCH) ** 2))
    else:
        model = t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**parts, image_grid_pinpoints=POINTS))
    model = model.eval()
    spread(model, seed=len(name))
    return model


def processor_of(name: str) -> Any:
    """transformers' processor of pictures; LLaVA-1.5's told to pad, as the model was trained."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    if name in ("blip2", "instructblip"):
        return BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if name == "llava":
        return LlavaImageProcessorPil(**sides, do_pad=True)
    return LlavaNextImageProcessorPil(**sides, image_grid_pinpoints=POINTS)


def relative(path: Path, name: str) -> tuple[Path, Any]:
    """Write the folder as transformers writes it -> (folder, its model)."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_files(path)
    model = model_of(name, tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>"))
    model.save_pretrained(path)
    if name == "instructblip":
        (path / "qformer_tokenizer").mkdir()
        (path / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (path / "preprocessor_config.json").write_text(json.dumps(processor_of(name).to_dict()))
    return path, model
