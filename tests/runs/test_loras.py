"""LoRAs of a command line: which files, how strong, for which expert; what cannot be meant is one error."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from wantrain import config
from wantrain.models.formats.lora import read_lora, write_lora
from wantrain.models.formats.lora_layers import Difference, Hadamard, Kronecker, Layer
from wantrain.runs.export import convert_loras
from wantrain.runs.loras import Lora, LoraSettings, listed

PAIR = ("high_noise", "low_noise")
NAME = "blocks.0.self_attn.q"


def settings(*typed):
    """The `lora` group as typed on a command line."""
    given = dict(each.split("=", 1) for each in typed)
    numbers = {key: yaml.safe_load(given.pop(key, default)) for key, default in (("scale", "1.0"), ("alpha", "null"))}
    return LoraSettings.of({**given, **numbers}, config.locate)


def strengths(*typed, own=(), names=PAIR):
    trained = {name: Lora(Path("adapter.safetensors"), run="r") for name in own}
    found = settings(*typed).over(trained, names)
    return {name: [lora.strength for lora in some] for name, some in found.items() if some}


def lora_file(path, *, dora=False, dtype=torch.float32, **metadata):
    generator = torch.Generator().manual_seed(len(str(path)))
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    layer = Layer(down.to(dtype), up.to(dtype), 4.0, torch.ones(8) if dora else None)
    write_lora(path, {NAME: layer}, metadata=metadata)
    return path


def test_scale_reaches_every_lora():
    """A number is the strength of all LoRAs, a run's own too; a map gives one per expert, a list one per LoRA."""
    files = ("high_noise=a.safetensors", "low_noise=[b.safetensors, c.safetensors]")
    assert strengths(*files) == {"high_noise": [1], "low_noise": [1, 1]}
    assert strengths(*files, "scale=-0.5", own=["low_noise"]) == {"high_noise": [-0.5], "low_noise": [-0.5] * 3}
    assert strengths("scale=0", own=PAIR) == {"high_noise": [0], "low_noise": [0]}
    assert strengths(*files, "scale={high_noise: 0.8}") == {"high_noise": [0.8], "low_noise": [1, 1]}
    assert strengths(*files, "scale={low_noise: [1, 0.5, 0]}", own=["low_noise"])["low_noise"] == [1, 0.5, 0]
    assert strengths("dense=a.safetensors", "scale={dense: 2}", names=["dense"]) == {"dense": [2]}


@pytest.mark.parametrize(
    ("typed", "own", "said"),
    [
        (["scale=strong"], PAIR, r"lora.scale=strong must be a number, or one per expert"),
        (["scale=[1, 2]"], PAIR, r"lora.scale=\[1, 2\] must be a number, or one per expert"),
        (["scale={high_noise: true}"], PAIR, r"must be a number, or one per expert"),
        (["scale=.nan"], PAIR, r"lora.scale=nan must be a number"),
        (["scale=null"], PAIR, r"lora.scale=None must be a number"),
        (["scale={high: 0.5}"], PAIR, r"lora.scale.high=0.5: this model has high_noise, low_noise, no high"),
        (["dense=x"], (), r"lora.dense=x: this model has high_noise, low_noise, no dense"),
        (
            ["low_noise=[a,b]", "scale={low_noise: [1, 2]}"],
            ["low_noise"],
            r"lora.scale: low_noise has 3 LoRAs \(run r, a, b\) and 2 strengths \(1, 2\); give one for each",
        ),
        (["low_noise=[a,a]"], (), r"lora.low_noise names a twice"),
        (["alpha=strong", "low_noise=a"], (), r"lora.alpha=strong must be a number"),
        (["scale=0.5"], (), r"lora.scale=0.5 changes nothing: no LoRA is given"),
        (["scale={high_noise: 0.5}"], ["low_noise"], r"lora.scale: high_noise has no LoRA here"),
        (["alpha=8"], PAIR, r"lora.alpha=8 is for files that do not hold theirs, and none is given"),
    ],
)
def test_wrong_or_unused_scale(typed, own, said):
    """A strength that cannot be, or that nothing would take, is refused by its key."""
    with pytest.raises(ValueError, match=said):
        given = settings(*typed)
        given.check_used([given.over({name: Lora(Path("x"), run="r") for name in own}, PAIR)])


