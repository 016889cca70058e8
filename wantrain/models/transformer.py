"""WanTransformer: Wan's diffusion transformer, from the paper's figure and the published constants.

One class serves text-to-video and image-to-video: conditioning arrives as further input channels
(`concat_BCTHW`) or as per-frame timesteps. Single-device code: machinery reads the facts that the class declares
(facts.py says which). Parameter names in memory are the official ones; formats/names.py maps them to diffusers'.

Tensor suffixes: B batch, C channels, T latent frames, H W latent rows and columns, P tokens of one frame,
L = T*P tokens, S text rows, D model width, N heads, K head width (rotary tables: K/2).

Where Wan computes in float32 the cast is on the line: time embedding, modulation, norms, rotary embedding, residual
stream and head. Linear layers run in the dtype of autocast, or of their weights without autocast.
Sources: Wan report (arXiv 2503.20314) section 4.2; Wan2.2's released constants and layer names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrain.geometry import PATCH
from wantrain.models.attention import DEFAULT, Attend
from wantrain.models.facts import BlockRunner, SequencePlan, Split, Tags
from wantrain.models.feed_forward import FeedForward, gated_feed_forward
from wantrain.models.fused import gated_residual, modulated_norm, norm_rotate
from wantrain.models.inputs import grid_of, patches_of, stacked_texts, text_rows, unpatched
from wantrain.models.kept_text import KeptRows, KeptText, for_blocks
from wantrain.models.linear import linears
from wantrain.models.packing import Packing
from wantrain.models.positions import ROPE_LENGTH, rope_angles, sinusoid

#: A tensor for each group of clips of one size.
Groups = tuple[Tensor, ...]
#: A tensor, or Groups: mypy cannot say that all inputs and the output are alike in this.
Input = Any


class RMSNorm(nn.Module):
    """x / rms(x) * weight over all heads together, then rotary embedding, in float32; heads, in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLD: Tensor, heads: int, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        return norm_rotate(x_BLD, self.weight.float(), self.eps, heads, rope)


class LayerNorm(nn.Module):
    """Layer norm of the residual stream with a weight and a bias, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BTPD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `modulated_norm`."""
        weight, bias = (row.float().expand(1, 1, -1) for row in (self.weight, self.bias))
        return modulated_norm(x_BTPD, weight, bias, self.eps, dtype)


