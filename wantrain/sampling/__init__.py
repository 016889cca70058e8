"""Sampling: solvers, generate and what it needs of memory, given built modules; galleries of what came out."""

from wantrain.sampling.generate import Experts, Sampler, Settings, generate
from wantrain.sampling.offload import ExpertOffloader
from wantrain.sampling.peers import Peers
from wantrain.sampling.prompts import read_prompts
from wantrain.sampling.tiles import Tiled

__all__ = ["Experts", "ExpertOffloader", "Peers", "Sampler", "Settings", "Tiled", "generate", "read_prompts"]
