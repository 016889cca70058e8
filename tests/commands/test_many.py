"""Ten thousand clips, from footage to the end of an epoch, with nobody watching."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from wantrain.video import write_mp4

ROOT = Path(__file__).resolve().parent.parent.parent
FILES, CLIPS_OF_EACH, FRAMES = 500, 20, 5
#: What a process and its children may grow by from the second fifth of its time to the last.
GROWTH = 40 << 20


#: What is freed is given back at once, so that what is seen is what is in use: glibc otherwise raises these thresholds as
#: it goes, and keeps a hundred MiB for later.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def in_use(pid):
    """Bytes of a process's memory that are its own (shared ones by share): not what it maps of a file.

    Latents are read where their shards are mapped. Those pages are the kernel's, which keeps them while it has room;
    they grow to the shards' size and no further.
    """
    said = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(said[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem"))


def watched(name, *args, cwd, environment):
    """Run a command and watch the memory of it and its children all along; its output."""
    log, seen, environment = cwd / f"{name}.log", [], environment | RETURNING
    with log.open("w") as file:
        command = [sys.executable, str(ROOT / name), *map(str, args)]
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file)
        family = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                seen.append(sum(in_use(each.pid) for each in [family, *family.children(recursive=True)]))
            except (psutil.Error, OSError, KeyError):  # one has just ended
                continue
            time.sleep(0.2)
    assert process.returncode == 0, log.read_text()[-3000:]
    fifth = max(1, len(seen) // 5)
    # Means: a batch in work takes a hundred MiB and gives them back, which is no growth.
    early, late = (np.mean(part) for part in (seen[fifth : 2 * fifth], seen[-fifth:]))
    print(f"{name}: {len(seen) * 0.2:.0f} s, {early / 2**20:.0f} -> {late / 2**20:.0f} MiB")
    assert late - early < GROWTH
    return log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_clips(tiny, environment, tmp_path):
    """All commands process ten thousand clips, and their memory does not grow."""
    random = np.random.default_rng(0)
    (tmp_path / "footage").mkdir()
    for number in range(FILES):
        coarse = random.integers(0, 256, (FRAMES * CLIPS_OF_EACH, 4, 4, 3), dtype=np.uint8)
        write_mp4(tmp_path / "footage" / f"{number:04d}.mp4", coarse.repeat(8, axis=1).repeat(8, axis=2), 16)
        (tmp_path / "footage" / f"{number:04d}.txt").write_text(f"noise number {number % 50}")
    places = {"cwd": tmp_path, "environment": environment}
    watched("shard.py", "source=footage", "out=videos", "num_frames=5", "shard_mb=1", **places)
    watched("encode.py", "shards=videos", "out=latents", f"weights={tiny.base}", "area=1024", **places)
    count = FILES * CLIPS_OF_EACH
    for folder in ("videos", "latents"):
        manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
        assert manifest["clips"] == count and manifest["stats"]["clips"]["dropped"] == {}
    train = [argument for argument in tiny.train if not argument.startswith("data.shards=")]
    more = ("init=scratch", "run=r", "data.shards=latents", "data.holdout=0", "batch_size=16", "sample.every=100000")
    watched("train.py", *train, *more, f"steps={count // 16}", **places)
    rows = [json.loads(line) for line in (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]  # step 0 has a preview alone
    assert len(losses) == count // 16 and np.isfinite(losses).all()
