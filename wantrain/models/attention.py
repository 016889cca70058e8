"""attend(): softmax attention behind one function, so that a backend is chosen in one place.

Nothing is ever masked: Wan attends to all tokens and to all 512 text rows. Self-attention, where nearly all the work
is, therefore takes the fastest kernel. Keys of the text may be weighted: n equal ones count as one whose logit is
raised by ln n.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, bias_S: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v over heads N of width K; queries L, keys S. Returns (B, L, N, K)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    bias = None if bias_S is None else bias_S.to(q.dtype).expand(1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