class Attention(nn.Module):
    """Multi-head attention with q and k normalised over the whole width, before they are split into heads."""

    def __init__(self, dim: int, num_heads: int, eps: float, attend: Attend) -> None:
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(
        self,
        x_BLD: Tensor,
        context_BSD: Tensor | KeptRows,
        rope: tuple[Tensor, Tensor] | None = None,
        bias_S: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        if isinstance(context_BSD, KeptRows):
            (q,) = linears((self.q,), x_BLD)
            q, (k, v) = self.norm_q(q, self.num_heads, rope), context_BSD.keys_values(self.keys_values)
        else:
            if x_BLD is context_BSD:
                q, k, v = linears((self.q, self.k, self.v), x_BLD)
            else:
                (q,), (k, v) = linears((self.q,), x_BLD), linears((self.k, self.v), context_BSD)
            # Keys are turned by `rope`, also where ZeRO-3's hooks have made two tensors of one.
            q, k = self.norm_q(q, self.num_heads, rope), self.norm_k(k, self.num_heads, rope)
            v = v.unflatten(-1, (self.num_heads, -1))
        result = self.attend(q, k, v, bias_S) if packing is None else packing.attend(self.attend, q, k, v, bias_S)
        return linears((self.o,), result.flatten(-2))[0]

    def keys_values(self, context_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, N, K) of rows without places."""
        k, v = linears((self.k, self.v), context_BSD)
        return self.norm_k(k, self.num_heads, None), v.unflatten(-1, (self.num_heads, -1))


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """A table (1, rows, dim) of N(0, 1) / sqrt(dim); on the meta device not drawn, which saves a second of imports."""
    table = torch.empty(1, rows, dim)
    if table.device.type != "meta":
        table.normal_().div_(math.sqrt(dim))
    return nn.Parameter(table)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last shifted, scaled and gated by time.

    The residual stream is float32 (B, T, P, D); modulation is one row per latent frame, never per token. Clips of
    different sizes are one sequence (1, 1, L, D), with (1, R, 6, D) rows of modulation: `packing` says whose they are.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, attend: Attend) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = modulation_table(6, dim)
        self.self_attn = Attention(dim, num_heads, eps, attend)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, num_heads, eps, attend)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(
        self,
        x_BTPD: Tensor,
        time_BT6D: Tensor,
        context_BSD: Tensor | KeptRows,
        rope: tuple[Tensor, Tensor],
        bias_S: Tensor | None,
        packing: Packing | None = None,
    ) -> Tensor:
        """`rope` are the cosines and sines of the tokens' angles, (T, P, K) each."""
        dtype, rows = context_BSD.dtype, None if packing is None else packing.rows
        cos_LK, sin_LK = (table_TPK.flatten(0, 1) for table_TPK in rope)
        # (1, 6, D) + (B, T, 6, D), then each (B, T, D): one row for all tokens of a frame.
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time_BT6D).unbind(2)

        x, y = modulated_norm(x_BTPD, 1 + scale1, shift1, self.eps, dtype, rows)
        x = gated_residual(x, self.self_attn(y, y, (cos_LK, sin_LK), packing=packing), gate1, rows)
        x, y = self.norm3(x, dtype)
        x = x + self.cross_attn(y, context_BSD, bias_S=bias_S, packing=packing).view_as(x)
        x, y = modulated_norm(x, 1 + scale2, shift2, self.eps, dtype, rows)
        return gated_feed_forward(self.ffn, x, y, gate2, rows)


class Head(nn.Module):
    """Last norm, modulated by the time embedding, and the projection to patches; all float32."""

    def __init__(self, dim: int, patch_dim: int, eps: float) -> None:
        super().__init__()
        self.modulation = modulation_table(2, dim)
        self.eps = eps
        self.head = nn.Linear(dim, patch_dim)

    def forward(self, x_BTPD: Tensor, time_BTD: Tensor, packing: Packing | None = None) -> Tensor:
        shift, scale = (self.modulation.float() + time_BTD[:, :, None]).unbind(2)
        rows = None if packing is None else packing.rows
        return self.head(modulated_norm(x_BTPD, 1 + scale, shift, self.eps, torch.float32, rows)[1].view_as(x_BTPD))


