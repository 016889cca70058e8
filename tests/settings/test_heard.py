"""A setting that is given is heard, or refused with the choice that leaves it without effect."""

import pytest

from wantrain import checks, config
from wantrain.settings.words import expanded

REQUIRED = {"caption": ["source=x"], "shard": ["source=x", "out=y"], "encode": ["shards=x", "out=y"]}
VAE = "recipe=wan_tiny_vae"


def refusal(command, words):
    """What check says of a command line; None if nothing."""
    arguments = expanded([*REQUIRED.get(command, []), *words])
    try:
        checks.check(config.compose(command, arguments), given=config.keys_of(arguments))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("command", "words", "because"),
    [
        ("train", ["experts.high_noise.lr=1e-3"], "expert=low_noise trains that one alone"),
        ("train", ["experts.high_noise.rank=8", "adapter=lora"], "expert=low_noise trains that one alone"),
        ("train", ["experts={high_noise: {ema: 0.9}}"], "expert=low_noise trains that one alone"),
        ("train", ["experts.low_noise.lr=1e-3", "optimizer.lr=1e-4"], "experts.NAME.lr stands in its place"),
        ("train", ["expert=both", "experts={low_noise: {ema: 0.9}, high_noise: {ema: 0.8}}", "ema=0.7"], "NAME.ema"),
        ("train", ["experts.share.high_noise=0.4"], "expert=low_noise trains one expert"),
        ("train", ["experts.offload=cpu"], "expert=low_noise trains one expert"),
        ("train", ["sample.prompts=p.txt"], "sample.every=0 makes no previews"),
        ("train", ["sample.count=3"], "sample.every=0 makes no previews"),
        ("train", ["sample.steps=3"], "sample.every=0 makes no previews"),
        ("train", ["sample.offload.blocks=true"], "sample.every=0 makes no previews"),
        ("train", ["sample=10", "expert=both", "sample.offload.experts=cpu"], "no expert waits"),
        ("train", ["adapter=lora", "adapter.init=f", "adapter.rank=4"], "adapter.init=f has its own"),
        ("train", ["adapter=lora", "adapter.init=f", "adapter.rank_pattern={ffn: 8}"], "adapter.init=f has its own"),
        ("train", ["adapter=lora", "expert=both", "experts.low_noise.init=f", "experts.low_noise.rank=4"], "goes on from"),
        ("train", [VAE, "noise=beta"], "loss=wantrain.losses.Reconstruction draws no noise level"),
        ("train", [VAE, "noise.shift=2"], "loss=wantrain.losses.Reconstruction draws no noise level"),
        ("train", [VAE, "sample=5"], "expert=vae makes no previews"),
        ("train", [VAE, "validation.points=2"], "no noise levels"),
        ("train", [VAE, "recompute=block"], "expert=vae trains no transformer"),
        ("train", [VAE, "compile=blocks"], "expert=vae trains no transformer"),
        ("train", [VAE, "attention=math"], "expert=vae trains no transformer"),
        ("train", ["init=scratch", "check_expert=stop"], "init=scratch loads no expert"),
        ("train", ["data.cache=here"], "no shards lie at a URL"),
        ("train", ["data.cache_gb=5"], "no shards lie at a URL"),
        ("train", ["adapter=lora", "base.low_rank=8"], "it is for base.dtype=fp8, int8 or nf4"),
        ("train", ["adapter=lora", "base.dtype=bf16", "precision=bf16", "base.low_rank=8"], "it is for base.dtype=fp8, int8 or nf4"),
        ("train", ["loss.seed=1"], "loss.stratified=false"),
        ("train", ["loss.mask_rest=0.1"], "loss.mask=none weighs nothing by masks"),
        ("train", ["noise.sets={a: {shift: 2}}"], "the data are one set"),
        ("train", ["data.batch_size=2"], "data.caption_dropout=0.1 is the same at every step"),
        ("train", ["experts.low_noise.weighting=cosmap", "noise.weighting=min_snr"], "NAME.weighting stands in its place"),
        ("train", [VAE, "noise.min_sigma=0.2"], "loss=wantrain.losses.Reconstruction draws no noise level"),
        ("train", ["schedule=constant", "schedule.floor=0.5"], "schedule.shape=constant never falls"),
        ("train", ["tracker=off", "tracker.project=p"], "tracker=jsonl has no projects"),
        ("train", ["validation=off", "validation.clips=4"], "validation.every=0 makes no validation"),
        ("train", ["validation=off", "checkpoint.keep_best=true"], "validation.every=0 makes no validation"),
        ("train", ["validation.every=5", "validation.clips=5", "validation.points=5", "validation.share=0.5"], "all given"),
        ("train", ["model.steps=5", "steps=6"], "steps=6"),
        ("train", ["model.train.batch_size=4", "batch_size=2"], "batch_size=2 stands in its place"),
        ("train", ["model.train.micro_batch=1", "accumulate=2"], "accumulate=2"),
        ("train", ["model.num_frames=9"], "the latents say how long"),
        ("train", ["model.negative_prompt=grey"], "sample.every=0 makes no previews"),
        ("train", ["init=scratch", "model.scratch=true"], "init=scratch says"),
        ("train", ["parts.dense=x"], "model=tiny has the experts"),
        ("train", ["model=tiny_dense", "expert=dense", "model.boundary=0.5"], "one transformer"),
        ("train", ["weights=null", "parts.vae=a", "parts.text_encoder=b", "init=scratch", "revision=main"], "weights=null"),
        ("caption", ["apply=t.csv", "trigger=wug"], "apply=t.csv only writes"),
        ("caption", ["review=true", "template=motion"], "review=true only writes"),
        ("caption", ["review=true", "frames.per_second=3"], "review=true only writes"),
        ("caption", ["parts.vae=x"], "reads the tokenizer alone"),
        ("caption", ["model.fps=8"], "caption.py reads no such fact"),
        ("shard", ["seed=1"], "clips=all draws nothing"),
        ("shard", ["model.shift=2"], "shard.py reads no such fact"),
        ("shard", ["model.num_frames=5", "num_frames=9"], "num_frames=9 stands in its place"),
        ("shard", ["model.fps=5", "fps=native"], "fps=native stands in its place"),
        ("encode", ["cache=here"], "shards=x is a folder"),
        ("encode", ["cache_gb=5"], "shards=x is a folder"),
        ("encode", ["parts.low_noise=x"], "encode.py loads no transformer"),
        ("encode", ["model.guidance.low_noise=2"], "encode.py reads no such fact"),
        ("sample", ["prompt=x", "guidance.dense=3"], "model=tiny has the experts"),
        ("sample", ["model=tiny_dense", "guidance.high_noise=3"], 'model=tiny_dense has the experts ["dense"]'),
        ("sample", ["model=tiny_dense", "alone=true"], "one transformer"),
        ("sample", ["compare=[a,b]", "run=c"], "compare="),
        ("sample", ["model.sampling_steps=5", "steps=6"], "steps=6 stands in its place"),
        ("sample", ["model.steps=5"], "sample.py reads no such fact"),
        ("sample", ["weights=w", "runs=elsewhere"], "name no run"),
        ("export", ["inspect=f", "layout=official"], "inspect=f only says"),
        ("export", ["measure=x"], "run=null"),
        ("export", ["run=r", "model.shift=2"], "run=r was trained with its own facts"),
        ("export", ["model.precision=fp32"], "export.py reads no such fact"),
    ],
)  # fmt: skip
def test_unheard(command, words, because):
    """The key is named, and the choice that makes it meaningless."""
    error = refusal(command, words)
    assert error is not None and " has no effect: " in error and because in error, error


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("sample", ["keep=5"], "keep=5 selects pixels of a video that stay; give video=FILE too"),
        ("sample", ["mask=m.png"], "mask=m.png selects pixels of a video that stay; give video=FILE too"),
        ("sample", ["image=i.png"], "image=i.png: model=tiny takes text alone"),
        ("sample", ["model=tiny_ti2v", "last_image=i.png"], "no last image; leave it out"),
        ("sample", ["height=64"], "height and width go together"),
        ("train", ["sample=5", "model=tiny_i2v", "sample.prompts=p"], "its previews go on from held-out clips"),
        ("train", ["data.mask_types={image: 1}"], "takes no conditioning besides its text"),
        ("train", ["expert=both", "experts.low_noise.muon_lr=1e-3"], "there is no optimizer.muon_lr to differ from"),
    ],
)  # fmt: skip
def test_unheard_otherwise(command, words, told):
    """Settings that need another one, or another model, are refused before work with words of their own."""
    assert told in (refusal(command, words) or "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["expert=both", "experts.low_noise.lr=1e-3", "experts.offload=cpu"]),
        ("train", ["expert=both", "experts.low_noise.lr=1e-3", "optimizer.lr=1e-4"]),
        ("train", ["loss.mask=focus", "loss.mask_rest=0.1", "loss.mask_normalize=false", "noise.min_sigma=0.2"]),
        ("train", ["data.caption_dropout=[[0,0.3],[100,0]]", "data.batch_size=4", "noise.max_sigma=0.8"]),
        ("train", ["experts.low_noise.lr=1e-3", "experts.low_noise.shift=2"]),
        ("train", ["sample=5", "sample.prompts=p.txt", "sample.offload.experts=cpu"]),
        ("train", ["sample.prompts=null", "experts.low_noise.lr=null"]),
        ("train", ["data.shards=s3://bucket/shards", "data.cache=here"]),
        ("encode", ["shards=s3://bucket/videos", "cache=here", "cache_gb=5"]),
        ("train", ["loss.stratified=true", "loss.seed=1"]),
        ("train", [VAE, "sample=off"]),
        ("train", ["init=scratch", "check_expert=off"]),
        ("train", ["model.num_frames=9", "sample=5"]),
        (
            "caption",
            ["template=character", "trigger=a wug, mine", "recaption=own", "frames.per_second=1", "model=t2v_a14b"],
        ),
        ("caption", ["review=true", "decode.workers=1", "parts.tokenizer=x"]),
        ("caption", ["apply=t.csv", "review=false"]),
        ("shard", ["clips=random", "seed=1"]),
        ("shard", ["fps=resample", "model.fps=8"]),
        ("sample", ["guidance.high_noise=3", "prompt=x"]),
        ("sample", ["model=tiny_ti2v", "image=i.png"]),
        ("export", ["inspect=f"]),
        ("export", ["run=a,b", "runs=elsewhere", "model=tiny"]),
    ],
)
def test_heard(command, words):
    """What has an effect, or is null, is not refused; nor is a default that nobody gave."""
    assert refusal(command, words) is None


def test_check_of_shards_alone():
    """encode.py check=true takes out= and nothing else, and needs no shards=."""
    checks.check_given(config.compose("encode", ["out=y", "check=true"]), config.keys_of(["out=y", "check=true"]))
    with pytest.raises(ValueError, match=r"^area has no effect: check=true only compares"):
        words = ["out=y", "check=true", "area=1024"]
        checks.check_given(config.compose("encode", words), config.keys_of(words))
