"""The VAE's convolutions in fewer multiplications, for a CPU that needs no gradients.

Both are exact identities, so only the rounding differs from the plain convolution. They work frame by frame, so no
layer copies its history and its input into one tensor. Tensors are channels-last, in which oneDNN reads and writes
without reordering.

Tensor suffixes: B batch, C channels, T frames, H W rows and columns.
Source of the two frames at once: Winograd's F(2, 3), in arXiv 1509.09308, here along time only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = ContextVar("plain", default=False)
#: Elements of a kernel at most in one convolution of one frame: oneDNN copies a kernel twice, in other orders.
MOST = 1 << 23


def fits(x: Tensor) -> bool:
    """Whether these forms replace the plain ones for `x`: on a CPU, in full precision, without gradients.

    In bfloat16 the sums of frames and taps would be rounded; a backward pass would keep more than the plain form does;
    and other devices have not been measured.
    """
    full = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    return x.device.type == "cpu" and full and not torch.is_grad_enabled() and not _PLAIN.get()


@contextmanager
def plain_forms() -> Iterator[None]:
    """Inside, a CPU takes the plain forms, as a GPU does: for tracing a GPU's memory."""
    before = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(before)


def causal(frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3x3 convolution of T + 2 `frames` (B, C, H, W) to (B, C', T, H, W), padded in space only.

    Two frames at a time take four 2D convolutions instead of six. Their kernels take turns in one tensor: of many
    channels on small pictures kernels are the largest tensors, and oneDNN copies each once more.
    """
    count = len(frames) - 2
    if count == 1:
        return _plain(frames, weight, bias)
    first, middle, last = weight.unbind(2)
    batch, _, height, width = frames[0].shape
    shape, pairs = (batch, len(weight), count, height, width), range(0, count - 1, 2)
    y = torch.empty(shape, dtype=weight.dtype, memory_format=torch.channels_last_3d)
    kernel = torch.empty(first.shape, dtype=weight.dtype, memory_format=torch.channels_last)
    torch.add(first, last, out=kernel).add_(middle).mul_(0.5)
    for at in pairs:
        both = F.conv2d(frames[at + 1] + frames[at + 2], kernel, bias, padding=1)
        y[:, :, at] = y[:, :, at + 1] = both
    kernel.sub_(middle)
    for at in pairs:
        apart = F.conv2d(frames[at + 2] - frames[at + 1], kernel, padding=1)
        y[:, :, at].add_(apart)
        y[:, :, at + 1].sub_(apart)
    for number, own in enumerate((first, last)):
        kernel.copy_(own)
        for at in pairs:
            outer, inner = frames[at + 3 * number], frames[at + 2 - number]
            y[:, :, at + number].add_(F.conv2d(outer - inner, kernel, padding=1))
    if count % 2:
        y[:, :, -1:] = _plain(frames[-3:], weight, bias)
    return y


def _plain(frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """One frame out of three: nothing to share. The output's channels are in parts where the kernel is large."""
    x = torch.stack(list(frames), dim=2).contiguous(memory_format=torch.channels_last_3d)
    kernels = weight.split(max(1, MOST // weight[0].numel()))
    biases = [None] * len(kernels) if bias is None else bias.split(len(kernels[0]))
    both = zip(kernels, biases, strict=True)
    parts = [F.conv3d(x, kernel, own, padding=(0, 1, 1)) for kernel, own in both]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution, padded, of `x` (N, C, H, W) at twice its size by repeated pixels: (N, C', 2H, 2W).

    Of the nine pixels under the kernel only two by two differ, and which depends on whether row and column are even:
    four convolutions of 2x2 with sums of taps, instead of nine taps for every pixel.
    """
    batch, _, height, width = x.shape
    shape = (batch, len(weight), 2 * height, 2 * width)
    y = torch.empty(shape, dtype=weight.dtype, memory_format=torch.channels_last)
    for row in (0, 1):
        top, middle, bottom = weight.unbind(2)
        rows = (top, middle + bottom) if row == 0 else (top + middle, bottom)
        for column in (0, 1):
            sums = []
            for taps in rows:
                left, centre, right = taps.unbind(2)
                sums.append(torch.stack((left, centre + right) if column == 0 else (left + centre, right), dim=2))
            part = F.conv2d(x, torch.stack(sums, dim=2), bias, padding=1)
            y[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return y
