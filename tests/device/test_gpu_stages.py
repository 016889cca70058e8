"""The stages of benchmarks/gpu.py that compute in their own process, on the second device with their small shapes.

Not the one that asks for a fused attention kernel, and not the compiled one: this device has neither.
"""

import json
import math

import pytest

FAST = ("transformer:block", "encoders:text")
SLOW = (
    "against:step_5b", "against:slice_lora", "against:slice_full", "against:step_81", "encoders:vae_2_1", "encoders:vae_2_2",
    "variants:by_tokens", "variants:quantized", "variants:swap",
)  # fmt: skip


def leaves(value):
    """All that lies in nested dicts and lists."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inside is None else [leaf for each in inside for leaf in leaves(each)]


@pytest.mark.parametrize("stage", [*FAST, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)])
def test_stage(device, stage):
    found = json.loads(device(f"gpu_stages.{stage}").stdout)
    assert found["measured"]["in_words"], "its line says what it found"
    assert all(found["checks"].values()), found["checks"]
    seconds = [case["measures"]["seconds"]["sides"] for case in found["cases"].values()]
    found["measured"].pop("fit", None)  # of a few noisy seconds: any sign
    numbers = [value for value in leaves([found["measured"], seconds]) if isinstance(value, float)]
    assert numbers and all(0 < number < math.inf for number in numbers), found
