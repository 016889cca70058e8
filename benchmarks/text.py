"""umT5's encoder as encode.py uses it, beside all texts padded to 512 tokens: python benchmarks/text.py [--pairs 5]

The same transformers.UMT5EncoderModel (random weights, 4 layers, 512 wide, float32, one thread) on 64 captions of 1 to
12 sentences. Ours orders them by their tokens and pads a batch to its longest; the other side takes batches of as many
texts in the order given, padded to 512, as pipelines do. In one process, in turn. First the embeddings of all tokens
are held against each other. Writes text.json.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peers
import result
import torch
from tokenizers import Tokenizer
from torch import Tensor

from wantrain.models import TextEncoder
from wantrain.models.text import TEXT_LENGTH, clean_prompt, read_tokenizer
from wantrain.util import libraries
from wantrain.util.files import write_json

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "wan-tiny" / "tokenizer"
#: Texts of a batch, as encode.py has it.
TOGETHER = 16
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 1280, "num_layers": 4, "num_heads": 8,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
}  # fmt: skip
SENTENCES = (
    "A red square moves left on a light background.", "The camera follows a cyclist through the old town.",
    "It is raining.", "Two children run over a bridge while the sun sets behind the mountains.",
    "A hand turns the page.", "Clouds drift over the bay, and a ferry leaves the harbour.",
)  # fmt: skip


def captions(count: int) -> list[str]:
    """Captions of 1 to 12 sentences, the same each time."""
    draw = random.Random(0)
    return [" ".join(draw.choices(SENTENCES, k=draw.randint(1, 12))) for _ in range(count)]


def lengths(texts: list[str]) -> dict[str, int]:
    """The fewest and the most tokens of a text, and all together."""
    tokenizer = read_tokenizer(TOKENIZER)
    counts = [len(tokenizer.encode(clean_prompt(text)).ids) for text in texts]
    return {"least": min(counts), "most": max(counts), "all": sum(counts)}


def sides(
    model: Any, texts: list[str]
) -> tuple[dict[str, Callable[[], list[Tensor]]], Mapping[str, tuple[float, float]]]:
    """What encodes the texts, ours and padded, embeddings (L, D) in the texts' order; and how far apart both are."""
    encoder = TextEncoder(model, read_tokenizer(TOKENIZER))
    ends = [min(encoder.count(text), TEXT_LENGTH) for text in texts]

    def ours() -> list[Tensor]:
        order = sorted(range(len(texts)), key=ends.__getitem__)
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), TOGETHER):
            batch = order[start : start + TOGETHER]
            found |= zip(batch, encoder.encode_unpadded([texts[place] for place in batch]), strict=True)
        return [found[place] for place in range(len(texts))]

    padded: Tokenizer = read_tokenizer(TOKENIZER)
    padded.enable_padding(length=TEXT_LENGTH, pad_id=encoder.pad)
    padded.enable_truncation(TEXT_LENGTH)

    @torch.no_grad()
    def theirs() -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(texts), TOGETHER):
            rows = padded.encode_batch([clean_prompt(text) for text in texts[start : start + TOGETHER]])
            ids, mask = (
                torch.tensor([getattr(row, name) for row in rows], device=model.device)
                for name in ("ids", "attention_mask")
            )
            found += model(input_ids=ids, attention_mask=mask).last_hidden_state.float().unbind()
        return [row[:end] for row, end in zip(found, ends, strict=True)]

    mine, other = ({"embeddings": torch.cat(run())} for run in (ours, theirs))
    allowed = 1e-5 if model.dtype == torch.float32 else 2e-2  # in bf16 both round, each by up to 1e-2
    return {"ours": ours, "padded": theirs}, {"embeddings": (peers.apart(mine, other)[0], allowed)}


def main() -> None:
    """Compare, time, store."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pairs", type=int, default=5)
    asked.add_argument("--texts", type=int, default=64)
    given = asked.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with libraries.importing():
        from transformers import UMT5Config, UMT5EncoderModel

    texts = captions(given.texts)
    runs, errors = sides(UMT5EncoderModel(UMT5Config(**SIZES)), texts)
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    for number in range(given.pairs):
        for side in runs if number % 2 == 0 else reversed(runs):
            began = time.process_time()
            runs[side]()
            seconds[side].append(time.process_time() - began)
    found = result.record(
        __file__,
        protocol="both in one process, in turn, each pair in the other order",
        shapes={"encoder": SIZES, "texts": given.texts, "tokens": lengths(texts), "batch": TOGETHER},
        cases={f"{given.texts} captions": result.case({"CPU seconds": result.measure("CPU s", seconds)}, errors)},
        libraries=("torch", "transformers", "tokenizers"),
        threads=1,
    )
    write_json(Path(__file__).with_suffix(".json"), found)
    print("\n".join(result.shown(found)))


if __name__ == "__main__":
    main()
