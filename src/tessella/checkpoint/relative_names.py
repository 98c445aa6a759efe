"""Names of InternVL's relatives as transformers writes them into files: ours -> stored, # for the number of the layer.

Paths are of modules, or of parameters that stand by themselves. names.py makes its groups of them.
Source: Llava, LlavaNext, Blip2 and InstructBlip of huggingface/transformers at 5.23.
"""

TOWER = "vision_model.encoder.layers.#."

CLIP = "vision_tower.vision_model.encoder.layers.#."
LLAVA = {
    "vision_model.embeddings.class_embedding": "vision_tower.vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding": "vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision_model.embeddings.patch_embedding": "vision_tower.vision_model.embeddings.patch_embedding",
    "vision_model.pre_norm": "vision_tower.vision_model.pre_layrnorm",
    "vision_model.post_norm": "vision_tower.vision_model.post_layernorm",
    f"{TOWER}attn.proj": f"{CLIP}self_attn.out_proj",
    f"{TOWER}mlp.fc1": f"{CLIP}mlp.fc1",
    f"{TOWER}mlp.fc2": f"{CLIP}mlp.fc2",
    f"{TOWER}norm1": f"{CLIP}layer_norm1",
    f"{TOWER}norm2": f"{CLIP}layer_norm2",
    "mlp1.0": "multi_modal_projector.linear_1",
    "mlp1.2": "multi_modal_projector.linear_2",
    "mlp1.image_newline": "image_newline",
}

_OURS, _STORED = "mlp1.0.former.layers.#.", "qformer.encoder.layer.#."
_ATTENTION = {"query": "attention.query", "key": "attention.key", "value": "attention.value"}
_ATTENTION |= {"dense": "output.dense", "norm": "output.LayerNorm"}
BLIP2 = {
    "vision_model.post_norm": "vision_model.post_layernorm",
    f"{TOWER}attn.qkv": f"{TOWER}self_attn.qkv",
    f"{TOWER}attn.proj": f"{TOWER}self_attn.projection",
    f"{TOWER}norm1": f"{TOWER}layer_norm1",
    f"{TOWER}norm2": f"{TOWER}layer_norm2",
    "mlp1.0.query_tokens": "query_tokens",
    "mlp1.0.former.norm": "qformer.layernorm",
    "mlp1.1": "language_projection",
    **{
        f"{_OURS}{ours}.{part}": f"{_STORED}{stored}.{name}"
        for ours, stored in (("attention", "attention"), ("cross", "crossattention"))
        for part, name in _ATTENTION.items()
    },
    f"{_OURS}queries.fc1": f"{_STORED}intermediate_query.dense",
    f"{_OURS}queries.fc2": f"{_STORED}output_query.dense",
    f"{_OURS}queries.norm": f"{_STORED}output_query.LayerNorm",
}
INSTRUCTBLIP = {
    **BLIP2,
    "mlp1.0.former.norm": "qformer.embeddings.layernorm",
    "mlp1.0.former.words": "qformer.embeddings.word_embeddings",
    "mlp1.0.former.places": "qformer.embeddings.position_embeddings",
    f"{_OURS}text.fc1": f"{_STORED}intermediate.dense",
    f"{_OURS}text.fc2": f"{_STORED}output.dense",
    f"{_OURS}text.norm": f"{_STORED}output.LayerNorm",
}