@dataclass(eq=False, repr=False, kw_only=True)
class WanTransformer(nn.Module):
    """Predicts the velocity noise - data of video latents, given a timestep and a text.

    Keywords are the names and units of the published config.json (diffusers layout): `in_channels` counts latent,
    mask and image channels together (16 for text-to-video). ValueError for an option that no Wan2.2 model uses.
    """

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    eps: float = 1e-6

    packs: ClassVar[bool] = True
    repeated_blocks: ClassVar[tuple[str, ...]] = ("blocks",)
    fp32_parts: ClassVar[tuple[str, ...]] = (
        "time_embedding",
        "time_projection",
        "modulation",
        "norm3",
        "norm_",
        "head.",
    )
    zero_at_start: ClassVar[tuple[str, ...]] = ("bias", "head.head.weight")
    # "all" are those that forward calls as modules; the patch embedding is none of them (`_embedded` multiplies by the
    # convolution's weight), so an adapter beside it would have no effect.
    adapter_targets: ClassVar[dict[str, str]] = {
        "attention": r".*(self_attn|cross_attn)\.(q|k|v|o)",
        "attention+ffn": r".*((self_attn|cross_attn)\.(q|k|v|o)|ffn\.(0|2))",
        "all": r".*",
    }
    # The norms of q and k belong to the attention too. The projection of time to the blocks' modulations belongs to
    # `time_embedding`, the head's own modulation to `head`.
    tags: ClassVar[Tags] = Tags(
        inside={
            "attention": r"(self|cross)_attn\..+",
            "self_attn": r"self_attn\..+",
            "cross_attn": r"cross_attn\..+",
            "ffn": r"ffn\..+",
            "modulation": r"modulation",
            "norm": r"norm3\..+|(self|cross)_attn\.norm_[qk]\..+",
        },
        outside={
            "text_embedding": r"text_embedding\..+",
            "time_embedding": r"time_(embedding|projection)\..+",
            "patch_embedding": r"patch_embedding\..+",
            "head": r"head\..+",
        },
    )
    # The tokens of each latent frame (P) are split, so that modulation, one row per frame, is whole everywhere.
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(
        split=(Split("blocks.0", 2, "x_BTPD"), Split("blocks.*", 1, "rope")),
        gather=(Split("head", 2),),
        attend=("blocks.*.self_attn",),
    )

    def __post_init__(self) -> None:
        super().__init__()
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim={self.attention_head_dim} must be even: rotary pairs")
        self.dim = dim = self.num_attention_heads * self.attention_head_dim
        self.run_block = BlockRunner()

        self.patch_embedding = nn.Conv3d(self.in_channels, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(self.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(self.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, self.ffn_dim, self.num_attention_heads, self.eps, DEFAULT.attend) for _ in range(self.num_layers)
        )
        self.head = Head(dim, math.prod(PATCH) * self.out_channels, self.eps)
        if self.patch_embedding.weight.device.type != "meta":  # about to be loaded: a second saved per load
            self.initialize()

    def initialize(self) -> None:
        """Start values for training from scratch; the head starts at zero, so the first prediction is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)
        nn.init.zeros_(self.head.head.weight)

    def expand_input_channels(self, in_channels: int) -> None:
        """Take further input channels, with weights of zero: the function stays what it is until they are trained.

        So an image-to-video model starts from a text-to-video one. ValueError if it has more channels than that.
        """
        old = self.patch_embedding
        more = in_channels - old.in_channels
        if more < 0:
            raise ValueError(f"a transformer of {old.in_channels} input channels cannot be made one of {in_channels}")
        weight = old.weight.detach()
        new = nn.Conv3d(in_channels, old.out_channels, PATCH, PATCH, device=weight.device, dtype=weight.dtype)
        new.weight = nn.Parameter(torch.cat([weight, weight.new_zeros(len(weight), more, *PATCH)], dim=1))
        new.bias = old.bias
        self.patch_embedding, self.in_channels = new, in_channels

    def forward(
        self,
        latents_BCTHW: Input,
        timestep: Input,
        text_BLD: Input,
        *,
        concat_BCTHW: Input | None = None,
    ) -> Input:
        """Velocity (B, out_channels, T, H, W), float32.

        latents_BCTHW    noisy latents; H and W even
        timestep         (B,), or (B, T) with one level per latent frame; 1000*sigma, float, never rounded
        text_BLD         text embeddings, padded inside to `text_length` rows with zeros; longer is a ValueError. Or a
                         KeptText, for calls that repeat it
        concat_BCTHW     further input channels, after the latents'

        Each may be a tuple with a tensor for each group of clips of one size: all are computed as one sequence, and the
        velocity is such a tuple. Groups give what they would give alone.
        """
        if isinstance(latents_BCTHW, tuple):
            return self._packed(latents_BCTHW, timestep, text_BLD, concat_BCTHW)
        # 1. conditioning: further channels
        x = latents_BCTHW if concat_BCTHW is None else torch.cat([latents_BCTHW, concat_BCTHW], dim=1)
        grid = grid_of(x, timestep, self.in_channels)
        # 2. patches
        x_BTPD = self._embedded(patches_of(x))
        # 3. time, once per latent frame (one for all frames where they agree)
        time = self._time(timestep[:, None] if timestep.ndim == 1 else timestep)
        # 4. rotary angles
        angles_TPK = rope_angles(grid, self.attention_head_dim, x.device).unflatten(0, (grid[0], -1))
        # 5. text, 6. blocks, 7. head
        patches = self._computed(x_BTPD, time, text_BLD, angles_TPK)
        # 8. patches back to a latent
        return unpatched(patches, grid, self.out_channels)

    def _packed(self, latents: Groups, timesteps: Groups, texts: Groups, concats: Groups | None) -> Groups:
        """`forward` of groups: the same steps, each group's own before and after the blocks."""
        if len(latents) == 1:
            return (
                WanTransformer.forward(self, latents[0], timesteps[0], texts[0], concat_BCTHW=concats and concats[0]),
            )
        if concats is not None:
            latents = tuple(torch.cat(both, dim=1) for both in zip(latents, concats, strict=True))
        grids = [grid_of(x, timestep, self.in_channels) for x, timestep in zip(latents, timesteps, strict=True)]
        packing = Packing.of(grids, timesteps)
        x_11LD = self._embedded(torch.cat([patches_of(x).flatten(0, 2) for x in latents])[None, None])
        time = self._time(torch.cat([timestep.flatten() for timestep in timesteps])[None])
        angles = [
            rope_angles(grid, self.attention_head_dim, x_11LD.device).repeat(clips, 1)
            for grid, (clips, _) in zip(grids, packing.groups, strict=True)
        ]
        patches = self._computed(x_11LD, time, stacked_texts(texts), torch.cat(angles)[None], packing)
        parts = zip(packing.split(patches[0, 0]), grids, strict=True)
        return tuple(unpatched(part.unflatten(1, (grid[0], -1)), grid, self.out_channels) for part, grid in parts)

    def _computed(
        self,
        x_BTPD: Tensor,
        time: tuple[Tensor, Tensor],
        text_BLD: Tensor | KeptText,
        angles_TPK: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """The head's patches (B, T, P, 2*2*C), from embedded patches, `_time`, texts and rotary angles."""
        time_BTD, time_BT6D = time
        contexts, bias_S = for_blocks(text_BLD, self._context, len(self.blocks))
        rope = (angles_TPK.cos().float(), angles_TPK.sin().float())
        packed = () if packing is None else (packing,)
        for number, (block, context) in enumerate(zip(self.blocks, contexts, strict=True)):
            x_BTPD = self.run_block(number, block, x_BTPD, time_BT6D, context, rope, bias_S, *packed)
        with torch.autocast(x_BTPD.device.type, enabled=False):
            patches: Tensor = self.head(x_BTPD, time_BTD, *packed)
        return patches

    def _context(self, text_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text: its rows, and the zero rows after it, which become bias vectors that are attended to."""
        text_BSD, bias_S = text_rows(text_BLD, self.text_length)
        return self.text_embedding(text_BSD.to(self._compute_dtype())), bias_S

    def _compute_dtype(self) -> torch.dtype:
        """The dtype linear layers run in: autocast's, or the weights' own."""
        weight = self.patch_embedding.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def _embedded(self, patches_BTPC: Tensor) -> Tensor:
        """(B, T, P, D) float32: each patch through one linear map (the convolution's own weights)."""
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        return F.linear(patches_BTPC.to(self._compute_dtype()), weight, bias).float()

    def _time(self, timestep_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding (B, T, D) and its six modulations (B, T, 6, D), float32."""
        with torch.autocast(timestep_BT.device.type, enabled=False):
            embedding = self.time_embedding(sinusoid(timestep_BT, self.freq_dim))
            return embedding, self.time_projection(embedding).unflatten(-1, (6, -1))

    def config(self) -> dict[str, Any]:
        """What config.json holds in the diffusers layout."""
        return {
            "_class_name": "WanTransformer3DModel",
            "patch_size": list(PATCH),
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": self.eps,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": ROPE_LENGTH,
            "pos_embed_seq_len": None,
        }
