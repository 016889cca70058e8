"""Losses: each a callable loss(model, batch, generators) -> Loss, given a model and never importing one."""

from wantrain.losses.flow_matching import FlowMatching
from wantrain.losses.reconstruction import Reconstruction
from wantrain.losses.record import Loss
from wantrain.losses.shifts import FluxShift, RootShift
from wantrain.losses.weighting import Gaussian, MinSNR

__all__ = ["FlowMatching", "FluxShift", "Gaussian", "Loss", "MinSNR", "Reconstruction", "RootShift"]
