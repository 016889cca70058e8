"""Make the tiny pipeline's tokenizer and text encoder: python assets/make_tiny_text_encoder.py [FOLDER]

The encoder is a umT5 of random values, never trained: what a tiny transformer needs of it is that different words give
clearly different embeddings, always the same ones, in the published format. The tokenizer has whole words for captions
of simple scenes, single characters for the rest of English, and bytes for everything else, so no text is unknown.
Every run writes the same bytes.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from wantrain.models.formats.weights import write_part

SPECIAL = ("<pad>", "</s>", "<unk>")  # umT5's ids 0, 1, 2
ENGLISH = """
    a an the and or of on in over with from to at by is its one two
    red green blue yellow orange purple cyan magenta white black pink gray grey brown
    circle square triangle diamond star ring cross bar heart shape ball box
    small large big tiny plain dark light bright solid gradient
    moving moves move drifts slides travels rotating growing
    left right up down upward downward upwards downwards
    still static standing stays rests resting stands slowly quickly slow fast
    background video image photo picture scene clip animation camera shot frame center
    A An The
"""
CHINESE = """
    红色 绿色 蓝色 黄色 橙色 紫色 青色 品红色 白色 黑色 粉色 灰色 棕色
    圆形 正方形 方形 三角形 菱形 五角星 星形 圆环 环形 十字 十字形 长条 心形 形状
    向左 向右 向上 向下 移动 静止 停留 缓慢 快速 背景 深色 浅色 纯色 渐变 视频 图片 画面 镜头 一个 一张 一段 一颗
    的 在 上 下 左 右 中 小 大 是 着 从 到 和 一 动 色 形 。 、
"""
CHARACTERS = string.ascii_letters + string.digits + string.punctuation

ENCODER = {
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 128,
    "num_layers": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def make_tokenizer() -> Tokenizer:
    """A Unigram tokenizer in umT5's manner; see the head of this file."""
    # The scores make any whole word win over spelling it, and spelling over bytes: a text that really contains
    # "<0x41>" is spelled, not taken for the byte.
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    pieces += [("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in dict.fromkeys(ENGLISH.split())]
    pieces += [(word, -2.0) for word in dict.fromkeys(CHINESE.split())]
    pieces += [(character, -8.0) for character in CHARACTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and what transformers wants beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # Not T5TokenizerFast: transformers 5 would rebuild that one from the vocabulary, without byte fallback.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_weights(vocab_size: int, seed: int = 0) -> dict[str, Tensor]:
    """Random values under transformers' names, bfloat16.

    Embeddings have unit variance and each sub-layer adds about a third of that, so a word's own embedding dominates
    what comes out and its neighbours colour it.
    """
    random = torch.Generator().manual_seed(seed)
    d, inner, ff = ENCODER["d_model"], ENCODER["num_heads"] * ENCODER["d_kv"], ENCODER["d_ff"]

    def normal(rows: int, columns: int, gain: float) -> Tensor:
        return torch.randn(rows, columns, generator=random) * gain / columns**0.5

    weights = {"shared.weight": torch.randn(vocab_size, d, generator=random)}
    for layer in range(int(ENCODER["num_layers"])):
        attention, feed = f"encoder.block.{layer}.layer.0", f"encoder.block.{layer}.layer.1"
        # umT5 does not divide q.k by the root of d_kv; here that factor is in q.
        weights[f"{attention}.SelfAttention.q.weight"] = normal(inner, d, ENCODER["d_kv"] ** -0.5)
        weights[f"{attention}.SelfAttention.k.weight"] = normal(inner, d, 1.0)
        weights[f"{attention}.SelfAttention.v.weight"] = normal(inner, d, 1.0)
        weights[f"{attention}.SelfAttention.o.weight"] = normal(d, inner, 0.7)
        buckets = torch.randn(
            int(ENCODER["relative_attention_num_buckets"]), int(ENCODER["num_heads"]), generator=random
        )
        weights[f"{attention}.SelfAttention.relative_attention_bias.weight"] = buckets
        weights[f"{attention}.layer_norm.weight"] = torch.ones(d)
        weights[f"{feed}.DenseReluDense.wi_0.weight"] = normal(ff, d, 1.0)
        weights[f"{feed}.DenseReluDense.wi_1.weight"] = normal(ff, d, 1.0)
        weights[f"{feed}.DenseReluDense.wo.weight"] = normal(d, ff, 0.6)
        weights[f"{feed}.layer_norm.weight"] = torch.ones(d)
    weights["encoder.final_layer_norm.weight"] = torch.ones(d)
    return {key: value.to(torch.bfloat16) for key, value in weights.items()}


def encoder_config(vocab_size: int) -> dict[str, Any]:
    """What UMT5EncoderModel.from_pretrained reads."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocab_size,
        **ENCODER,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        # The file holds bfloat16 to be small; whoever goes by this entry computes in float32.
        "dtype": "float32",
    }


def main(folder: Path) -> None:
    """Write FOLDER/tokenizer and FOLDER/text_encoder."""
    tokenizer = make_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    write_tokenizer(tokenizer, folder / "tokenizer")
    weights, config = make_weights(vocab_size), encoder_config(vocab_size)
    write_part(folder / "text_encoder", config, weights, name="model")
    numbers = sum(tensor.numel() for tensor in weights.values())
    print(f"{folder}: {vocab_size} tokens, text encoder of {numbers} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "wan-tiny")
