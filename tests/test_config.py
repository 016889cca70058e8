"""The door: free text and paths are taken as typed, from a real shell too; problems are told all at once."""

import inspect
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from wantrain import checks, config
from wantrain.config import compose
from wantrain.losses import Gaussian, MinSNR
from wantrain.models import WanTransformer
from wantrain.runs.checkpoint import ON_FAILURE, Checkpoints
from wantrain.settings.schema import TRAIN
from wantrain.settings.words import quoted

ROOT = Path(__file__).resolve().parent.parent
MIXED = "data=mixed ; data.sets={a: {shards: x}}"
TEXTS = [
    "a cat, a dog, and (perhaps) a bird",
    "一只猫，在草地上奔跑。",
    "don't (stop) = 5!",
    "a rocket 🚀 and a 👩‍👩‍👧 family",
    'she said "go", then \\"left\\"',
    "back\\slash\\",
    "ends in two \\\\",
    "${model.name} and $HOME and \\${x}",
    "{a: 1} [b, c] 'd' `e` ;f|g& #h %i ?j *k ~l ^m @n",
    "  blanks around  ",
    "tab\tand\nnew line",
    "back\\slash, then the end of a line\\\n",
    "null",
    "3.14",
    "true",
    "",
    '"',
    "'",
    "key=value=more",
]


def parsed(argument):
    """What a command gets for one argument, through Hydra's parser and OmegaConf's references."""
    (override,) = OverridesParser.create().parse_overrides([quoted(argument)])
    return OmegaConf.create({"value": override.value()}).value


@pytest.mark.parametrize("text", TEXTS)
def test_text_as_typed(text):
    assert compose("sample", [f"prompt={text}"]).prompt == text


def test_random_text_as_typed():
    dice = random.Random(0)
    letters = "ab ,.=:;!?~'\"\\${}[]()<>#%&*+-/|@^`\t\n一猫，。é🎬"
    for _ in range(1500):
        text = "".join(dice.choice(letters) for _ in range(dice.randrange(25)))
        assert parsed(f"prompt={text}") == text
        assert parsed(f"caption.prefix={text}") == text


def test_random_path_as_typed(monkeypatch):
    """Paths are taken as typed, and ~ at their beginning is the home folder."""
    monkeypatch.setenv("HOME", "/somewhere/at home")
    dice = random.Random(1)
    for _ in range(500):
        text = "x" + "".join(dice.choice("ab ,.=:;!?~'\"\\${}[]()#一🎬/") for _ in range(dice.randrange(20)))
        assert parsed(f"source={text}") == text
    assert parsed("source=~/my clips (2)") == "/somewhere/at home/my clips (2)"
    assert parsed("lora.low_noise=~/a,b.safetensors") == "/somewhere/at home/a,b.safetensors"
    assert parsed("out=a~b/~c/") == "a~b/~c/"
    assert parsed("weights=null") is None and parsed("weights=") is None


def test_other_keys_left_to_hydra():
    """Arguments of keys that hold no text are left to Hydra."""
    for argument in ("steps=5", "model=tiny", "guidance={high_noise: 1}", "--cfg", "~tracker", "aspects=[1.0,2.0]"):
        assert quoted(argument) == argument
    assert compose("sample", ["steps=5", "guidance.low_noise=2"]).guidance.low_noise == 2


@pytest.mark.parametrize("text", TEXTS)
def test_text_in_stored_config(text, tmp_path):
    """Text survives in a run's config.yaml, which the next start compares with the command line."""
    values = config.plain(compose("train", [f"run={text}"]))
    assert yaml.safe_load(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)) == values


