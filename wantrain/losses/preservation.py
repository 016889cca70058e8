"""Prior preservation through the base: what an adapter answers to class prompts stays near what its base answers.

The base is the model with its adapter off, so there is no second model and there are no further clips. The term is
computed at the very noised latents that the loss trains on; only the prompt is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain.batch import Batch, pad_texts
from wantrain.losses.record import ClipValidation, Draws, Loss, LossFunction, Model, NoiseLevelValidation

#: What a preserving loss adds to its draws: the number of each sample's class prompt.
PROMPT = "class prompt"


class Preserving(LossFunction):
    """A loss, and beside it the squared difference from the base under class prompts.

    inner    the loss itself, which calls its model once
    weight   of the difference, a mean over elements like the velocity error
    prompts  class prompts, one of which is drawn for each sample; "" is the empty caption
    """

    def __init__(self, inner: LossFunction, *, weight: float, prompts: Sequence[str]) -> None:
        assert weight > 0 and prompts
        self.inner, self.weight, self.prompts = inner, weight, tuple(dict.fromkeys(prompts))
        self.networks = tuple(dict.fromkeys((*inner.networks, "base")))
        self.window, self.mass = inner.window, inner.mass
        self.rows, self.base_rows = 2 * inner.rows, inner.base_rows + inner.rows

    def attach(self, networks: Any, texts: Any = None) -> None:
        """As in `LossFunction`; the inner loss is given the same."""
        super().attach(networks, texts)
        self.inner.attach(networks, texts)
        self.embeddings_NLD = pad_texts([self.texts[prompt].float() for prompt in self.prompts])

    @property
    def core(self) -> LossFunction:
        """The inner loss."""
        return self.inner.core

    @property
    def validation(self) -> NoiseLevelValidation | ClipValidation | None:
        """That of the inner loss."""
        return self.inner.validation

    def prepare(self, batch: Batch, generators: Sequence[torch.Generator]) -> Draws:
        """What the inner loss draws, and after it each sample's class prompt."""
        draws = self.inner.prepare(batch, generators)
        chosen = torch.cat([torch.randint(len(self.prompts), (1,), generator=generator) for generator in generators])
        return draws.with_more(PROMPT, chosen)

    def __call__(self, model: Model, batch: Batch, draws: Draws) -> Loss:
        """The inner loss and the difference, from one forward with the adapter and one of the base without gradients.

        The prompts of the batch and the class prompts are one batch: under engines that reduce gradients inside the
        backward a step must not call the model twice.
        """
        differences: list[Tensor] = []

        def both(noisy: Tensor, timestep: Tensor, text: Tensor, **conditioning: Tensor) -> Tensor:
            prompts = self._texts(draws.more[PROMPT], like=text)
            base = self.attached["base"](noisy, timestep, prompts, **conditioning)
            longest = max(text.shape[1], prompts.shape[1])
            texts = torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in (text, prompts)])
            twice = {name: torch.cat([tensor] * 2) for name, tensor in conditioning.items()}
            answers = model(torch.cat([noisy] * 2), torch.cat([timestep] * 2), texts, **twice)
            answer, kept = answers.chunk(2)
            differences.append(_difference(kept, base, batch.noised_BT))
            return answer

        loss = self.inner(both, batch, draws)
        (difference,) = differences
        return loss.with_term("preserved", self.weight, difference.mean())

    def _texts(self, chosen: Tensor, *, like: Tensor) -> Tensor:
        """The class prompts of a batch (B, L, D); where the inner loss repeats its samples, so often."""
        self.embeddings_NLD = self.embeddings_NLD.to(like.device)
        texts = self.embeddings_NLD[chosen.to(like.device)]
        return torch.cat([texts] * (len(like) // len(texts)))


def _difference(kept: Tensor, base: Tensor, noised_BT: Tensor | None) -> Tensor:
    """Mean squared difference of each sample over its noised frames, (B,) float32; rows may repeat the samples."""
    frames_BT = (kept.float() - base.float()).square().mean(dim=(1, 3, 4))
    if noised_BT is None:
        return frames_BT.mean(dim=1)
    noised_BT = torch.cat([noised_BT] * (len(frames_BT) // len(noised_BT)))
    return (frames_BT * noised_BT).sum(dim=1) / noised_BT.sum(dim=1)
