"""Sampling: solvers and generate, given built modules."""

from wantrain.sampling.generate import Experts, Sampler, Settings, generate

__all__ = ["Experts", "Sampler", "Settings", "generate"]