def test_shell_prompts(environment, tmp_path):
    """Prompts reach the command from a real shell as typed; `--cfg job` prints its config."""
    prompt, negative = 'don\'t (stop) = 5!, 一只猫，在草地上奔跑。 🚀 "${x}" \\', "blurry, dark; $HOME"
    words = [
        sys.executable,
        ROOT / "sample.py",
        f"prompt={prompt}",
        f"negative_prompt={negative}",
        "out=~/my clips (2)",
    ]
    line = " ".join(shlex.quote(str(word)) for word in [*words, "--cfg", "job"])
    ended = subprocess.run(
        ["bash", "-c", line], env={**environment, "HOME": "/at home"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    cfg = OmegaConf.create(ended.stdout)
    assert (cfg.prompt, cfg.negative_prompt, cfg.out) == (prompt, negative, "/at home/my clips (2)")


def test_shell_paths_and_captions(tiny, environment, tmp_path):
    """Paths and captions reach the command from a real shell as typed.

    source=~/my clips (2), as bash leaves it: the command itself finds the home folder.
    """
    clips = tmp_path / "my clips (2)"
    clips.mkdir()
    for name in ("clip-0000.mp4", "clip-0000.txt"):
        (clips / name).write_bytes((tiny.footage / name).read_bytes())
    line = (
        f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'shard.py'))} source=~/my\\ clips\\ \\(2\\) "
        "'out=shards, 一号 = 5!' caption.prefix=\"don't (stop), 🚀\""
    )
    ended = subprocess.run(
        ["bash", "-c", line], env={**environment, "HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "shards, 一号 = 5!"
    assert json.loads((out / "manifest.json").read_text())["files_used"] == 1
    (tar,) = out.glob("*.tar")
    caption = (clips / "clip-0000.txt").read_text().strip()
    assert f"don't (stop), 🚀{caption}" in tar.read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        (["precision=fp8", "clip=0", "steps=many"], ("precision=fp8", "clip=0 must be above 0", "steps=many")),
        (
            ["steps=10", "epochs=2", "batch_size=6", "accumulate=4", "model.num_frames=10"],
            ("steps=10 and epochs=2", "batch_size=6", "model.num_frames=10"),
        ),
        (
            ["attention=sage", "run=a/b", "clip=1", "batch_size=6", "accumulate=4"],
            ("attention=sage quantises", "a/b", "batch_size=6"),
        ),
        (
            ["attention=flex", "recompute=attention", "run=a/b", "batch_size=6", "accumulate=4"],
            ("attention=flex has none that can be kept", "a/b", "batch_size=6"),
        ),
    ],
)
def test_check_collects_problems(bad, problems):
    """check raises once: all values of a wrong kind, or else all that does not go together."""
    with pytest.raises(ValueError) as caught:
        checks.check(compose("train", bad))
    first, *rest = str(caught.value).splitlines()
    assert first == "3 problems:"
    for words in problems:
        assert sum(words in line for line in rest) == 1
    checks.check(compose("train", ["steps=10", "batch_size=8", "accumulate=4"]))


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("on_failure=retry", "checkpoint.on_failure=retry is unknown; choose one of stop, continue"),
        ("on_failure=null", "checkpoint.on_failure=null is unknown; choose one of stop, continue"),
        ("keep_every=2.5", "checkpoint.keep_every=2.5 must be a whole number"),
        ("keep_every=0", "checkpoint.keep_every=0 must be above 0"),
        ("keep_every=true", "checkpoint.keep_every=true must be a whole number"),
        ("keep=null", "checkpoint.keep=null must be a whole number above 0"),
        ("keep=0", "checkpoint.keep=0 must be above 0"),
        ("keep_best=lowest", "checkpoint.keep_best=lowest must be true or false"),
        ("background=1", "checkpoint.background=1 must be true or false"),
    ],
)
def test_bad_checkpoint_settings(argument, told):
    """Wrong checkpoint settings are refused."""
    with pytest.raises(ValueError) as caught:
        checks.check(compose("train", [f"checkpoint.{argument}"]))
    assert str(caught.value).startswith(told)


