"""Losses: each a callable loss(model, batch, draws) -> Loss, with draws = loss.prepare(batch, generators).

They are given a model and import none.
"""

from wantrain.losses.flow_matching import FlowMatching
from wantrain.losses.preference import Preference
from wantrain.losses.preservation import Preserving
from wantrain.losses.reconstruction import Reconstruction
from wantrain.losses.record import ClipValidation, Draws, Loss, LossFunction, Model, NoiseLevelValidation
from wantrain.losses.shifts import FluxShift, RootShift
from wantrain.losses.weighting import Gaussian, MinSNR

__all__ = [
    "ClipValidation",
    "Draws",
    "FlowMatching",
    "FluxShift",
    "Gaussian",
    "Loss",
    "LossFunction",
    "MinSNR",
    "Model",
    "NoiseLevelValidation",
    "Preference",
    "Preserving",
    "Reconstruction",
    "RootShift",
]
