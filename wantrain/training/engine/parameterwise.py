"""A library's optimizer, one parameter at a time: for weights in bfloat16, and for updates inside the backward pass.

bfloat16 has 8 bits of precision. An update below 1/512 of a weight would round away, step after step. So the library
updates a float32 copy of one parameter, and the result is rounded so that small updates count:

stochastic  up or down at random, with odds that make the mean exact (Gupta et al. 2015, arXiv:1502.02551)
kahan       to the nearest; what rounding took away is kept in bfloat16 beside the weight, and added the next time
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wantrain.util.seeds import seed_at

#: Elements that are rounded at once: their random numbers take four bytes each.
PIECE = 1 << 24
#: Key of the optimizer's state under which Kahan's compensation is kept.
COMPENSATION = "compensation"


@torch.no_grad()
def round_stochastically(values: Tensor, into: Tensor, seed: int) -> None:
    """Write float32 `values` into a contiguous bfloat16 tensor, each rounded up or down at random.

    The 16 bits that go are added to 16 random ones: the carry is the rounding. Values that bfloat16 has stay the same,
    infinities and NaN too. The same seed gives the same bits on one type of device.
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    for part, place in zip(values.flatten().split(PIECE), into.view(-1).split(PIECE), strict=True):
        bits = torch.randint(1 << 16, part.shape, generator=generator, dtype=torch.int32, device=part.device)
        bits.add_(part.view(torch.int32)).bitwise_and_(-1 << 16)
        place.copy_(torch.where(part.isfinite(), bits.view(torch.float32), part))


class ParameterwiseOptimizer(torch.optim.Optimizer):
    """`optimizer`, whose updates of different parameters are independent, one parameter at a time.

    A float32 parameter is updated as the library does it. A bfloat16 one becomes float32 for its update, so that its
    moments are what they would be over float32 weights.

    names     of the parameters: a rounding's random numbers are a function of seed, step and name
    rounding  stochastic or kahan

    `number` is the number of the step that begins; whoever steps sets it.
    ValueError if the optimizer has made state in bfloat16 already.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, rounding: str, seed: int
    ) -> None:
        assert rounding in {"stochastic", "kahan"}
        if any(parameter.dtype != torch.float32 for parameter in optimizer.state):
            raise ValueError(
                f"{type(optimizer).__name__} makes its state before its first step, in the weights' bfloat16; give "
                "trained.dtype=fp32, or another optimizer="
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.inner, self.names, self.rounding, self.seed, self.number = optimizer, dict(names), rounding, seed, 0
        self._groups = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        self._share()

    def _share(self) -> None:
        """Let the library's optimizer work on this one's own state and groups: what is saved and scaled is here."""
        self.inner.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict ends here, with new state and groups
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for parameter in self._groups:
            if parameter.grad is not None:
                self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """One update of one parameter by its gradient, which stays."""
        if parameter.dtype == torch.float32:
            self._step(parameter, self._groups[parameter])
            return
        assert parameter.grad is not None
        state = self.state.pop(parameter, {})
        lost = state.pop(COMPENSATION, None)
        weight = nn.Parameter(parameter.float())
        if lost is not None:
            weight.add_(lost)
        weight.grad = parameter.grad.float()
        if state:
            self.state[weight] = state
        self._step(weight, self._groups[parameter])
        state = self.state.pop(weight, {})
        if self.rounding == "kahan":
            parameter.copy_(weight)
            state[COMPENSATION] = weight.sub_(parameter).to(parameter.dtype)
        else:
            seed = seed_at(self.seed, "rounding", self.number, self.names[parameter])
            round_stochastically(weight, parameter, seed)
        if state:
            self.state[parameter] = state

    def _step(self, parameter: nn.Parameter, group: int) -> None:
        """A step of the library's optimizer that sees this parameter alone."""
        whole = [each["params"] for each in self.param_groups]
        for number, each in enumerate(self.param_groups):
            each["params"] = [parameter] if number == group else []
        try:
            self.inner.step()
        finally:
            for each, parameters in zip(self.param_groups, whole, strict=True):
                each["params"] = parameters