def test_checkpoint_settings_fit_store():
    """The checkpoint keys of the config are the keywords of the store, with the same choices."""
    checks.check(
        compose("train", [f"checkpoint.{given}" for given in ("keep_every=1000", "keep_best=true", "background=false")])
    )
    defaults = config.plain(compose("train"))["checkpoint"]
    settings = {key: value for key, value in defaults.items() if key != "every"}
    assert inspect.signature(Checkpoints).bind(Path(), **settings)
    assert get_args(TRAIN["checkpoint.on_failure"]) == ON_FAILURE


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["adapter.targets=ffn"], "adapter.targets=ffn is unknown; choose one of attention, attention+ffn, all"),
        (["adapter.rank=0"], "adapter.rank=0 must be above 0"),
        (["adapter.alpha=-1"], "adapter.alpha=-1 must be above 0"),
        (["adapter.rank_stabilized=yes please"], "adapter.rank_stabilized=yes please must be true or false"),
        (
            ["adapter.rank_pattern=8"],
            "adapter.rank_pattern=8 must be numbers for parts of layer names: {ffn: 8}, or null",
        ),
        (["adapter.rank_pattern={ffn: 1.5}"], "adapter.rank_pattern: ffn: 1.5 must be a whole number above 0"),
        (["adapter.alpha_pattern={ffn: 0, blocks.1: 2.5}"], "adapter.alpha_pattern: ffn: 0 must be a number above 0"),
        (
            ["recipe=wan_tiny_vae"],
            "adapter=lora is for transformers; with expert=vae give adapter=none",
        ),
    ],
)
def test_bad_adapter_settings(wrong, words):
    """A wrong adapter setting is one clear line."""
    with pytest.raises(ValueError) as caught:
        checks.check(compose("train", ["adapter=lora", *wrong]))
    assert str(caught.value) == words
    checks.check(compose("train", ["adapter=lora", "adapter.rank_pattern={ffn: 8, blocks.1: 4}"]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "adapter=partial trains the part that adapter.layers= and adapter.tags= name; for every weight"),
        (["adapter.layers=0-40"], "adapter.layers: 0-40 is out of range; this model has 40 blocks, 0 to 39"),
        (["adapter.tags=[ffn,attn]"], "adapter.tags: attn is unknown; choose out of attention, self_attn, cross_attn"),
    ],
)
def test_bad_partial_settings(wrong, words):
    """A wrong selection of layers or tags is refused before any work."""
    with pytest.raises(ValueError, match=re.escape(words)):
        checks.check(compose("train", ["model=t2v_a14b", "adapter=partial", *wrong]))
    for right in (["adapter.layers=0-39"], ["adapter.layers=[0,1,20-29]", "adapter.tags=[ffn,head]"]):
        checks.check(compose("train", ["model=t2v_a14b", "adapter=partial", *right]))


def test_adapter_targets_match_model():
    """The choices of adapter.targets are those that the transformer declares."""
    assert get_args(TRAIN["adapter.targets"]) == tuple(WanTransformer.adapter_targets)


def test_batch_divides_over_processes():
    """The batch must divide over accumulation and processes; the error names the nearest sizes."""
    cfg = compose("train", ["batch_size=8", "accumulate=2"])
    checks.check(cfg, processes=4)
    with pytest.raises(ValueError, match="2 x 3; the nearest are 6 and 12"):
        checks.check(cfg, processes=3)


