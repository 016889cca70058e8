"""Experts with their LoRAs: every strength is heard, and an identity holds expert, file and strength of each."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from wantrain import config
from wantrain.models import Base
from wantrain.models.formats.lora import write_lora
from wantrain.models.formats.lora_layers import Layer
from wantrain.runs.experts import check_used, find_experts
from wantrain.runs.export import export_vae
from wantrain.runs.folder import TrainedExpert
from wantrain.runs.loras import LoraSettings

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests" / "golden" / "runs"
TINY = Base(ROOT / "assets" / "wan-tiny")
PAIR = ["high_noise", "low_noise"]
LAYER = "blocks.1.ffn.0"
#: A layer that the golden run's adapter changes.
TRAINED = "blocks.1.self_attn.q.weight"


def found(run=None, **more):
    facts = {"model": "tiny", "boundary": 0.875, "runs": RUNS, "locate": config.locate}
    return find_experts(PAIR, **facts, run=run, base=None if run else TINY, **more)


@pytest.fixture
def files(tmp_path):
    """Two LoRA files of one layer of wan-tiny that say nothing about their expert."""
    paths = []
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        layer = Layer(torch.randn(1, 128, generator=generator), torch.randn(512, 1, generator=generator), 1.0)
        paths.append(tmp_path / f"{name}.safetensors")
        write_lora(paths[-1], {LAYER: layer})
    return paths


def weight(sources, name, key=f"{LAYER}.weight"):
    return sources.load(name).get_parameter(key).data


def with_files(sources, scale=1.0, **files):
    return sources.with_loras(LoraSettings({name: tuple(some) for name, some in files.items()}, scale))


def test_strength_of_a_runs_own_lora():
    """Strengths 1, 0.5, 0 and -1 of a run's own LoRA give four experts, on one line from the base."""
    base, merged = weight(found(), "low_noise", TRAINED), weight(found("lora"), "low_noise", TRAINED)
    assert (merged - base).abs().max() > 1e-4
    for scale in (1, 0.5, 0, -1.0, {"low_noise": 0.25}, {"low_noise": [2]}):
        factor = scale if not isinstance(scale, dict) else torch.tensor(scale["low_noise"]).item()
        made = weight(with_files(found("lora"), scale), "low_noise", TRAINED)
        torch.testing.assert_close(made, base + factor * (merged - base), atol=1e-6, rtol=0)
    assert torch.equal(weight(with_files(found("lora"), 0), "low_noise", TRAINED), base)


def test_several_loras_of_an_expert(files, capsys):
    """The LoRAs of an expert are merged each at its strength; the other expert is not touched."""
    base = weight(found(), "low_noise")
    changes = [weight(with_files(found(), low_noise=[file]), "low_noise") - base for file in files]
    both = with_files(found(), {"low_noise": [0.5, -2]}, low_noise=files)
    made = weight(both, "low_noise")
    torch.testing.assert_close(made, base + 0.5 * changes[0] - 2 * changes[1], atol=1e-5, rtol=0)
    assert torch.equal(weight(both, "high_noise"), weight(found(), "high_noise"))
    said = capsys.readouterr().out
    assert (
        "a.safetensors added to 1 layers at scale 0.5" in said and "b.safetensors added to 1 layers at scale -2" in said
    )
    assert both.origin()["low_noise"]["merged"] == "a.safetensors x 0.5, b.safetensors x -2"


def test_own_lora_beside_a_file(files):
    """A run's own LoRA comes first, then the files."""
    both = with_files(found("lora"), {"low_noise": [0, 1]}, low_noise=files[:1])
    assert [lora.label for lora in both.loras["low_noise"]] == ["run lora", "a.safetensors"]
    assert torch.equal(weight(both, "low_noise", TRAINED), weight(found(), "low_noise", TRAINED))
    assert torch.equal(weight(both, "low_noise"), weight(with_files(found(), low_noise=files[:1]), "low_noise"))
    origin = both.origin()["low_noise"]
    assert (origin["run"], origin["merged"]) == ("lora", "run lora x 0, a.safetensors")


