"""What is kept of a forward changes no loss and no gradient; with weights that visit neither. What is kept is counted."""

import functools
import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from wantrain.models import WanTransformer, activation_policy, adapters, offload, partial
from wantrain.models.activation_policy import ActivationPolicy, OnHost
from wantrain.models.attention import Kernel, fused, set_kernel
from wantrain.models.offload import ModuleOffloader, blocks_to_swap

BLOCKS = 6
SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 8, "ffn_dim": 32, "num_layers": BLOCKS}


def network(how):
    """A network with random weights of which all, an adapter, or two blocks are trained."""
    torch.manual_seed(0)
    module = WanTransformer(**SIZE)
    torch.nn.init.normal_(module.head.head.weight)
    if how == "lora":
        adapters.inject(module, adapters.AdapterSettings(rank=4, alpha=4.0, targets="attention+ffn"), seed=0)
    elif how == "partial":
        partial.train_only(module, layers="1-2", tags=["attention"])
    return module


def train(module, steps, precision="fp32"):
    """Losses of so many steps of AdamW, and the gradients of the last; a forward without gradients in between."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses, timestep = [], torch.tensor([400.0])
    for step in range(steps):
        latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            if step % 7 == 1:
                with torch.no_grad():
                    module(latents, timestep, text)
            loss = module(latents, timestep, text).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def policy(module, recompute, **how):
    module.run_block = ActivationPolicy(recompute, blocks=BLOCKS, **how)
    return module


@functools.cache
def plain(how, steps, precision="fp32"):
    """Steps that keep everything."""
    return train(network(how), steps, precision)


POLICIES = [
    ("block", "gpu", 0),
    ("attention", "gpu", 0),
    (2, "gpu", 0),
    ("block", "cpu", 0),
    ("attention", "cpu", 0),
    (2, "cpu", 0),
    ("block", "gpu", BLOCKS),
    (2, "cpu", 3),
]


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["full", "lora", "partial"])
@pytest.mark.parametrize(("recompute", "activations", "swap"), POLICIES)
def test_bit_equal(how, recompute, activations, swap, steps):
    """Losses, and the last gradients, are those of a forward that keeps everything, bit for bit."""
    if swap and how == "full":
        pytest.skip("trained weights do not visit")
    module = policy(network(how), recompute, activations=activations)
    if swap:
        ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, swap))
    losses, gradients = train(module, steps)
    wanted_losses, wanted = plain(how, steps)
    assert losses == wanted_losses and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def test_bit_equal_bf16():
    """The same under autocast to bfloat16."""
    module = policy(network("lora"), "attention", activations="cpu")
    ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, 4))
    assert train(module, 5, "bf16")[0] == plain("lora", 5, "bf16")[0]


@pytest.mark.parametrize("activations", ["gpu", "cpu"])
def test_bf16_inputs(activations):
    """Kept in bfloat16, the inputs change the gradient by about the rounding of bfloat16, and by no more."""
    for how in ("full", "lora"):
        exact, near = (
            torch.cat([gradient.flatten() for gradient in train(each, 1)[1].values()])
            for each in (
                network(how),
                policy(network(how), "block", activations=activations, dtype=torch.bfloat16),
            )
        )
        assert 1e-5 < (near - exact).norm() / exact.norm() < 4e-3


class Attentions(TorchDispatchMode):
    """Counts attention's forward kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recompute", "again"), [("none", 0), ("block", 2 * BLOCKS), ("attention", BLOCKS), (2, 2 * (BLOCKS - 2))]
)
def test_attention_recomputed(recompute, again):
    """The backward computes attention again as often as the policy says: to itself and to the text in each block."""
    module = policy(network("full"), recompute)
    loss = module(torch.randn(1, 16, 2, 8, 8), torch.tensor([400.0]), torch.randn(1, 5, 8)).square().mean()
    with Attentions() as counter:
        loss.backward()
    assert counter.count == again


def test_two_inputs_on_device():
    """With activations=cpu the inputs of at most two blocks are on the device in the backward."""
    module = policy(network("lora"), "block", activations="cpu")
    inputs = module.run_block._inputs
    seen, sent_for = [], inputs._sent_for

    def count(waiting):
        found = sent_for(waiting)
        waiting.coming = found
        seen.append(sum(each.coming is not None for each in handles))
        return found

    handles, pack = [], inputs.pack
    inputs.pack = lambda x, first: handles.append(pack(x, first)) or handles[-1]
    inputs._sent_for = count
    module(torch.randn(1, 16, 2, 8, 8), torch.tensor([400.0]), torch.randn(1, 5, 8)).square().mean().backward()
    assert len(handles) == BLOCKS and all(isinstance(each, OnHost) for each in handles) and max(seen) <= 2


def test_host_memory_reused():
    """Steps reuse the pinned memory of the steps before; larger clips take larger pieces."""
    module = policy(network("lora"), "block", activations="cpu")
    free = module.run_block._inputs._free
    sizes = []
    for width in (8, 8, 12, 8):
        latents = torch.randn(1, 16, 2, 8, width)
        module(latents, torch.tensor([400.0]), torch.randn(1, 5, 8)).square().mean().backward()
        sizes.append([buffer.nbytes for buffer in free])
    assert all(len(each) == BLOCKS for each in sizes)
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] and sizes[2][0] == 1.5 * sizes[0][0]


@pytest.mark.parametrize(
    ("recompute", "how", "words"),
    [
        ("all", {}, "must be one of none, attention, block, or how many of the 6 blocks"),
        (7, {}, "recompute=7 must be"),
        (True, {}, "recompute=True must be"),
        ("none", {"activations": "cpu"}, "activations=cpu is for the inputs of recomputed blocks"),
        (6, {"dtype": torch.bfloat16}, "activations_dtype=bf16 is for the inputs of recomputed blocks"),
    ],
)
def test_refused(recompute, how, words):
    """Settings that do not go together are refused."""
    with pytest.raises(ValueError, match=words):
        ActivationPolicy(recompute, blocks=BLOCKS, **how)


