"""attend(): softmax attention behind one function, so that a backend is chosen in one place.

No mask exists here on purpose: Wan attends to all tokens and to all 512 text rows, and even an all-True mask would
cost a GPU its fast kernel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over heads N of width K; queries L, keys S. Returns (B, L, N, K)."""
    out_BNLK = F.scaled_dot_product_attention(q_BLNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2))
    return out_BNLK.transpose(1, 2)
