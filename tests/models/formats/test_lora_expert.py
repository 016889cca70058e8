"""Which expert a LoRA file says it is for: names as people give them, metadata, folders, and contradictions."""

import pytest

from wantrain.models.formats.lora_expert import check_lora_expert, noise_named, stated_lora_expert

HIGH, LOW = "high_noise", "low_noise"
NAMES = {
    "lora_high_noise": HIGH,
    "MyCat-HighNoise": HIGH,
    "wan22highnoise": HIGH,
    "Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank64_fp16": HIGH,
    "cat-HIGH": HIGH,
    "catHigh_e20": HIGH,
    "wan2.2.high.14b": HIGH,
    "high": HIGH,
    "wan22high": HIGH,
    "high_rank64": HIGH,
    "low_poly_high_noise": HIGH,
    "wan_low_noise_lora_rank64_lightx2v_4step": LOW,
    "style-LOW_bf16": LOW,
    "WAN22LowNoise-000012": LOW,
    "LOWNOISE_v2": LOW,
    "t2v low": LOW,
    "cat (low)": LOW,
    "highway": None,
    "highres": None,
    "HighRes": None,
    "high_res_city": None,
    "slow": None,
    "flow": None,
    "flow_noise": None,
    "slow-noise": None,
    "below": None,
    "lowpoly": None,
    "LowPoly": None,
    "low-poly": None,
    "highlow": None,
    "high_and_low": None,
    "high_noise+low_noise": None,
    "glow_highlights": None,
    "yellow_flower": None,
    "HIGHWAY_BELOW": None,
    "high_lr_3e-4": None,
    "": None,
}


@pytest.mark.parametrize(("name", "expert"), NAMES.items(), ids=NAMES)
def test_names(name, expert):
    """A name states an expert only as a word of its own."""
    assert noise_named(name) == expert


@pytest.mark.parametrize(
    ("path", "metadata", "expert"),
    [
        ("cat.safetensors", {}, None),
        ("cat.safetensors", {"expert": LOW}, LOW),
        ("cat.safetensors", {"ss_sd_model_name": "wan2.2_t2v_low_noise_14B_fp16.safetensors"}, LOW),
        ("cat.safetensors", {"ss_sd_model_name": "low.safetensors"}, None),
        (
            "cat.safetensors",
            {"ss_sd_model_name": "t2v_low_noise.pth", "ss_dit_high_noise_name": "t2v_high_noise.pth"},
            None,
        ),
        ("high_noise/cat.safetensors", {}, HIGH),
        ("High/cat.safetensors", {}, HIGH),
        ("low_noise/checkpoint-500/pytorch_lora_weights.safetensors", {}, LOW),
        ("loras/low_poly/cat.safetensors", {}, None),
        ("run_high/step_000100/adapter.safetensors", {"expert": LOW}, LOW),
        ("high/cat_low.safetensors", {}, LOW),
    ],
)
def test_sources(path, metadata, expert, tmp_path):
    """Metadata, file name and folder are read; a folder's bare word counts only where nothing else says."""
    assert stated_lora_expert(tmp_path / path, metadata) == expert
    check_lora_expert(tmp_path / path, metadata, expert)
    check_lora_expert(tmp_path / path, metadata, None)


@pytest.mark.parametrize(
    ("path", "metadata", "words"),
    [
        ("cat_high_noise.safetensors", {"expert": LOW}, "its metadata says low_noise, but its file name says high"),
        ("cat_LOW.safetensors", {"expert": HIGH}, "its metadata says high_noise, but its file name says low_noise"),
        ("low_noise/cat_high.safetensors", {}, "its file name says high_noise, but its folder low_noise says low_noi"),
        ("x_high.safetensors", {"ss_sd_model_name": "a/wan_low_noise.pth"}, r"ss_sd_model_name=wan_low_noise.pth\) sa"),
    ],
)
def test_contradictions(path, metadata, words, tmp_path):
    """Sources that contradict each other are named, whichever expert is asked for."""
    for expert in (HIGH, LOW, "dense", None):
        with pytest.raises(ValueError, match=f"{words}.*rename"):
            check_lora_expert(tmp_path / path, metadata, expert)


def test_wrong_expert(tmp_path):
    """A file for the other expert is refused with its key and the fix."""
    file = tmp_path / "cat-HighNoise.safetensors"
    words = r"was trained for high_noise, not for low_noise; .*\(its file name says high_noise; .*rename"
    with pytest.raises(ValueError, match=rf"^lora\.low_noise=.*{words}") as said:
        check_lora_expert(file, {}, LOW)
    assert "swap the two files, or give it as lora.high_noise=" in str(said.value)
    with pytest.raises(ValueError, match=rf"^adapter\.init=.*{words}") as said:
        check_lora_expert(file, {}, LOW, key="adapter.init")
    assert "give expert=high_noise, or with expert=both experts.high_noise.init=" in str(said.value)
    with pytest.raises(ValueError, match="not for dense"):
        check_lora_expert(file, {}, "dense")
    check_lora_expert(tmp_path / "spirits_high.safetensors", {}, "dense")
    check_lora_expert(tmp_path / "high" / "spirits.safetensors", {}, "dense")


def test_one_reason_or_several(tmp_path):
    """Sources that agree are joined by "and"; between a pair and a single model nothing is swapped."""
    file = tmp_path / "cat_high_noise.safetensors"
    with pytest.raises(ValueError, match=r"\(its metadata says high_noise and its file name says high_noise; if"):
        check_lora_expert(file, {"expert": HIGH}, LOW)
    with pytest.raises(ValueError, match=r"not for dense; give it to a model of two experts \(model=\)"):
        check_lora_expert(file, {}, "dense")
    with pytest.raises(ValueError, match=r"not for low_noise; give it to a model of one transformer \(model=\)"):
        check_lora_expert(tmp_path / "cat.safetensors", {"expert": "dense"}, LOW)
