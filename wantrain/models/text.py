"""TextEncoder: prompts to umT5 embeddings, cleaned, cut and padded as Wan's transformers expect them.

The network is transformers' UMT5EncoderModel. The tokenizer is tokenizer.json as published. The class that a pipeline
folder names for it (T5Tokenizer, T5TokenizerFast) is not used: transformers 5 rebuilds it without byte fallback, and
then rare characters become `<unk>`.

Tensor suffixes: B batch, L tokens, D embedding width.
Source: Wan2.2's use of umT5-xxl (prompt cleaning, 512 tokens, attention mask, zeros after the text).
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from wantrain.batch import pad_texts
from wantrain.util.console import say

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

#: Tokens that every Wan transformer attends to, including the zero rows after a text.
TEXT_LENGTH = 512


def clean_prompt(text: str) -> str:
    """The prompt for the tokenizer: mojibake fixed, HTML entities decoded, runs of white space made one blank.

    ftfy also straightens quotes. Nothing is lower-cased.
    """
    # Twice, because scraped captions contain entities that were escaped twice (&amp;amp;).
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class TextEncoder(nn.Module):
    """Prompts -> embeddings; frozen.

    model      transformers' UMT5EncoderModel in float32 or bfloat16
    tokenizer  ends each text with `</s>`

    A prompt of more than `text_length` tokens is truncated and ends with `</s>`, as in Wan's code, with a message.
    ValueError for a model in float16 and for a tokenizer that does not fit.
    """

    text_length = TEXT_LENGTH

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        check_dtype(model.dtype)
        config: Any = model.config
        self.dim: int = config.d_model
        self.end: int = config.eos_token_id
        self.pad: int = config.pad_token_id
        # A tokenizer.json may contain truncation and padding settings of whoever saved it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_tokenizer(tokenizer, self.end, config.vocab_size)
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    def forward(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, 512, D) in float32 on the model's device, zeros after each text."""
        return pad_texts(self.encode_unpadded(prompts), self.text_length)

    # Not inference_mode: a tensor made there cannot take part in a training step.
    @torch.no_grad()
    def encode_unpadded(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings (L, D) of each prompt, float32, without padding: what is stored. "" has one token."""
        if not prompts:
            return []
        device = self.model.device
        rows = [self.tokenize(prompt) for prompt in prompts]
        # Padding to the longest is enough: with the mask a text's embeddings do not depend on the padding.
        longest = max(len(row) for row in rows)
        ids_BL = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows], device=device)
        mask_BL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        # Without a caller's autocast: under float16 umT5 gives NaN.
        with torch.autocast(device.type, enabled=False):
            embeddings_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
        # Copies, so that a short text does not keep the whole batch in memory.
        return [row_LD[: len(row)].clone() for row_LD, row in zip(embeddings_BLD, rows, strict=True)]

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt, at most `text_length`, the last one `</s>`."""
        ids: list[int] = self.tokenizer.encode(clean_prompt(prompt)).ids
        if (spare := len(ids) - self.text_length) > 0:
            say(f"a prompt of {len(ids)} tokens is cut to {self.text_length} ({spare} lost): {prompt[:60]!r}...")
            ids = [*ids[: self.text_length - 1], self.end]
        return ids

    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]

    def count(self, prompt: str) -> int:
        """Tokens of the cleaned prompt before truncation, including `</s>`."""
        return len(self.tokenizer.encode(clean_prompt(prompt)).ids)


def token_counter(folder: Path) -> Callable[[str], int]:
    """What counts the tokens of a prompt as `TextEncoder.count` does, with the tokenizer in `folder` and no encoder.

    ValueError as `read_tokenizer`.
    """
    tokenizer = read_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda prompt: len(tokenizer.encode(clean_prompt(prompt)).ids)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, from its tokenizer.json; ValueError if it is absent or damaged."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{file} is not there: tokenizer/ (in the official layout google/umt5-xxl/) holds tokenizer.json, as "
            "published with every Wan2.2 model; give its folder as parts.tokenizer=. A spiece.model alone is not read"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error


def _check_tokenizer(tokenizer: Tokenizer, end: int, vocab_size: int) -> None:
    """Raise ValueError unless the tokenizer ends texts with `</s>` and the embedding has a row for each token."""
    if tokenizer.encode("").ids != [end]:
        raise ValueError(f"the tokenizer encodes an empty text as {tokenizer.encode('').ids}, umT5's as [{end}] (</s>)")
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the text encoder {vocab_size}: they belong to "
            "different models"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype in which umT5 overflows."""
    if dtype == torch.float16:
        raise ValueError("the text encoder cannot run in float16 (umT5 overflows to NaN); use bfloat16 or float32")
