"""Which part of a transformer trains: exact sets, by block and by tag; everything else stays as it is."""

from functools import partial as given

import pytest
import torch

from wantrain.models import WanTransformer, partial
from wantrain.training.engine.optim import build_optimizer

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 48, "num_layers": 3}
LINEAR = ("weight", "bias")
ATTENTION = [*(f"{part}.{end}" for part in "qkvo" for end in LINEAR), "norm_q.weight", "norm_k.weight"]
#: What each tag means in one block (13 lists would say it shorter and hide a mistake in the patterns).
IN_A_BLOCK = {
    "self_attn": {f"self_attn.{name}" for name in ATTENTION},
    "cross_attn": {f"cross_attn.{name}" for name in ATTENTION},
    "ffn": {f"ffn.{layer}.{end}" for layer in (0, 2) for end in LINEAR},
    "modulation": {"modulation"},
    "norm": {"norm3.weight", "norm3.bias"}
    | {f"{kind}_attn.norm_{side}.weight" for kind in ("self", "cross") for side in "qk"},
}
IN_A_BLOCK["attention"] = IN_A_BLOCK["self_attn"] | IN_A_BLOCK["cross_attn"]
OUTSIDE = {
    "text_embedding": {f"text_embedding.{layer}.{end}" for layer in (0, 2) for end in LINEAR},
    "time_embedding": {f"{layer}.{end}" for layer in ("time_embedding.0", "time_embedding.2") for end in LINEAR}
    | {f"time_projection.1.{end}" for end in LINEAR},
    "patch_embedding": {f"patch_embedding.{end}" for end in LINEAR},
    "head": {"head.modulation", *(f"head.head.{end}" for end in LINEAR)},
}


def model():
    torch.manual_seed(0)
    made = WanTransformer(**SIZE)
    torch.nn.init.normal_(made.head.head.weight, std=0.2)
    return made


def of(blocks, *tags):
    """Names by hand: what the tags mean in these blocks, and outside."""
    inside = {f"blocks.{block}.{name}" for block in blocks for tag in tags for name in IN_A_BLOCK.get(tag, ())}
    return inside | {name for tag in tags for name in OUTSIDE.get(tag, ())}


EVERYTHING = ("attention", "ffn", "modulation", "norm")
CASES = [({"layers": None, "tags": [tag]}, of(range(3), tag)) for tag in (*IN_A_BLOCK, *OUTSIDE)] + [
    ({"layers": "0-1", "tags": None}, of((0, 1), *EVERYTHING)),
    ({"layers": 2, "tags": None}, of((2,), *EVERYTHING)),
    ({"layers": [2, "0"], "tags": ["cross_attn", "norm"]}, of((0, 2), "cross_attn", "norm")),
    ({"layers": ["0-1", "1-2"], "tags": "ffn"}, of(range(3), "ffn")),
    ({"layers": [1], "tags": ["attention", "head", "time_embedding"]}, of((1,), "attention", "head", "time_embedding")),
]


@pytest.mark.parametrize(("how", "wanted"), CASES, ids=[f"{how['layers']} {how['tags']}" for how, _ in CASES])
def test_chosen_parameters_train(how, wanted):
    """Exactly the chosen parameters train, and a step changes no other."""
    made = model()
    partial.train_only(made, **how)
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    assert {name for name, parameter in made.named_parameters() if parameter.requires_grad} == wanted
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 3, 4, 6, generator=generator)
    made(latents, torch.tensor([900.0, 30.0]), torch.randn(2, 5, 8, generator=generator)).square().sum().backward()
    assert {name for name, parameter in made.named_parameters() if parameter.grad is not None} == wanted
    build_optimizer(given(torch.optim.AdamW, lr=1e-3), made).step()
    assert {name for name, value in made.named_parameters() if not torch.equal(value, before[name])} == wanted


def test_tags_cover_parameters():
    """The tags together cover every parameter, each with the stated number of tensors."""
    names = {name for name, _ in model().named_parameters()}
    tags = {tag: set(partial.choose(names, layers=None, tags=[tag])) for tag in WanTransformer.tags.names}
    assert set.union(*tags.values()) == names
    assert {tag: len(found) for tag, found in tags.items()} == {
        "attention": 60, "self_attn": 30, "cross_attn": 30, "ffn": 12, "modulation": 3, "norm": 18,
        "text_embedding": 4, "time_embedding": 6, "patch_embedding": 2, "head": 3,
    }  # fmt: skip


def test_block_selection():
    """layers=1 does not select block 11; a selection in the published model has the exact number of parameters."""
    with torch.device("meta"):
        names = dict(WanTransformer().named_parameters())
    one = partial.choose(names, layers=1, tags=None)
    assert {name.split(".")[1] for name in one} == {"1"} and len(one) == 27
    half = partial.choose(names, layers="0-19", tags=["self_attn"])
    assert sum(names[name].numel() for name in half) == 20 * (4 * (5120 * 5120 + 5120) + 2 * 5120)


@pytest.mark.parametrize(
    ("layers", "tags", "words"),
    [
        (None, None, "adapter=partial trains the part .*for every weight give adapter=none"),
        (3, None, "adapter.layers: 3 is out of range; this model has 3 blocks, 0 to 2"),
        ("0-9", None, "adapter.layers: 0-9 is out of range; this model has 3 blocks, 0 to 2"),
        ("2-1", None, "adapter.layers: 2-1 is no block; give numbers or ranges"),
        ([0, "last"], None, "adapter.layers: last is no block"),
        (-1, None, "adapter.layers: -1 is no block"),
        (1.5, None, "adapter.layers: 1.5 is no block"),
        ([], None, r"adapter.layers=\[\] leaves 0 of 3 blocks to train"),
        (None, [], r"adapter.tags=\[\] leaves 0 weights to train; choose out of attention, self_attn"),
        (None, ["ffn", "attn"], "adapter.tags: attn is unknown; choose out of attention, self_attn, .*, head"),
        ("0-1", ["head"], "adapter.layers=0-1 chooses 2 of 3 blocks, but adapter.tags=head lies outside them"),
    ],
)
def test_bad_selection(layers, tags, words):
    """The error for a wrong selection states the valid range or names."""
    made = model()
    with pytest.raises(ValueError, match=words):
        partial.train_only(made, layers=layers, tags=tags)
