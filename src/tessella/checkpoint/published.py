"""The models of the family as published: what each is made of, so that it can be counted before a byte of it is fetched.

In: a name as on the hub, "InternVL2-2B".  Out: its ModelConfig.
These configs are made to be counted, not run: what has no parameters and was not seen in a published file (RoPE's base and
stretching) is not here. The checkpoint's own config.json decides as soon as there is one.
Sources: modeling_*.py, shell/ and README.md of OpenGVLab/InternVL at 2410d1d; the model cards' tables of parts; the base
models' own configs. Qwen2.5 tables are cut to the 151,674 tokens that InternVL's tokenizer has, Qwen3's are not.
"""

from typing import NamedTuple

from tessella.config import ModelConfig, model_config

HUB = "OpenGVLab"


class Tower(NamedTuple):
    width: int
    layers: int
    heads: int
    feed_forward: int
    norm: str
    qkv_bias: bool
    qk_norm: bool


class Decoder(NamedTuple):
    architecture: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    head_width: int


class Published(NamedTuple):
    tower: str  # key of TOWERS
    decoder: str  # key of DECODERS
    template: str
    context_tokens: int = 8192


TOWERS = {
    "300M": Tower(1024, 24, 16, 4096, "layer_norm", qkv_bias=True, qk_norm=False),
    "6B": Tower(3200, 45, 25, 12800, "rms_norm", qkv_bias=False, qk_norm=True),
}
INTERNLM2, PHI3, LLAMA = "InternLM2ForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM"
INTERNLM3 = "InternLM3ForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
DECODERS = {
    "InternLM2-1.8B": Decoder(INTERNLM2, 2048, 24, 16, 8, 8192, 92553, 128),
    "InternLM2-7B": Decoder(INTERNLM2, 4096, 32, 32, 8, 14336, 92553, 128),
    "InternLM2-20B": Decoder(INTERNLM2, 6144, 48, 48, 8, 16384, 92553, 128),
    "InternLM3-8B": Decoder(INTERNLM3, 4096, 48, 32, 2, 10240, 128512, 128),
    "Phi-3-mini": Decoder(PHI3, 3072, 32, 32, 32, 8192, 32020, 96),
    "Yi-34B": Decoder(LLAMA, 7168, 60, 56, 8, 20480, 64007, 128),
    "Llama-3-70B": Decoder(LLAMA, 8192, 80, 64, 8, 28672, 128265, 128),
    "Qwen2-0.5B": Decoder(QWEN2, 896, 24, 14, 2, 4864, 151655, 64),
    "Qwen2.5-0.5B": Decoder(QWEN2, 896, 24, 14, 2, 4864, 151674, 64),
    "Qwen2.5-1.5B": Decoder(QWEN2, 1536, 28, 12, 2, 8960, 151674, 128),
    "Qwen2.5-3B": Decoder(QWEN2, 2048, 36, 16, 2, 11008, 151674, 128),
    "Qwen2.5-7B": Decoder(QWEN2, 3584, 28, 28, 4, 18944, 151674, 128),
    "Qwen2.5-14B": Decoder(QWEN2, 5120, 48, 40, 8, 13824, 151674, 128),
    "Qwen2.5-32B": Decoder(QWEN2, 5120, 64, 40, 8, 27648, 151674, 128),
    "Qwen2.5-72B": Decoder(QWEN2, 8192, 80, 64, 8, 29568, 151674, 128),
    "Qwen3-0.6B": Decoder(QWEN3, 1024, 28, 16, 8, 3072, 151936, 128),
    "Qwen3-1.7B": Decoder(QWEN3, 2048, 28, 16, 8, 6144, 151936, 128),
    "Qwen3-4B": Decoder(QWEN3, 2560, 36, 32, 8, 9728, 151936, 128),
    "Qwen3-8B": Decoder(QWEN3, 4096, 36, 32, 8, 12288, 151936, 128),
    "Qwen3-14B": Decoder(QWEN3, 5120, 40, 40, 8, 17408, 151936, 128),
    "Qwen3-32B": Decoder(QWEN3, 5120, 64, 64, 8, 25600, 151936, 128),
}
# Not here: the mixtures of experts of 3.5, whose decoders are not ours. InternLM3's row is from memory of its published shape.
PUBLISHED = {
    "InternVL-Chat-V1-5": Published("6B", "InternLM2-20B", "internlm2-chat", context_tokens=4096),
    "Mini-InternVL-Chat-2B-V1-5": Published("300M", "InternLM2-1.8B", "internlm2-chat"),
    "Mini-InternVL-Chat-4B-V1-5": Published("300M", "Phi-3-mini", "phi3-chat"),
    "InternVL2-1B": Published("300M", "Qwen2-0.5B", "Hermes-2"),
    "InternVL2-2B": Published("300M", "InternLM2-1.8B", "internlm2-chat"),
    "InternVL2-4B": Published("300M", "Phi-3-mini", "phi3-chat"),
    "InternVL2-8B": Published("300M", "InternLM2-7B", "internlm2-chat"),
    "InternVL2-26B": Published("6B", "InternLM2-20B", "internlm2-chat"),
    "InternVL2-40B": Published("6B", "Yi-34B", "Hermes-2"),
    "InternVL2-Llama3-76B": Published("6B", "Llama-3-70B", "internlm2-chat"),
    "InternVL2_5-1B": Published("300M", "Qwen2.5-0.5B", "internvl2_5"),
    "InternVL2_5-2B": Published("300M", "InternLM2-1.8B", "internvl2_5"),
    "InternVL2_5-4B": Published("300M", "Qwen2.5-3B", "internvl2_5"),
    "InternVL2_5-8B": Published("300M", "InternLM2-7B", "internvl2_5"),
    "InternVL2_5-26B": Published("6B", "InternLM2-20B", "internvl2_5"),
    "InternVL2_5-38B": Published("6B", "Qwen2.5-32B", "internvl2_5"),
    "InternVL2_5-78B": Published("6B", "Qwen2.5-72B", "internvl2_5"),
    "InternVL3-1B": Published("300M", "Qwen2.5-0.5B", "internvl2_5"),
    "InternVL3-2B": Published("300M", "Qwen2.5-1.5B", "internvl2_5"),
    "InternVL3-8B": Published("300M", "Qwen2.5-7B", "internvl2_5"),
    "InternVL3-9B": Published("300M", "InternLM3-8B", "internvl2_5"),
    "InternVL3-14B": Published("300M", "Qwen2.5-14B", "internvl2_5"),
    "InternVL3-38B": Published("6B", "Qwen2.5-32B", "internvl2_5"),
    "InternVL3-78B": Published("6B", "Qwen2.5-72B", "internvl2_5"),
    "InternVL3_5-1B": Published("300M", "Qwen3-0.6B", "internvl2_5"),
    "InternVL3_5-2B": Published("300M", "Qwen3-1.7B", "internvl2_5"),
    "InternVL3_5-4B": Published("300M", "Qwen3-4B", "internvl2_5"),
    "InternVL3_5-8B": Published("300M", "Qwen3-8B", "internvl2_5"),
    "InternVL3_5-14B": Published("300M", "Qwen3-14B", "internvl2_5"),
    "InternVL3_5-38B": Published("6B", "Qwen3-32B", "internvl2_5"),
}


def published_config(name: str) -> ModelConfig:
    """The config of a name in PUBLISHED, read by the same rules as a config.json."""
    row = PUBLISHED[name]
    tower, decoder = TOWERS[row.tower], DECODERS[row.decoder]
    return model_config(
        {
            "architectures": ["InternVLChatModel"],
            "template": row.template,
            "force_image_size": 448,
            "ps_version": "v2",
            "vision_config": {
                "hidden_size": tower.width,
                "intermediate_size": tower.feed_forward,
                "num_hidden_layers": tower.layers,
                "num_attention_heads": tower.heads,
                "norm_type": tower.norm,
                "qkv_bias": tower.qkv_bias,
                "qk_normalization": tower.qk_norm,
                "image_size": 448,
                "patch_size": 14,
            },
            "llm_config": {
                "architectures": [decoder.architecture],
                "hidden_size": decoder.width,
                "intermediate_size": decoder.feed_forward,
                "num_hidden_layers": decoder.layers,
                "num_attention_heads": decoder.heads,
                "num_key_value_heads": decoder.kv_heads,
                "head_dim": decoder.head_width,
                "vocab_size": decoder.vocabulary,
                "max_position_embeddings": row.context_tokens,
                "bias": False,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
            },
        }
    )