def test_compared_runs_share_scale():
    """With several sources it is enough that one has a LoRA."""
    given = settings("scale=0.5")
    given.check_used([given.over({}, PAIR), given.over({"high_noise": Lora(Path("x"))}, PAIR)])


@pytest.mark.parametrize(
    ("typed", "files"),
    [
        ("a.safetensors", ["a.safetensors"]),
        ("[a.safetensors,b c.safetensors]", ["a.safetensors", "b c.safetensors"]),
        ("""[ "a, b.safetensors", 'c,d' , [v2] e ]""", ["a, b.safetensors", "c,d", "[v2] e"]),
        ("[v2] style, low.safetensors", ["[v2] style, low.safetensors"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_lists_of_files(typed, files):
    """A path may have brackets, commas and blanks; in a list, quotes keep commas."""
    assert listed(typed) == files


def test_file_named_like_a_list(tmp_path, monkeypatch):
    """A file whose whole name is in brackets is that file."""
    monkeypatch.chdir(tmp_path)
    Path("[a,b]").touch()
    assert listed("[a,b]") == ["[a,b]"] and listed("[a,c]") == ["a", "c"]
    for wrong in ("[]", "[a,,b]"):
        with pytest.raises(ValueError, match="is no list of files"):
            listed(wrong)


def test_list_through_the_command_line():
    """What Hydra makes of a typed list is that list, ~ is the home folder."""
    typed = ["lora.low_noise=[~/a.safetensors, /x/b = (1).safetensors]", "lora.scale={low_noise: [1, 0.5]}"]
    given = LoraSettings.of(config.plain(config.compose("sample", typed).lora), config.locate)
    assert [lora.strength for lora in given.over({}, PAIR)["low_noise"]] == [1, 0.5]
    found = given.files["low_noise"]
    assert found == (Path.home() / "a.safetensors", Path("/x/b = (1).safetensors"))


def test_dora_has_no_strength(tmp_path):
    """A DoRA is taken at 1 alone."""
    file = lora_file(tmp_path / "d.safetensors", dora=True)
    assert Lora(file).read("low_noise").is_dora
    with pytest.raises(ValueError, match=r"lora.scale=0.5: .*d.safetensors is a DoRA, which has no strength"):
        Lora(file, 0.5).read("low_noise")


@pytest.mark.parametrize("strength", [0.5, 0.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_scales(tmp_path, strength, dtype):
    """A converted file changes `lora.scale` times as much as its source, whatever reads it, and keeps its alpha."""
    file = lora_file(tmp_path / "in" / "a.safetensors", dtype=dtype)
    given = settings(f"low_noise={file}", f"scale={strength}")
    for dialect in ("comfyui", "kohya", "diffusers"):
        convert_loras(given, tmp_path / "out", dialect)
        made = read_lora(tmp_path / "out" / f"a_low_noise_{dialect}.safetensors")
        torch.testing.assert_close(made.layers[NAME].change(), strength * read_lora(file).layers[NAME].change())
        assert made.layers[NAME].alpha == 4 and made.layers[NAME].up.dtype == dtype
        assert made.metadata["expert"] == "low_noise" and float(made.metadata["lora_scale"]) == strength


KINDS = {
    "LoRA": Layer(torch.randn(2, 4), torch.randn(6, 2), 4.0),
    "LoHa": Hadamard(torch.randn(6, 2), torch.randn(2, 4), torch.randn(6, 2), torch.randn(2, 4), 3.0),
    "LoKr": Kronecker((torch.randn(2, 2),), (torch.randn(3, 1), torch.randn(1, 2)), 0.5),
    "whole LoKr": Kronecker((torch.randn(2, 2),), (torch.randn(3, 2),), 2.0),
    "factored LoKr": Kronecker((torch.randn(2, 1), torch.randn(1, 2)), (torch.randn(3, 2),), 2.0),
    "difference": Difference(torch.randn(6, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.0, -0.5, 3.0])
def test_every_kind_scales(kind, factor, tmp_path):
    """Every kind of change scales, and is read back so from a file."""
    change = KINDS[kind]
    write_lora(tmp_path / "a.safetensors", {NAME: change.scaled(factor)})
    for made in (change.scaled(factor), read_lora(tmp_path / "a.safetensors").layers[NAME]):
        torch.testing.assert_close(made.change(), factor * change.change())


def test_file_with_both_experts(tmp_path):
    """A file that holds both experts gives each its half, merged and converted."""
    layers = {name: Layer(torch.randn(2, 8), torch.randn(8, 2), 2.0) for name in PAIR}
    tensors = {
        f"{prefix}.blocks.0.attn1.to_q.{end}.weight": tensor
        for prefix, layer in zip(("transformer", "transformer_2"), layers.values(), strict=True)
        for end, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }
    file = tmp_path / "both.safetensors"
    save_file(tensors, file)
    given = settings(*(f"{name}={file}" for name in PAIR), "scale={low_noise: 0.5}")
    for name, (lora,) in given.over({}, PAIR).items():
        assert torch.equal(lora.read(name).layers[NAME].up, layers[name].up)
    convert_loras(given, tmp_path / "out", "comfyui")
    for name, strength in zip(PAIR, (1, 0.5), strict=True):
        made = read_lora(tmp_path / "out" / f"both_{name}_comfyui.safetensors")
        torch.testing.assert_close(made.layers[NAME].change(), strength * layers[name].change())
        assert made.metadata["expert"] == name


def test_conversions_of_one_name(tmp_path):
    """Two inputs of one name become two outputs: of two experts, and of one."""
    a, b, c = (lora_file(tmp_path / folder / "style.safetensors") for folder in "abc")
    convert_loras(settings(f"high_noise={a}", f"low_noise=[{b},{c}]"), tmp_path, "kohya")
    names = {"style_high_noise_kohya": a, "style_low_noise_kohya": b, "style_low_noise_2_kohya": c}
    for name, source in names.items():
        made = read_lora(tmp_path / f"{name}.safetensors")
        assert torch.equal(made.layers[NAME].up, read_lora(source).layers[NAME].up)
        assert made.metadata["expert"] in name


def test_conversion_overwrites_nothing(tmp_path):
    """An existing file is replaced with overwrite alone, the source of a conversion never; nothing is half done."""
    one = lora_file(tmp_path / "one_high_noise.safetensors")
    two = lora_file(tmp_path / "two_low_noise.safetensors")
    there = tmp_path / "two_low_noise_comfyui.safetensors"
    there.write_bytes(b"precious")
    given = settings(f"high_noise={one}", f"low_noise={two}")
    with pytest.raises(ValueError, match=r"two_low_noise_comfyui.safetensors is there already; .*overwrite=true"):
        convert_loras(given, tmp_path, "comfyui")
    assert there.read_bytes() == b"precious" and not (tmp_path / "one_high_noise_comfyui.safetensors").exists()
    convert_loras(given, tmp_path, "comfyui", overwrite=True)
    assert read_lora(there).metadata["expert"] == "low_noise"
    same = lora_file(tmp_path / "x_low_noise.safetensors")
    (tmp_path / "x_low_noise_comfyui.safetensors").hardlink_to(same)
    with pytest.raises(ValueError, match="would be replaced by what is written"):
        convert_loras(settings(f"low_noise={same}"), tmp_path, "comfyui", overwrite=True)
    two = lora_file(tmp_path / "two_low_noise.safetensors")
    before = there.read_bytes()
    for given in (f"low_noise=[{there},{two}]", f"low_noise=[{two},{there}]"):
        with pytest.raises(
            ValueError, match=r"two_low_noise_comfyui\.safetensors would be replaced by what is written"
        ):
            convert_loras(settings(given), tmp_path, "comfyui", overwrite=True)
    assert there.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "metadata"),
    [("style_HIGH_v1", {}), ("HighNoise", {}), ("style", {"expert": "high_noise"}), ("high_noise/style", {})],
)
def test_conversion_denied_by_name(tmp_path, name, metadata):
    """What a file's name, folder or metadata deny is never written into its metadata."""
    file = lora_file(tmp_path / f"{name}.safetensors", **metadata)
    with pytest.raises(ValueError, match=r"for high_noise.*not for low_noise"):
        convert_loras(settings(f"low_noise={file}"), tmp_path / "out", "comfyui")
    assert not (tmp_path / "out").exists()
