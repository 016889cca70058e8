"""What an expert starts from: a base's own part or random values, with its adapter if there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wantrain.models import Base, WanVAE, adapters, partial
from wantrain.models.activation_policy import DTYPES, ActivationPolicy
from wantrain.models.adapters import AdapterSettings, KroneckerSettings
from wantrain.models.attention import DEFAULT, Kernel, set_kernel
from wantrain.models.compiling import BlockCompiler
from wantrain.models.facts import blocks_of
from wantrain.models.formats.base import stated_expert
from wantrain.models.formats.loading import cast_as_loaded
from wantrain.models.formats.lora import read_lora
from wantrain.models.formats.lora_expert import check_lora_expert
from wantrain.models.quantize import FORMATS, Format
from wantrain.models.sequence import SequenceParallel
from wantrain.training.trainable import Autoencoder, TrainableModule
from wantrain.util.console import say
from wantrain.util.files import made_by
from wantrain.util.seeds import seed_at

#: The dtypes of weights that are stored in full.
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters have shapes and no values (on the meta device): it takes no memory."""
    with torch.device("meta"):
        return make()


@dataclass(frozen=True)
class Initializer:
    """What a run starts from, and what becomes of it.

    make     builds the module with random values
    base     where trained weights lie
    init     base: the base's weights; expand_input_channels: those, with zeros for the input channels that it lacks;
             scratch: random values
    recipe   the recipe's name, for the files that are written
    device, dtype  what weights that stay frozen are loaded to
    trained        dtype of those that are trained, but for what the model keeps in float32
    base_dtype  base.dtype=: fp32 or bf16 instead of `dtype`, or the format in which the blocks' frozen weights are
                stored; None: `dtype`, or that of an fp8 file
    low_rank    base.low_rank=: rank of the product beside each weight that is stored so; None: there is none
    activations    recompute, activations and activations_dtype: what is kept of a forward
    kernel         what a transformer attends with
    compiler       compiles its blocks; None: they stay as they are
    sequence       the processes that share its tokens; None: this one computes them all
    mapped   a transformer's weights stay in mapped files, in their dtypes, until an engine takes its part of them
    """

    make: Callable[[], nn.Module]
    model: Mapping[str, Any]
    expert: Mapping[str, Any]
    adapter: Mapping[str, Any]
    base: Base
    init: str
    seed: int
    device: torch.device
    dtype: torch.dtype
    recipe: str | None = None
    activations: Mapping[str, Any] = field(default_factory=dict)
    base_dtype: str | None = None
    low_rank: int | None = None
    trained: torch.dtype = torch.float32
    kernel: Kernel = DEFAULT
    compiler: BlockCompiler | None = None
    sequence: SequenceParallel | None = None
    mapped: bool = False

    @classmethod
    def of(cls, make: Callable[[], nn.Module], settings: Mapping[str, Any], **more: Any) -> Initializer:
        """A start by an expert's own settings, train.py's; `more` is the rest: base, device, dtype, recipe, kernel,
        compiler, sequence, mapped.
        """
        parts = {key: settings[key] for key in ("model", "expert", "adapter", "seed")}
        kept = {key: settings[key] for key in ("recompute", "activations", "activations_dtype")}
        base = {"base_dtype": settings["base"]["dtype"], "low_rank": settings["base"]["low_rank"]}
        trained = PLAIN[settings["trained"]["dtype"]]
        return cls(make, **parts, init=settings["init"], activations=kept, trained=trained, **base, **more)

    def trainable(self) -> TrainableModule:
        """The module to train, with its adapter if there is one. ValueError where there is nothing to start from."""
        module = self.module()
        if isinstance(module, WanVAE):
            module = Autoencoder(module)
        else:
            self.set_activations(module)
            set_kernel(module, self.kernel)
            if self.sequence is not None:
                self.sequence.split(module)
        settings = self.adapt(module)
        self.check_trained(module)
        if self.compiler is not None:
            self.compiler.compile(module)
        if origin := self.adapter.get("init"):
            layers = f"{len(adapters.adapter_layers(module))} layers"
            sizes = "" if settings["rank"] is None else f", rank {settings['rank']}, alpha {settings['alpha']:g}"
            say(f"the adapter goes on from {origin}: {layers}{sizes}")
        about = {"expert": self.expert["name"], "model": self.model["name"], "boundary": self.model["boundary"]}
        about |= {"base": self.base.name, "recipe": self.recipe, "made_by": made_by(), **settings}
        metadata = {key: str(value) for key, value in about.items() if value is not None and value is not False}
        frozen = self.frozen_dtype if self.mapped and self.is_transformer else None
        return TrainableModule(module, self.expert["part"], metadata, frozen)

    def set_activations(self, module: nn.Module) -> None:
        """Have a transformer keep of its forward what the settings say. ValueError if they do not go together."""
        kept = self.activations
        module.run_block = ActivationPolicy(  # type: ignore[assignment]
            kept["recompute"],
            blocks=len(blocks_of(module)),
            activations=kept["activations"],
            dtype=DTYPES[kept["activations_dtype"]],
        )

    def module(self) -> nn.Module:
        """What the expert starts from: the base's own part, else random values; says which it was.

        ValueError if the base's boundary is not the model's, if what it holds is another expert, if there is neither a
        part nor leave to start from random values, or if an adapter has no base.
        """
        name = self.expert["name"]
        if self.init != "scratch" and self.base.holds(name):
            if name not in self.base.parts:
                self.base.check_boundary(self.model["boundary"])
            module = self._open_vae() if name == "vae" else self._open_transformer(name)
            say(f"{name} starts from {self.base.find(name)}")
            return module
        if self.adapter["name"] != "none":
            raise ValueError(
                f"adapter={self.adapter['name']} changes a trained model, but {self.base} holds no {name}; "
                "give weights=FOLDER with a pipeline (assets/wan-tiny is one)"
            )
        if self.init == "expand_input_channels" or (self.init == "base" and not self.model["scratch"]):
            raise ValueError(
                f"weights={self.base} holds no {name}; give the folder that does, parts.{name}=, or init=scratch"
            )
        # Parameters are drawn by what is trained, never by what else happened to ask for random numbers before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_at(self.seed, "weights", name))
            module = self.make()
        cast_as_loaded(module, self.trained)
        say(f"{name} starts from random values")
        return module

    def _open_transformer(self, name: str) -> nn.Module:
        kind, fp32 = self.adapter["name"], []
        if kind == "partial" and self.trained == torch.float32:
            names = [name for name, _ in without_values(self.make).named_parameters()]
            fp32 = partial.choose(names, layers=self.adapter["layers"], tags=self.adapter["tags"])
        stored = self.stored_format(self.base.is_fp8(name))
        if stored is not None:
            say(f"{name}: the frozen weights of the blocks are stored in {stored}")
        dtype = self.trained if kind == "none" else self.frozen_dtype
        how: dict[str, Any] = {"device": self.device, "dtype": dtype, "fp32": fp32, "stored": stored}
        # A DoRA's magnitudes are computed from the frozen weights as training has them.
        how["mapped"] = self.mapped and stored is None and kind != "dora"
        return self.base.transformer(name, expand_inputs=self.init == "expand_input_channels", **how)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The dtype of frozen weights that are not stored in fewer bytes."""
        return PLAIN.get(str(self.base_dtype), self.dtype)

    def stored_format(self, is_fp8: bool) -> Format | None:
        """The format in which the blocks' frozen weights are stored; None: in full.

        is_fp8  whether the base's own file is in float8
        ValueError if base.dtype= is another one, if there is nothing to fit a product to, or if weights in float8 would
        be trained.
        """
        asked, kind = self.base_dtype, self.adapter["name"]
        if is_fp8 and kind not in adapters.ADAPTERS:
            raise ValueError(
                f"{self.base} is stored in fp8, and adapter={kind} would train its rounded weights; give adapter=lora, "
                "dora or lokr, or the fp16 or bf16 file of the same model"
            )
        if is_fp8 and asked not in {None, "fp8"}:
            raise ValueError(
                f"base.dtype={asked}: {self.base} is stored in fp8, and its own bytes are used; leave base.dtype out, "
                "or give the fp16 or bf16 file of the same model"
            )
        if is_fp8 and self.low_rank is not None:
            raise ValueError(
                f"base.low_rank={self.low_rank}: {self.base} is stored in fp8, which does not hold what its rounding "
                "took; leave base.low_rank out, or give the fp16 or bf16 file of the same model"
            )
        name = "fp8" if is_fp8 else asked
        return Format(name, self.low_rank) if name in FORMATS else None

    def _open_vae(self) -> nn.Module:
        vae = self.base.vae()
        for part in [vae] if self.expert["trains"] == "all" else [vae.decoder, vae.post_quant_conv]:
            part.requires_grad_(True)
        return vae

    def adapt(self, module: nn.Module) -> dict[str, object]:
        """Put the adapter in, or freeze all but a part; returns the settings as they are (a file to go on from has its
        own)."""
        settings = {key: value for key, value in self.adapter.items() if key not in {"name", "init"}}
        kind = self.adapter["name"]
        if kind == "none":
            return {}
        if kind == "partial":
            partial.train_only(module, **settings)
            return settings
        seed, given = seed_at(self.seed, "adapter"), self.adapter["init"]
        if given is None:
            own = dict(settings)
            if kind == "lokr":
                own["lokr"] = KroneckerSettings(own.pop("factor"), own.pop("decompose_both"))
            adapters.inject(module, AdapterSettings(**own, dora=kind == "dora"), seed=seed)
            return settings
        lora = read_lora(given, expert=self.expert["name"])
        check_lora_expert(given, lora.metadata, self.expert["name"], key="adapter.init")
        if lora.kind != kind:
            raise ValueError(
                f"adapter.init={given} was trained with adapter={lora.kind}; give that, not adapter={kind}"
            )
        model = lora.metadata.get("model", self.model["name"])
        if model != self.model["name"]:
            raise ValueError(f"adapter.init={given} was trained for model={model}, not for model={self.model['name']}")
        adapters.inject_lora(module, lora, seed=seed, where=given)
        first = next(iter(adapters.adapter_layers(module).values()))
        return {"rank": first.rank, "alpha": first.alpha, "targets": "as in the file"}

    def check_trained(self, module: nn.Module) -> None:
        """ValueError unless what is trained is what the adapter says: its own weights and no other, or every weight."""
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        kind = self.adapter["name"]
        if kind in adapters.ADAPTERS:
            wrong = [name for name, moves in trained.items() if moves != adapters.is_of_adapter(name)]
        else:
            wrong = [name for name, moves in trained.items() if not moves and kind == "none" and self.is_transformer]
        if wrong:
            state = "is trained" if trained[wrong[0]] else "is frozen"
            raise ValueError(
                f"adapter={kind}: {wrong[0]} {state}, as are {len(wrong) - 1} other parameters; it should not be. "
                "This is a fault of the program, please report it"
            )

    @property
    def is_transformer(self) -> bool:
        """False where a recipe trains a VAE, parts of which may stay as they are."""
        return bool(self.expert["name"] != "vae")

    def is_measurable(self) -> bool:
        """True if what is trained is a base's own expert, so that its noise profile should be that expert's."""
        path = None if self.init == "scratch" else self.base.find(self.expert["name"])
        return (
            path is not None and self.expert["name"] in {"high_noise", "low_noise"} and stated_expert(path) != "dense"
        )
