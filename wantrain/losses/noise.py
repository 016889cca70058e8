"""The noise levels that an expert learns from: which are drawn, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wantrain import flow
from wantrain.losses.shifts import ShiftByTokens
from wantrain.losses.weighting import Weighting, weighting_named
from wantrain.util.numbers import is_number

#: What a data set may have of its own under noise.sets.NAME.
OF_A_SET = ("density", "shift", "weighting", "min_sigma", "max_sigma")


@dataclass(frozen=True)
class NoiseDistribution:
    """A distribution of noise levels inside a window, and the weight of each level.

    density    distribution of u before the shift: "uniform", "logit_normal", or an object of wantrain.flow
    shift      flow shift k, or a callable that gives one for a number of tokens
    window     the levels that are drawn; the distribution is conditioned on it
    weighting  weight by sigma: "none", another name of losses.weighting, or a callable

    ValueError for a density, shift or weighting that cannot be, or a window without mass.
    """

    density: str | flow.Density
    shift: float | ShiftByTokens
    window: flow.NoiseWindow
    weighting: str | Weighting = "none"

    def __post_init__(self) -> None:
        weighting_named(self.weighting)
        self.quantiles(torch.tensor([0.5], dtype=torch.float64))

    @property
    def weight(self) -> Weighting:
        """sigma -> weight, elementwise."""
        return weighting_named(self.weighting)

    def shift_for(self, tokens: int | None = None) -> float:
        """The flow shift for samples of that many tokens; None asks for the size that the shift was made for."""
        if isinstance(self.shift, int | float):
            return self.shift
        return self.shift(self.shift.reference_tokens if tokens is None else tokens)

    def quantiles(self, p: Tensor, tokens: int | None = None) -> Tensor:
        """Noise levels below which shares p (any shape, float64) of the draws lie, for samples of that many tokens."""
        return flow.sigma_quantiles(p, density=self.density, shift=self.shift_for(tokens), window=self.window)

    def share_below(self, sigma: float) -> float:
        """Share of the draws at or below a sigma; where the shift goes by tokens, at the size it was made for."""
        level = torch.tensor(sigma, dtype=torch.float64)
        return flow.sigma_cdf(level, density=self.density, shift=self.shift_for(), window=self.window).item()

    @property
    def mass(self) -> float:
        """Share of the unrestricted distribution that falls into the window."""
        return flow.window_mass(self.window, density=self.density, shift=self.shift_for())

    def of_set(self, name: str, own: Mapping[str, Any], expert: flow.NoiseWindow) -> NoiseDistribution:
        """The distribution of the data set `name`, with what it has of its own, inside an expert's window."""
        where = f"noise.sets.{name}"
        if not isinstance(own, Mapping):
            raise ValueError(f"{where}={own} must be a mapping: {{shift: 1.0, min_sigma: 0.2}}")
        if wrong := [key for key in own if key not in OF_A_SET]:
            raise ValueError(f"{where}.{wrong[0]} is unknown; a set has {', '.join(OF_A_SET)}")
        for key in ("shift", "min_sigma", "max_sigma"):
            value = own.get(key)
            if not (value is None or is_number(value) or (key == "shift" and callable(value))):
                raise ValueError(f"{where}.{key}={value} must be a number")
        changes = {key: own[key] for key in ("density", "shift", "weighting") if own.get(key) is not None}
        limits = own.get("min_sigma"), own.get("max_sigma")
        window = self.window if limits == (None, None) else narrowed(expert, *limits, key=f"{where}.")
        try:
            return replace(self, **changes, window=window)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def narrowed(
    window: flow.NoiseWindow, min_sigma: float | None, max_sigma: float | None, *, key: str = "noise."
) -> flow.NoiseWindow:
    """The part of an expert's window from min_sigma (included) to max_sigma (excluded, but for 1); None is its end.

    ValueError, naming the keys after `key`, if nothing is left.
    """
    low, high = max(window.low, min_sigma or 0.0), min(window.high, 1.0 if max_sigma is None else max_sigma)
    if not low < high:
        given = {"min_sigma": min_sigma, "max_sigma": max_sigma}
        said = ", ".join(f"{key}{name}={value}" for name, value in given.items() if value is not None)
        raise ValueError(
            f"{said}: nothing is left of the expert's noise window [{window.low}, {window.high}]; give numbers inside "
            "it, of a pair with experts.NAME.min_sigma and max_sigma"
        )
    return flow.NoiseWindow(low, high)
