"""compile=blocks in whole runs: under each engine the losses and gradients are those of a run without it."""

import json

import pytest

STEPS = 6
SHORT = ("batch_size=4", f"steps={STEPS}", f"checkpoint.every={STEPS}", "validation.every=0", "optimizer.lr=1e-3")
WHAT = {
    "full": (*SHORT, "recompute=block"),
    "lora": (*SHORT, "adapter=lora", "adapter.rank=4", "accumulate=2", "recompute=attention"),
}


def rows(run):
    """What a run logged of its steps."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eager(tiny, pair, inside, tmp_path_factory):
    """Runs of one process that compile nothing."""
    folder = tmp_path_factory.mktemp("eager")
    for name, how in WHAT.items():
        inside(folder, "train.py", *tiny.train, f"weights={pair}", *how, f"run={name}")
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "what", "more"),
    [
        ("single", "lora", ()),
        ("ddp", "lora", ()),
        ("ddp", "full", ()),
        ("fsdp2", "lora", ()),
        ("fsdp2", "full", ()),
        ("ddp", "lora", ("sequence_parallel=2",)),  # a block exchanges tokens
    ],
)
def test_compiled_run(engine, what, more, eager, tiny, pair, call, launch, tmp_path):
    """Losses and norms of gradients are within 1e-5 of the run without compile, through six updates; the log says how
    many graphs there were.
    """
    given = (*tiny.train, f"weights={pair}", *WHAT[what], *more, "compile=blocks", "run=compiled")
    ended = call("train.py", *given) if engine == "single" else launch(engine, *given)
    found, wanted = rows(tmp_path / "runs" / "compiled"), rows(eager / what)
    for key in ("loss", "grad_norm"):
        apart = [abs(ours[key] - theirs[key]) / theirs[key] for ours, theirs in zip(found, wanted, strict=True)]
        assert max(apart) <= 1e-5, f"{engine} {what}: {key} {max(apart):.1e}"
    lines = [line for line in ended.stdout.splitlines() if line.startswith("compile: a block for ")]
    assert len(lines) == found[-1]["compiled_graphs"] <= 4
    assert found[-1]["compile_seconds"] > 0 and "warning" not in ended.stdout
