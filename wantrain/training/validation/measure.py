"""What validation measures: fixed clips, fixed noises and fixed noise levels, read by any number of processes alike.

A forward holds one clip and some of its noise levels, never other clips: so what it computes, and the memory that it
takes, depend neither on how the clips were bucketed nor on how many processes share them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from wantrain import flow
from wantrain.batch import BaseBatch, Batch, uploaded
from wantrain.losses import Model
from wantrain.losses.flow_matching import velocity_error
from wantrain.training.engine.engine import Stepper
from wantrain.util.progress import report_progress
from wantrain.util.seeds import generator_at

B = TypeVar("B", bound=BaseBatch)


@dataclass(frozen=True)
class Clips:
    """Clips to measure: one batch, file and set of tags for each."""

    batches: Sequence[Batch]
    files: Sequence[int]
    tags: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def ids(self) -> list[str]:
        """Their names."""
        return [batch.ids[0] for batch in self.batches]


def one_by_one(batches: Sequence[B]) -> list[B]:
    """Each clip of some batches as a batch of its own."""
    return [batch.take([number]) for batch in batches for number in range(len(batch))]


@dataclass(frozen=True)
class Evaluator:
    """Errors of a model at fixed noise levels, with noise that is a function of each clip's name.

    sigmas      the noise levels, (P,): midpoints of equal slices of the distribution that is trained on
    together    levels of a clip in one forward
    error       (model, batch, sigma, noise) -> errors (B,): the loss's own, or the squared velocity error
    weight      batch -> weights of latent cells that `error` goes by, or None: the noised frames alike
    about       what these weights are, for people
    """

    stepper: Stepper
    sigmas: Tensor
    seed: int
    together: int = 1
    error: Callable[[Model, Batch, Tensor, Tensor], Tensor] = velocity_error
    weight: Callable[[Batch], Tensor | None] = lambda batch: None
    about: str = ""

    def errors(self, clips: Sequence[Batch]) -> Tensor:
        """Error of each clip at each level, (N, P) float64, the same in every process."""
        with torch.no_grad(), self.stepper.forward_context():
            found = over_ranks(clips, self._errors, self.stepper)
        self.stepper.part()
        return found

    def seconds(self, clip: Batch) -> float:
        """Seconds of a clip at all levels, after once to warm the device up. Every process takes part."""
        for _ in range(2):
            began = time.perf_counter()
            self.errors([clip])  # errors lie on the host, so the device is done
        return time.perf_counter() - began

    def linear(self, clips: Sequence[Batch]) -> Tensor:
        """Error of v = a(sigma) * x_sigma at each level, (P,), with the a that is best on all these clips together."""
        cross, noisy_power, target_power = over_ranks(clips, self._moments, self.stepper).mean(dim=0).unbind(1)
        return target_power - cross**2 / noisy_power

    def _errors(self, clip: Batch) -> Tensor:
        """(P,) of one clip."""
        here, noises, found = clip.to(self.stepper.device), self._noises(clip), []
        for levels in self.sigmas.split(self.together):
            noise = uploaded(torch.stack([next(noises) for _ in levels]), self.stepper.device)
            found.append(self.error(self.stepper.module, here.take([0] * len(levels)), levels, noise))
        return torch.cat(found).double()

    def _moments(self, clip: Batch) -> Tensor:
        """(P, 3) of one clip: mean products of noised latent and velocity, of each with the other and itself."""
        x0, found = clip.latents_BCTHW, []
        # Of the clip only what counts in the error above.
        weight_BTHW = self.weight(clip)
        if weight_BTHW is None:
            noised_BT = torch.ones(1, x0.shape[2]) if clip.noised_BT is None else clip.noised_BT
            weight_BTHW = noised_BT[:, :, None, None].expand(1, *x0.shape[2:])
        weight = (weight_BTHW.double() / (weight_BTHW.double().sum() * x0.shape[1]))[:, None]
        for level, noise in zip(self.sigmas, self._noises(clip), strict=False):
            noisy = flow.path(x0, noise[None], flow.noised(level[None], clip.noised_BT)).double()
            target = flow.velocity(x0, noise[None]).double()
            terms = (noisy * target, noisy * noisy, target * target)
            found.append(torch.stack([(weight * term).sum() for term in terms]))
        return uploaded(torch.stack(found), self.stepper.device)

    def _noises(self, clip: Batch) -> Iterator[Tensor]:
        """A clip's noise for each level, in order."""
        generator = generator_at(self.seed, "validation", clip.ids[0])
        shape = clip.latents_BCTHW.shape[1:]
        return (torch.randn(shape, generator=generator) for _ in self.sigmas)


def over_ranks(clips: Sequence[B], measure: Callable[[B], Tensor], stepper: Stepper) -> Tensor:
    """`measure` of each clip, stacked on the CPU in the clips' order; every process gets all, having measured a share.

    Processes that share tokens measure the same clips. Where the clips do not divide by the others, some measure a clip
    that another has too: under engines that cut the weights up all of them must call the model equally often.
    """
    ranks = stepper.data_ranks
    rounds, mine = math.ceil(len(clips) / ranks.count), []
    for turn in range(rounds):
        report_progress(f"measuring clip {turn + 1} of {rounds}")
        mine.append(measure(clips[(turn * ranks.count + ranks.rank) % len(clips)]))
    parts = ranks.once(stepper.gather(torch.stack(mine))).unflatten(0, (ranks.count, rounds))
    return parts.transpose(0, 1).flatten(0, 1)[: len(clips)].cpu()
