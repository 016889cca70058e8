"""Tiny vision-language models with random weights, in the layouts of published ones: nothing is downloaded.

`write_qwen2` is a Qwen2.5-VL and `write_qwen3` a Qwen3-VL, which take videos and whose processors need torchvision;
`write_llava` is a LLaVA, which takes pictures only and needs none.
"""

import importlib.util
import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<image>",
)  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for piece in message['content'] %}"
    "{% if piece['type'] == 'image' %}IMAGE{% elif piece['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ piece['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder, chat):
    """Letters as tokens, and Qwen's special tokens; ids of the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="right"
    )
    fast.chat_template = chat
    fast.save_pretrained(folder)
    return fast, vocab


def has_torchvision():
    """True if torchvision can be imported. One that was built for CUDA lacks its operators beside a torch without; the
    parts that transformers uses need none, so two of them are declared."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        has_torchvision.library = library
        import torchvision  # noqa: F401
    return True


def write_qwen2(folder: Path) -> Path:
    """A Qwen2.5-VL of 40 thousand parameters."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer, ids = write_tokenizer(folder, chat)
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=sizes), tokenizer, Qwen2VLVideoProcessor(size=sizes, cap_pixels_per_frame=False),
        chat_template=chat,
    ).save_pretrained(folder)  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return write_model(Qwen2_5_VLForConditionalGeneration, config, folder)


def write_qwen3(folder: Path) -> Path:
    """A Qwen3-VL, whose prompts name the seconds of the frames."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer, ids = write_tokenizer(folder, chat)
    sizes, patch = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}, {"patch_size": 16}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=sizes, **patch), tokenizer, Qwen3VLVideoProcessor(size=sizes), chat_template=chat
    ).save_pretrained(folder)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    return write_model(Qwen3VLForConditionalGeneration, config, folder)


def write_llava(folder: Path) -> Path:
    """A LLaVA of 40 thousand parameters."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    chat = CHAT.replace("IMAGE", "<image>")
    tokenizer, ids = write_tokenizer(folder, chat)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)  # fmt: skip
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
        },
        image_token_index=ids["<image>"], vision_feature_select_strategy="default", vision_feature_layer=-1,
        image_seq_length=4,
    )  # fmt: skip
    return write_model(LlavaForConditionalGeneration, config, folder)


def write_model(kind, config, folder):
    """Random weights, large enough that an answer depends on what is seen."""
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [kind.__name__]
    return folder