def test_locate_shipped_files(tmp_path, monkeypatch):
    """Files of the project are found from any folder; a file in the current folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert config.locate("assets/wan-tiny") == ROOT / "assets/wan-tiny"
    (tmp_path / "assets/wan-tiny").mkdir(parents=True)
    assert config.locate("assets/wan-tiny") == Path("assets/wan-tiny"), "one's own comes first"
    assert config.locate("nowhere") == Path("nowhere")


def test_scratch_needs_description():
    """A part that the model config does not describe cannot start from scratch.

    A recipe that starts from trained weights needs no description of the part.
    """
    make = config.network(compose("train", ["expert=vae", "weights=somewhere"]))
    with pytest.raises(ValueError, match="model=tiny describes no vae to start from scratch; give weights=FOLDER"):
        make()


def test_constructor_errors():
    """The error of a constructor reaches the user unchanged."""
    cfg = compose("train", ["schedule.shape=wsd"])
    assert isinstance(cfg.schedule, DictConfig)
    with pytest.raises(ValueError) as caught:
        config.build(cfg.schedule)
    assert str(caught.value) == "schedule.shape='wsd' is unknown; choose one of constant, linear, cosine, sqrt"


def test_shift_per_expert():
    """With expert=both an expert may have a shift of its own; its sampler and its forecast follow it."""
    experts = config.expert_options(config.compose("train", ["expert=both", "experts.low_noise.shift=1"]))
    high, low = (experts[name].loss for name in ("high_noise", "low_noise"))
    assert (high.noise.shift_for(), low.noise.shift_for()) == (3.0, 1.0)
    assert low.mass == pytest.approx(0.875)  # of uniform noise, the part below the boundary


def test_noise_per_expert():
    """Density, weighting and limits of one expert of a pair; an object of another class stands in place of the whole."""
    words = (
        "expert=both", "noise=diffsynth", "experts.low_noise.density=logit_normal", "experts.low_noise.min_sigma=0.2",
        "experts.low_noise.weighting={_target_: wantrain.losses.MinSNR, gamma: 3}", "experts.high_noise.max_sigma=0.95",
    )  # fmt: skip
    experts = config.expert_options(config.compose("train", [*words]))
    high, low = (experts[name].loss for name in ("high_noise", "low_noise"))
    assert (low.noise.density, low.noise.weighting, high.noise.density) == ("logit_normal", MinSNR(3), "uniform")
    assert (high.window.low, high.window.high, low.window.low, low.window.high) == (0.875, 0.95, 0.2, 0.875)
    assert isinstance(high.noise.weighting, Gaussian)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["noise.min_sigma=0.9"], "noise.min_sigma=0.9: nothing is left of the expert's noise window [0.0, 0.875]"),
        (["noise.max_sigma=0.9"], "noise.max_sigma=0.9 leaves nothing out of the noise window [0, 0.875]"),
        (["expert=both", "noise.max_sigma=0.5"], "nothing is left of the expert's noise window [0.875, 1.0]"),
        (["expert=high_noise", "noise.min_sigma=0.2"], "noise.min_sigma=0.2 leaves nothing out"),
        ([MIXED, "noise.sets={b: {shift: 2}}"], "noise.sets.b: there is no such set; data.sets has a"),
        ([MIXED, "noise.sets={a: {huber: 2}}"], "noise.sets.a.huber is unknown; a set has density, shift"),
        ([MIXED, "noise.sets={a: 1}"], "noise.sets.a=1 must be a mapping"),
        (["loss.mask=both"], "loss.mask=both is unknown; choose one of none, focus, ignore"),
        (["loss.mask=focus", "loss.mask_rest=1"], "loss.mask_rest=1 must be at least 0 and below 1"),
        (["data.caption_dropout=[0.1]"], "data.caption_dropout=[0.1] must be"),
    ],
)
def test_noise_and_masks_refused(words, problem):
    """What cannot be is one line before work starts, and names the key."""
    given = [part for word in words for part in word.split(" ; ")]
    with pytest.raises(ValueError, match=re.escape(problem)):
        checks.check(config.compose("train", given))


def test_noise_of_sets():
    """A set's noise is built from its own keys, with objects, in one key; both experts of a pair have it."""
    own = "noise.sets={a: {shift: 2, density: {_target_: wantrain.flow.Beta, alpha: 2, beta: 3}}}"
    cfg = config.compose("train", ["expert=both", *MIXED.split(" ; "), own, "noise.min_sigma=0.1"])
    checks.check(cfg)
    for expert in config.expert_options(cfg).values():
        noise = expert.loss.noise_of_sets["a"]
        assert (noise.shift, noise.density.beta, noise.window) == (2, 3, expert.loss.noise.window)
