"""Flow-DPO: of two samples of a prompt the better one is learned against the worse one.

Direct preference optimisation in the form of rectified flow (arXiv 2311.12908 for diffusion, 2501.13918 for flow). With
e(x) the velocity error at one noise level and noise, and the base the model with its adapter off:

    margin = (e_base(winner) - e(winner)) + (e(loser) - e_base(loser))
    loss   = softplus(-beta / 2 * margin)

A margin grows as well where the loser is unlearned as where the winner is learned, and a model may get worse at both:
the loss therefore reports the winner's error over the base's, which safeguards watch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrain import flow
from wantrain.batch import Batch, PackedBatch, joined
from wantrain.losses.flow_matching import FlowMatching, velocity_error
from wantrain.losses.record import Draws, Loss, Model
from wantrain.losses.shifts import ShiftByTokens


class Preference(FlowMatching):
    """Flow-DPO on pairs, drawn at the noise levels of the velocity loss.

    Winner and loser share prompt, noise level and noise. Errors are means over elements, so that beta does not depend
    on a clip's size.

    beta    how steep the loss is in the margin: at 1 / (beta / 2) above 0 a pair pulls with 0.27 instead of 0.5
    cap     value of beta / 2 * margin above which a pair no longer pulls; null: it pulls ever less, and never stops
    anchor  weight of the winner's own velocity error beside it, against a winner that gets worse
    density, shift, low, high, min_sigma, max_sigma, stratified, batch_size, seed  as in `FlowMatching`
    """

    packs = False
    networks = ("base",)
    rows = 2
    base_rows = 2

    def __init__(
        self,
        *,
        beta: float = 500.0,
        cap: float | None = 3.0,
        anchor: float = 0.0,
        density: str | flow.Density = "uniform",
        shift: float | ShiftByTokens = 1.0,
        low: float = 0.0,
        high: float = 1.0,
        min_sigma: float | None = None,
        max_sigma: float | None = None,
        stratified: bool = False,
        batch_size: int | None = 1,
        seed: int = 0,
    ) -> None:
        for name, value in {"beta": beta, "cap": cap}.items():
            if value is not None and not value > 0:
                raise ValueError(f"loss.{name}={value} must be above 0")
        if not anchor >= 0:
            raise ValueError(f"loss.anchor={anchor} must be 0 or above")
        super().__init__(
            density=density,
            shift=shift,
            low=low,
            high=high,
            min_sigma=min_sigma,
            max_sigma=max_sigma,
            stratified=stratified,
            batch_size=batch_size,
            seed=seed,
        )
        self.beta, self.cap, self.anchor = beta, cap, anchor

    def __call__(self, model: Model, batch: Batch | PackedBatch, draws: Draws) -> Loss:
        """Loss of one batch of pairs. The two samples of a pair go through the model together."""
        assert draws.sigma is not None and isinstance(draws.noise_BCTHW, Tensor), "made by `prepare`"
        assert isinstance(batch, Batch) and batch.losers is not None, "made by PairData"
        pairs = joined([replace(batch, losers=None), batch.losers])
        sigma, noise = torch.cat([draws.sigma] * 2), torch.cat([draws.noise_BCTHW] * 2)

        def errors(network: Model) -> tuple[Tensor, Tensor]:
            winners, losers = velocity_error(network, pairs, sigma, noise).chunk(2)
            return winners, losers

        base_winner, base_loser = errors(self.attached["base"])
        winner, loser = errors(model)
        margin = (base_winner - winner) + (loser - base_loser)
        logit = self.beta / 2 * margin
        capped = logit if self.cap is None else logit.clamp(max=self.cap)
        loss = F.softplus(-capped) + self.anchor * winner
        if batch.weight_B is not None:  # of the winners' clips
            loss = loss * batch.weight_B
        with torch.no_grad():
            parts = {
                "margin": margin.mean(),
                "preferred": (margin > 0).to(margin.dtype).mean(),
                "pull": (torch.sigmoid(-logit) * (capped == logit)).mean(),
                "winner_change": (winner - base_winner).mean(),
                "loser_change": (loser - base_loser).mean(),
            }
        return Loss(loss.mean(), winner.detach(), draws.sigma, parts, over_base=(winner / base_winner).detach())
