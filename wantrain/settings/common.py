"""Keys that several commands have, and what each may hold: a model's facts, where its parts lie, LoRAs to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Len

from wantrain.settings.kinds import Count, File, FreeText, Inside, Natural, NotNegative, Object, Positive, Says, Text

Expert = Literal["high_noise", "low_noise", "dense"]
Precision = Literal["fp32", "bf16"]
Masks = Annotated[dict[str, Any], Says("mask types with weights: {image: 1.0}")]
#: That it is 4k+1 is checked with words of its own (geometry.check_num_frames).
Frames = Annotated[int, Says("a whole number of frames, 4k+1")]

#: A list that is typed reaches the command as one text (runs/loras.py): a path may have brackets.
Files = File | Annotated[list[str], Says("a list of paths: [FILE, FILE]")]
Strengths = Annotated[
    dict[Expert, float | list[float]], Says("one number per expert: {high_noise: 0.8, low_noise: [1, 0.5]}")
]

#: What a block keeps, or how many blocks keep all.
Recompute = Literal["none", "attention", "block"] | Natural

#: A model's facts, conf/model/NAME.yaml. Every command has them.
MODEL: Mapping[str, Any] = {
    "model.name": Text,
    "model.experts": Annotated[list[Expert], Len(1), Says("a list of high_noise, low_noise, or of dense alone")],
    "model.boundary": Inside | None,
    "model.shift": Positive,
    "model.fps": Positive,
    "model.num_frames": Frames,
    "model.area": Count,
    "model.multiple": Count,
    "model.conditioning": Text,
    "model.mask_types": Masks,
    "model.guidance.high_noise": NotNegative | None,
    "model.guidance.low_noise": NotNegative | None,
    "model.guidance.dense": NotNegative | None,
    "model.sampling_steps": Count,
    "model.negative_prompt": FreeText,
    "model.weights": File | None,
    "model.scratch": bool,
    "model.precision": Precision,
    "model.steps": Count,
    "model.train.batch_size": Count,
    "model.train.micro_batch": Count | None,
    "model.train.recompute": Recompute,
    "model.transformer": Object,
    "model.transformer.num_attention_heads": Count,
    "model.transformer.attention_head_dim": Count,
    "model.transformer.in_channels": Count,
    "model.transformer.out_channels": Count,
    "model.transformer.text_dim": Count,
    "model.transformer.text_length": Count,
    "model.transformer.freq_dim": Count,
    "model.transformer.ffn_dim": Count,
    "model.transformer.num_layers": Count,
    "model.transformer.eps": Positive,
    "model.vae": Object,
    "model.vae.base_dim": Count,
    "model.vae.decoder_base_dim": Count | None,
    "model.vae.z_dim": Count,
    "model.vae.dim_mult": Annotated[list[Count], Len(1), Says("a list of whole numbers above 0")],
    "model.vae.num_res_blocks": Count,
    "model.vae.patch_size": Count | None,
}

#: Where the parts of a model lie: every command that reads weights.
BASE: Mapping[str, Any] = {
    "weights": File | None,
    "revision": Text | None,
    "parts.high_noise": File | None,
    "parts.low_noise": File | None,
    "parts.dense": File | None,
    "parts.vae": File | None,
    "parts.text_encoder": File | None,
    "parts.tokenizer": File | None,
}

LORA: Mapping[str, Any] = {
    "lora.high_noise": Files | None,
    "lora.low_noise": Files | None,
    "lora.dense": Files | None,
    "lora.scale": float | Strengths,
    "lora.alpha": Positive | None,
}
