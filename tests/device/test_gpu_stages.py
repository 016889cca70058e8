"""The stages of benchmarks/gpu.py that compute in their own process, on the second device with their small shapes.

Not the one that asks for a fused attention kernel, which this device does not have.
"""

import json

import pytest

FAST = ("transformer:block", "encoders:vae_2_1", "encoders:text")
SLOW = ("transformer:slice_of_8", "transformer:step_17", "transformer:step_81", "encoders:vae_2_2")


@pytest.mark.parametrize("stage", [*FAST, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)])
def test_stage(device, stage):
    found = json.loads(device(f"gpu_stages.{stage}").stdout)
    assert found["measured"]["in_words"], "its line says what it found"
    assert all(found["checks"].values()), found
