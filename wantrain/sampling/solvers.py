"""ODE solvers: they integrate the velocity from noise to data along a given list of sigmas.

A solver is built for one trajectory, since multistep methods keep a history. `x = solver.step(i, x, velocity)` moves
from sigmas[i] to sigmas[i+1]. State is float32, coefficients are float64. The history is kept when the expert changes,
as in the official code.
Sources: Euler; UniPC (Zhao et al., arXiv 2302.04867), order 2, the B(h) = e^h - 1 variant ("bh2"), predicting x0;
DPM-Solver++ 2M (Lu et al., arXiv 2211.01095), the midpoint form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from wantrain import flow


class Solver(Protocol):
    """A solver of one trajectory."""

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor: ...


class Euler:
    """First order: x + (next sigma - sigma) * velocity."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas: list[float] = sigmas.double().tolist()

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        return x.float() + (self.sigmas[i + 1] - self.sigmas[i]) * velocity.float()


def _log_ratio(sigma: float) -> float:
    """lambda = ln((1 - sigma) / sigma): half the log signal-to-noise ratio, the variable that solvers step in."""
    if sigma <= 0.0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1.0 else -math.inf


class UniPC:
    """UniPC of order 2: a multistep prediction, corrected when the model has been evaluated at the predicted point.

    The model is called once per step. First and last step are of order 1. Data prediction m = x - sigma*v.
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas: list[float] = sigmas.double().tolist()
        self.num_steps = len(self.sigmas) - 1
        self.data: list[Tensor] = []  # m at the last two points, newest last
        self.corrected: Tensor | None = None  # x at the previous point, after its correction
        self.order = 0  # of the previous prediction, which the correction repeats

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        data = x.float() - self.sigmas[i] * velocity.float()
        if self.corrected is not None:
            x = self._correct(i, self.corrected, data)
        self.data = [*self.data[-1:], data]
        self.order = 1 if i in (0, self.num_steps - 1) else 2
        self.corrected = x = x.float()
        return self._predict(i, x)

    def _move(self, start: int, x: Tensor, newest: Tensor) -> tuple[Tensor, float, float]:
        """The exact part of a step from `start`: moved x, the step h in lambda, and the factor alpha*B(-h)."""
        sigma0, sigma1 = self.sigmas[start], self.sigmas[start + 1]
        h = _log_ratio(sigma1) - _log_ratio(sigma0)
        factor = (1 - sigma1) * math.expm1(-h)
        return (sigma1 / sigma0) * x - factor * newest, h, factor

    def _slope(self, at: int, h: float) -> tuple[Tensor, float]:
        """(m at the point before `at` - m at `at`) / r, and r: that earlier step relative to h, negative."""
        r = (_log_ratio(self.sigmas[at - 1]) - _log_ratio(self.sigmas[at])) / h
        return (self.data[-2] - self.data[-1]) / r, r

    def _predict(self, i: int, x: Tensor) -> Tensor:
        newest = self.data[-1]
        if self.sigmas[i + 1] == 0.0:
            return newest  # h is infinite: the limit is the data prediction
        moved, h, factor = self._move(i, x, newest)
        if self.order == 1:
            return moved
        slope, _ = self._slope(i, h)
        return moved - 0.5 * factor * slope

    def _correct(self, i: int, x: Tensor, arrived: Tensor) -> Tensor:
        """Redo the step to point i with the data prediction there (`arrived`)."""
        newest = self.data[-1]
        moved, h, factor = self._move(i - 1, x, newest)
        if self.order == 1:
            return moved - 0.5 * factor * (arrived - newest)
        slope, r = self._slope(i - 1, h)
        # Match the first two moments of the exponential integral: [[1, 1], [r, 1]] rho = [b1, b2].
        b = math.expm1(-h)
        k1 = b / -h - 1
        k2 = k1 / -h - 0.5
        b1, b2 = k1 / b, 2 * k2 / b
        rho0 = (b1 - b2) / (1 - r)
        rho1 = b1 - rho0
        return moved - factor * (rho0 * slope + rho1 * (arrived - newest))


class DPMSolver:
    """DPM-Solver++ 2M: extrapolates the data prediction from the last two points to the middle of the step.

    The model is called once per step. First and last step are of order 1. Data prediction m = x - sigma*v.
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas: list[float] = sigmas.double().tolist()
        self.num_steps = len(self.sigmas) - 1
        self.previous: Tensor | None = None  # m at the point before

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        x, sigma, following = x.float(), self.sigmas[i], self.sigmas[i + 1]
        data = expected = x - sigma * velocity.float()
        h = _log_ratio(following) - _log_ratio(sigma)
        if self.previous is not None and i < self.num_steps - 1:
            # Length of the step before relative to this one; infinite after a start at sigma 1.
            r = (_log_ratio(sigma) - _log_ratio(self.sigmas[i - 1])) / h
            expected = data + 0.5 / r * (data - self.previous)
        self.previous = data
        return (following / sigma) * x - (1 - following) * math.expm1(-h) * expected


SOLVERS: dict[str, Callable[[Tensor], Solver]] = {"unipc": UniPC, "dpm++": DPMSolver, "euler": Euler}


def schedule(solver: str, num_steps: int, shift: float) -> Tensor:
    """The authors' sigmas for a solver: (num_steps + 1,) float64, descending to 0.

    DPM-Solver++ starts at pure noise, UniPC (and here Euler) one step of the 1,000-step grid below it.
    """
    return flow.sampling_sigmas(num_steps, shift, start=1.0 if solver == "dpm++" else flow.SECOND_NOISIEST)


def solver_named(name: str, sigmas: Tensor) -> Solver:
    """The solver called `name` for one trajectory over `sigmas` (ending in 0)."""
    if name not in SOLVERS:
        raise ValueError(f"solver={name!r} is unknown; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name](sigmas)