@pytest.mark.parametrize(
    ("recompute", "swap", "words"),
    [
        ("block", 2, "swap.blocks=2 saves nothing"),
        ("none", 3, "only recomputed blocks can be swapped, and 0 are"),
        (2, 5, "only recomputed blocks can be swapped, and 4 are"),
    ],
)
def test_swap_refused(recompute, swap, words):
    """A block that keeps its activations, or too few, cannot be swapped."""
    with pytest.raises(ValueError, match=words):
        blocks_to_swap(policy(network("lora"), recompute), swap)


def test_trained_blocks_not_swapped():
    """A block that trains all its weights has none that could wait on the host."""
    with pytest.raises(ValueError, match=r"block 3 trains all its weights"):
        blocks_to_swap(policy(network("full"), "block"), 3)


def test_last_blocks_swapped():
    """The last recomputed blocks are swapped: two of them at a time have copies, and trained weights stay."""
    module = policy(network("lora"), 1)
    hosts = {}
    names = ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, 3))
    assert {name.split(".")[1] for name in names} == {"2", "3", "4"} and not any(".lora_" in name for name in names)
    hosts = {name: module.get_parameter(name).data_ptr() for name in names}
    seen = []
    for number, block in enumerate(module.blocks):
        block.ffn.register_forward_hook(lambda *_, number=number: seen.append((number, there())))

    def there():
        return {name.split(".")[1] for name, place in hosts.items() if module.get_parameter(name).data_ptr() != place}

    module(torch.randn(1, 16, 2, 8, 8), torch.tensor([400.0]), torch.randn(1, 5, 8)).square().mean().backward()
    assert all(str(number) in blocks for number, blocks in seen if number in {2, 3, 4})
    assert max(len(blocks) for _, blocks in seen) == 2
    again = [number for number, _ in itertools.islice(seen, BLOCKS, None)]
    assert again == [4, 3, 2, 1, 0], "the backward visits them in turn"


class LateCopies:
    """A copy stream whose copies come as late as they may: with the wait for them, or for a later one. Until then the
    target holds rubbish. The source is read only then, so one that was overwritten meanwhile shows as well.
    """

    def __init__(self, device):
        self.pending = []

    def copy(self, pairs):
        pairs = list(pairs)
        for target, _ in pairs:
            target.detach().view(torch.uint8).fill_(0xFF)  # NaN in fp32 and bf16
        self.pending.append(pairs)
        return pairs

    @torch.no_grad()
    def wait(self, event):
        while any(pairs is event for pairs in self.pending):
            for target, source in self.pending.pop(0):
                target.copy_(source)


class NoWait(LateCopies):
    """Copies that nobody waits for."""

    def wait(self, event):
        pass


@pytest.fixture
def late(monkeypatch):
    """Has what waits on the host come by late copies."""
    for module in (activation_policy, offload):
        monkeypatch.setattr(module, "CopyStream", LateCopies)


def trained(how, recompute, activations, swap):
    module = policy(network(how), recompute, activations=activations)
    if swap:
        ModuleOffloader(torch.device("cpu")).add(module, whole=False, blocks=blocks_to_swap(module, swap))
    return train(module, 3)


@pytest.mark.parametrize("how", ["lora", "partial"])
@pytest.mark.parametrize(("recompute", "activations", "swap"), [each for each in POLICIES if each[1:] != ("gpu", 0)])
def test_late_copies(late, how, recompute, activations, swap):
    """Nothing is used before it has arrived, and nothing that is being copied is overwritten."""
    losses, gradients = trained(how, recompute, activations, swap)
    wanted_losses, wanted = plain(how, 3)
    assert losses == wanted_losses and gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())


def test_late_experts(late):
    """Two experts that take turns on the device give what they give alone."""
    offloader, inputs = (
        ModuleOffloader(torch.device("cpu")),
        (torch.randn(1, 16, 2, 8, 8), torch.tensor([400.0]), torch.randn(1, 5, 8)),
    )
    names = ["lora", "partial"]
    experts = [network(name) for name in names]
    for expert in experts:
        offloader.add(expert)
    for expert, name in zip([*experts, *experts], [*names, *names], strict=True):
        assert torch.equal(expert(*inputs), network(name)(*inputs))


@pytest.mark.parametrize(("forgetful", "swap"), [(activation_policy, 0), (offload, BLOCKS)])
def test_missing_wait_shows(late, monkeypatch, forgetful, swap):
    """Where nobody waits for the copies, results differ: the tests above can fail."""
    monkeypatch.setattr(forgetful, "CopyStream", NoWait)
    losses, _ = trained("lora", "block", "cpu", swap)
    assert losses != plain("lora", 3)[0]


def test_fused_kernel_kept():
    """A kernel that is named is kept like the one that torch chooses: bit-equal, and attention to the text alone is
    computed again."""
    module, unkept = policy(network("lora"), "attention"), network("lora")
    for each in (module, unkept):
        set_kernel(each, Kernel("flash2", fused(SDPBackend.FLASH_ATTENTION)))
    losses, gradients = train(module, 3)
    assert (losses, gradients.keys()) == (train(unkept, 3)[0], plain("lora", 3)[1].keys())
    loss = module(torch.randn(1, 16, 2, 8, 8), torch.tensor([400.0]), torch.randn(1, 5, 8)).square().mean()
    with Attentions() as counter:
        loss.backward()
    assert counter.count == BLOCKS
