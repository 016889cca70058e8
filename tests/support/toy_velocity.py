"""A velocity model of one matrix with an adapter that can be off, and batches for it: for tests of losses."""

from dataclasses import replace

import torch

from wantrain.batch import Batch

#: Latent frames that are known, of four clips.
KNOWN = torch.tensor([[0.0, 1.0, 1.0]] * 4)
SIZE = (2, 3, 4, 6)  # C, T, H, W


class Toy(torch.nn.Module):
    """A velocity that depends on everything it is given; `adapter` is what training changes, `off` the base."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(2, 2, generator=generator, dtype=torch.float64).to(dtype)
        self.adapter = torch.nn.Parameter((0.3 * torch.randn(2, 2, generator=generator).double()).to(dtype))

    def forward(self, noisy, timestep, text, *, extra=None, off=False):
        weight = self.weight if off else self.weight + self.adapter
        timestep = timestep if timestep.dim() == 2 else timestep[:, None].expand(-1, noisy.shape[2])
        answer = torch.einsum("dc,bcthw->bdthw", weight, noisy) * (1 + timestep / 1000)[:, None, :, None, None]
        answer = answer + text.sum(dim=(1, 2))[:, None, None, None, None]
        return answer if extra is None else answer + extra

    def base(self, *inputs, **keywords):
        with torch.no_grad():
            return self(*inputs, **keywords, off=True)


def clips(seed, size=4, **more):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, *SIZE, generator=generator),
        torch.randn(size, 5, 3, generator=torch.Generator().manual_seed(9)),
        tuple(f"{seed} {i}" for i in range(size)),
        tuple(range(size)),
        **more,
    )


def pairs(**more):
    return replace(clips(1, **more), losers=clips(2, **more))
