"""Processes that share a clip, played by threads of one process."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from wantrain.models.sequence import Group, SequenceParallel


class Threads:
    """Processes played by threads: each has a copy of the network, and what they send goes through shared places."""

    def __init__(self, size, *, num_heads=12):
        self.size, self.heads = size, math.gcd(size, num_heads)
        self.sent, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def sequence(self, rank):
        """What the thread `rank` has in the place of SequenceParallel.over."""
        first = rank // self.heads * self.heads
        heads, groups = range(first, first + self.heads), range(rank - first, self.size, self.heads)
        return SequenceParallel(rank, *(Group(len(some), self.exchange(rank, some)) for some in (heads, groups)))

    def exchange(self, rank, ranks):
        """An Exchange of the thread `rank` with those of `ranks`; its gradient goes the same way back."""

        class Sent(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return self.swap(rank, ranks, x)

            @staticmethod
            def backward(ctx, grad):
                return self.swap(rank, ranks, grad.contiguous())

        return Sent.apply

    def swap(self, rank, ranks, x):
        assert x.is_contiguous() and x.shape[0] == len(ranks)
        self.sent[rank] = x
        self.barrier.wait()
        came = torch.stack([self.sent[other][ranks.index(rank)] for other in ranks])
        self.barrier.wait()
        return came

    def run(self, model, work):
        """`work(network, rank)` of every thread, each with a copy of the model that is split."""

        def split(sequence):
            own = copy.deepcopy(model)
            sequence.split(own)
            return work(copy.deepcopy(own), sequence.rank)  # as a loss's reference is copied

        return self.each(split)

    def each(self, work):
        """`work(sequence)` of every thread."""

        def one(rank):
            try:
                return work(self.sequence(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))
