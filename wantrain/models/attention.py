"""Softmax attention. A model is built with one of `BACKENDS`; its layers call that function and choose nothing.

Nothing is ever masked: Wan attends to all tokens and to all 512 text rows, so self-attention, where nearly all the
work is, takes the fastest kernel. Text rows may be weighted: n equal keys count as one whose logit is raised by ln n.

Tensor suffixes: B batch, L queries, S keys, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: softmax(q k^T / sqrt(K) + bias) v of q (B, L, N, K), k and v (B, S, N, K) and bias (S,) or None -> (B, L, N, K).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention: it takes the fastest kernel that the device has (cuDNN's, flash)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    bias = None if bias_S is None else bias_S.to(q.dtype).expand(1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def plain(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
    """The formula in float32, written out, as a reference. It keeps all L x S logits, so it is for small sizes only."""
    with torch.autocast(q_BLNK.device.type, enabled=False):
        logits_BNLS = torch.einsum("blnk,bsnk->bnls", q_BLNK.float(), k_BSNK.float()) * q_BLNK.shape[-1] ** -0.5
        if bias_S is not None:
            logits_BNLS = logits_BNLS + bias_S.float()
        return torch.einsum("bnls,bsnk->blnk", logits_BNLS.softmax(dim=-1), v_BSNK.float()).to(v_BSNK.dtype)


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "plain": plain}
DEFAULT = "sdpa"


def attention_backend(name: str) -> Attend:
    """The backend called `name`. ValueError for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f"model.transformer.attention={name} is unknown; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