def test_identity_of_weights(files, tmp_path):
    """Expert, contents, strength, alpha and order of each LoRA are in the identity; the path of a file is not."""
    a, b = files
    ways = [
        found(),
        found("lora"),
        with_files(found("lora"), 0.5),
        with_files(found(), high_noise=[a]),
        with_files(found(), low_noise=[a]),
        with_files(found(), high_noise=[a], low_noise=[a]),
        with_files(found(), low_noise=[b]),
        with_files(found(), 0.5, low_noise=[a]),
        with_files(found(), low_noise=[a, b]),
        with_files(found(), low_noise=[b, a]),
        with_files(found(), {"low_noise": [1, 0.5]}, low_noise=[a, b]),
        with_files(found(), {"low_noise": [0.5, 1]}, low_noise=[a, b]),
        found().with_loras(LoraSettings({"low_noise": (b,)}, 1.0, alpha=1.0)),
    ]
    assert len({way.identity() for way in ways}) == len(ways)
    (tmp_path / "moved").mkdir()
    copied = Path(shutil.copy(a, tmp_path / "moved" / "other.safetensors"))
    os.utime(copied, (1, 1))
    assert with_files(found(), low_noise=[copied]).identity() == with_files(found(), low_noise=[a]).identity()
    shutil.copy(b, copied)
    os.utime(copied, (1, 1))
    assert with_files(found(), low_noise=[copied]).identity() == with_files(found(), low_noise=[b]).identity()


def test_wrong_files_before_any_work(tmp_path, files):
    """A swapped, absent or damaged LoRA is an error before an expert is loaded."""
    swapped = files[0].rename(tmp_path / "style_HighNoise.safetensors")
    with pytest.raises(ValueError, match=r"high_noise.*not for low_noise"):
        with_files(found(), low_noise=[swapped])
    with pytest.raises(ValueError, match=r"nothing.safetensors"):
        with_files(found(), low_noise=[tmp_path / "nothing.safetensors"])
    files[1].write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"b.safetensors"):
        with_files(found(), high_noise=files[1:])


def test_one_expert_alone():
    """alone=true takes the one that a run trained; where none or both are chosen it is refused."""
    assert found("lora").names == ("high_noise", "low_noise")
    alone = found("lora", alone=True)
    assert alone.names == ("low_noise",) and set(alone.loras) == {"low_noise"}
    check_used([alone], LoraSettings({}), ["guidance.low_noise", "steps"])
    with pytest.raises(ValueError, match=r"guidance.high_noise has no effect: alone=true leaves high_noise out"):
        check_used([alone], LoraSettings({}), ["guidance.high_noise"])
    with pytest.raises(ValueError, match=r"alone=true takes one expert, and high_noise, low_noise are given .*run of"):
        found(alone=True)


def test_what_is_read(files):
    """Everything that loading reads is listed, and its size is known."""
    sources = with_files(found("lora"), high_noise=files)
    adapter = next((RUNS / "lora").rglob("adapter.safetensors"))
    parts = [TINY.folder / part for part in ("transformer", "transformer_2", "vae")]
    assert {path.resolve() for path in sources.places(["vae"])} == {*parts, *files, adapter}
    counted = sum(parameter.numel() for name in PAIR for parameter in sources.load(name).parameters())
    assert sources.num_parameters() == counted
    assert sources.num_bytes(["vae"]) == sum(file.stat().st_size for file in parts[-1].iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_vae_of_a_pipeline_is_kept(tmp_path, overwrite):
    """A trained VAE never replaces the one of a pipeline."""
    shutil.copytree(TINY.folder / "vae", tmp_path / "vae")
    before = {path: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    trained = TrainedExpert("vae", tmp_path / "run", {}, 0)
    with pytest.raises(ValueError, match=r"vae holds something else"):
        export_vae(trained, tmp_path, measure=None, overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / "vae").iterdir()} == before
