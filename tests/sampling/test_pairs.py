"""sample.py pairs=: two videos per prompt, their captions, and a page that shows them without their seeds."""

import json
import re

from wantrain.data.footage.sources import find_footage

SMALL = (
    *("height=32", "width=32", "num_frames=5", "steps=1"),
    *("model.transformer.num_layers=2", "model.transformer.ffn_dim=64", "model.transformer.attention_head_dim=32"),
)
PROMPTS = ["a red ring", 'eine "Katze" <b>&</b>, 一只猫']


def test_pairs_folder(pair, call, tmp_path):
    """Each prompt has pairs of its own samples; the folder is footage for shard.py as it is; nothing is made again."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    run = ("sample.py", f"weights={pair}", "prompts=prompts.txt", "pairs=p", "count=2", "batch_size=8", *SMALL)
    ended = call(*run)
    assert "p/pairs.html shows 4 pairs, 4 of them of these prompts" in ended.stdout
    samples = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "p").glob("*_seed_*.json")}
    assert sorted((each["prompt"], each["seed"]) for each in samples.values()) == sorted(
        (prompt, seed) for prompt in PROMPTS for seed in range(4)
    )
    document = (tmp_path / "p" / "pairs.html").read_text(encoding="utf-8")
    shown = re.findall(r'data-file="([^"]+)"', document)
    for one, other in zip(shown[::2], shown[1::2], strict=True):
        left, right = (samples[name.removesuffix(".mp4")] for name in (one, other))
        assert left["prompt"] == right["prompt"] and abs(left["seed"] - right["seed"]) == 1
    assert len(set(shown)) == 8 and "eine &#34;Katze&#34; &lt;b&gt;" in document
    footage = find_footage(tmp_path / "p")
    assert {file.annotation.captions[0] for file in footage.footage} == set(PROMPTS) and footage.rejects == []
    assert "8 of 8 videos are there already" in call(*run).stdout
    error = call(*run, "out=elsewhere", check=False).error
    assert error == "out has no effect: pairs=p is the folder"
