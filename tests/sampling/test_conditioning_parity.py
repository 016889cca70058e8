"""Image-to-video, first-last-frame and TI2V-5B in both its uses against diffusers' pipelines: conditions, outputs, gradients."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from wantrain.batch import Batch
from wantrain.conditioning import ModelInputs, encode, model_inputs
from wantrain.geometry import Bucket
from wantrain.losses.flow_matching import velocity_error
from wantrain.models import WanTransformer, WanVAE
from wantrain.models.formats.pipeline import _scheduler
from wantrain.models.formats.weights import renamed_to_diffusers
from wantrain.sampling import Experts, Sampler, Settings, generate
from wantrain.sampling.conditioning import fit_image
from wantrain.sampling.generate import Texts

#: The two ways as tiny models: I2V-A14B's channels (16 noisy + 4 mask + 16 image), TI2V-5B's VAE and one channel count.
SHAPES = {
    "channel_concat": ({"in_channels": 36, "out_channels": 16}, {"base_dim": 8}),
    "clean_frames": (
        {"in_channels": 48, "out_channels": 48},
        {"base_dim": 6, "decoder_base_dim": 10, "z_dim": 48, "is_residual": True, "patch_size": 2},
    ),
}
FRAMES, HEIGHT, WIDTH = 9, 32, 64


def scramble(module):
    """The module with none of its weights at their default."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.3 * noise
        else:
            value = 0.2 * noise if parameter.ndim < 2 else noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)
    return module


@pytest.fixture(scope="module", params=SHAPES)
def both(request):
    """(conditioning, our transformer and VAE, diffusers' pipeline of the same weights)."""
    shape, small = SHAPES[request.param]
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 24, "ffn_dim": 64, "num_layers": 2}
    model, vae = scramble(WanTransformer(**size, **shape)), scramble(WanVAE(**small)).eval().requires_grad_(False)
    keys = {"patch_size", "cross_attn_norm", "qk_norm", *size, *shape} - {"text_length"}
    peer = WanTransformer3DModel(**{key: value for key, value in model.config().items() if key in keys})
    peer.load_state_dict(renamed_to_diffusers(model.state_dict()))
    peer_vae = AutoencoderKLWan.from_config(vae.config()).eval()
    peer_vae.load_state_dict(vae.state_dict())
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=peer_vae,
        scheduler=UniPCMultistepScheduler.from_config(_scheduler(5.0)),
        transformer=peer,
        expand_timesteps=request.param == "clean_frames",
    )
    pipe.set_progress_bar_config(disable=True)
    return request.param, model, vae, pipe


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def record(vae, conditioning, *, last=False):
    """The conditioning input of a clip of which the first image is known, and with `last` the last one."""
    pixels = torch.randn(1, 3, FRAMES, HEIGHT, WIDTH)  # unknown pixels must not matter
    known = torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    for place, seed in ((0, 1), (-1, 2))[: 1 + last]:
        pixels[:, :, place], known[:, :, place] = fit_image(picture(seed), (HEIGHT, WIDTH), conditioning), True
    strides = {"temporal_stride": vae.temporal_stride, "spatial_stride": vae.spatial_stride}
    return encode(vae.encode, pixels, known, conditioning=conditioning, **strides)


def cases(conditioning):
    return (False, True) if conditioning == "channel_concat" else (False,)


def noise(vae, seed=7):
    shape = (1, vae.z_dim, 3, HEIGHT // vae.spatial_stride, WIDTH // vae.spatial_stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_conditioning_matches_diffusers(both):
    conditioning, _, vae, pipe = both
    for last in cases(conditioning):
        ours = record(vae, conditioning, last=last)
        images = [pipe.video_processor.preprocess(Image.fromarray(picture(seed)), HEIGHT, WIDTH) for seed in (1, 2)]
        asked = {"batch_size": 1, "num_channels_latents": vae.z_dim, "height": HEIGHT, "width": WIDTH}
        given = {"num_frames": FRAMES, "latents": noise(vae), "dtype": torch.float32, "device": torch.device("cpu")}
        theirs = pipe.prepare_latents(images[0], **asked, **given, last_image=images[1] if last else None)
        made = model_inputs(ours, conditioning)
        if conditioning == "channel_concat":
            channels = made.conditioning["concat_BCTHW"]
            assert torch.equal(channels[:, :4], theirs[1][:, :4])
            assert (channels[:, 4:] - theirs[1][:, 4:]).abs().max() < 1e-5
            assert channels[:, 4:, 1:].square().mean() > 0.01, "gray is encoded: its latents are not zero"
        else:
            assert (ours.latents_BCTHW[:, :, :1] - theirs[1]).abs().max() < 1e-5
            assert torch.equal(made.noised_BT[0], theirs[2][0, 0, :, 0, 0]) and made.noised_BT.tolist() == [[0, 1, 1]]


def last_latents(pipe, vae, texts, **more):
    """What a pipeline has after its last step."""
    steps = []

    def note(pipe, step, timestep, kept):
        steps.append(kept["latents"].clone())
        return kept

    asked = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 3, "guidance_scale": 3.5}
    embedded = {"prompt_embeds": texts[:1], "negative_prompt_embeds": texts[1:], "latents": noise(vae)}
    pipe(**asked, **embedded, **more, output_type="latent", callback_on_step_end=note)
    assert steps[-1].std() > 0.3
    return steps[-1]


def sampled(model, pipe, texts, latents, inputs):
    return generate(
        Experts({"dense": model}),
        latents=latents,
        texts=Texts(texts[:1], texts[1:]),
        sigmas=pipe.scheduler.sigmas,
        guidance={"dense": 3.5},
        inputs=inputs,
    )


def test_sampling_matches_diffusers(both):
    conditioning, model, vae, pipe = both
    texts = torch.randn(2, 512, 24, generator=torch.Generator().manual_seed(3))
    for last in cases(conditioning):
        images = [Image.fromarray(picture(seed)) for seed in (1, 2)]
        theirs = last_latents(pipe, vae, texts, image=images[0], last_image=images[1] if last else None)
        known, start = record(vae, conditioning, last=last), noise(vae)
        if conditioning == "clean_frames":
            start[:, :, 0] = known.latents_BCTHW[:, :, 0]
        ours = sampled(model, pipe, texts, start, model_inputs(known, conditioning))
        kept = 0 if conditioning == "channel_concat" else 1  # diffusers puts the clean frame in after the last step
        assert (ours - theirs)[:, :, kept:].abs().max() < 2e-4 * theirs.abs().max()
        assert conditioning == "channel_concat" or torch.equal(ours[:, :, 0], known.latents_BCTHW[:, :, 0])


def test_text_to_video_matches_diffusers(both):
    """A model of clean frames makes video from text alone as diffusers does; channel_concat cannot."""
    conditioning, model, vae, pipe = both
    if conditioning == "channel_concat":
        with pytest.raises(ValueError, match="takes 36 input channels, got 16"):
            model(noise(vae), torch.tensor([500.0]), torch.zeros(1, 5, 24))
        return
    texts = torch.randn(2, 512, 24, generator=torch.Generator().manual_seed(3))
    parts = {"tokenizer": None, "text_encoder": None, "vae": pipe.vae, "transformer": pipe.transformer}
    plain = WanPipeline(**parts, scheduler=pipe.scheduler, expand_timesteps=True)
    plain.set_progress_bar_config(disable=True)
    theirs = last_latents(plain, vae, texts)
    for noised in (None, torch.ones(1, 3)):
        ours = sampled(model, plain, texts, noise(vae), ModelInputs(noised_BT=noised))
        assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()


def test_loss_and_gradients_match_diffusers(both):
    conditioning, model, vae, pipe = both
    x0, generator = noise(vae, 8), torch.Generator().manual_seed(9)
    text, eps = torch.randn(1, 512, 24, generator=generator), torch.randn(x0.shape, generator=generator)
    for last in cases(conditioning):
        ours = record(vae, conditioning, last=last)
        if conditioning == "clean_frames":
            x0[:, :, 0] = ours.latents_BCTHW[:, :, 0]  # as in training: the known frame is the clip's own
        made = model_inputs(ours, conditioning)
        batch = Batch(x0, text, ("clip",), (0,), made.conditioning, made.noised_BT)
        model.zero_grad()
        error = velocity_error(model, batch, torch.tensor([0.731]), eps)
        error.sum().backward()

        noisy = 0.269 * x0 + 0.731 * eps
        level = torch.tensor([731.0])
        if conditioning == "channel_concat":
            noisy = torch.cat([noisy, made.conditioning["concat_BCTHW"]], dim=1)
        else:
            noisy[:, :, 0] = x0[:, :, 0]
            first = torch.ones(1, 3, HEIGHT // vae.spatial_stride // 2, WIDTH // vae.spatial_stride // 2)
            first[:, 0] = 0
            level = (731.0 * first).flatten(1)
        pipe.transformer.zero_grad()
        theirs = pipe.transformer(noisy, level, text, return_dict=False)[0]
        squares = (theirs - (eps - x0)).square()[:, :, 0 if conditioning == "channel_concat" else 1 :]
        squares.mean().backward()
        assert error.item() == pytest.approx(squares.mean().item(), rel=1e-5)
        named = renamed_to_diffusers({name: p.grad for name, p in model.named_parameters()})
        expected = {name: p.grad for name, p in pipe.transformer.named_parameters()}
        typical = torch.stack([grad.norm() for grad in expected.values()]).median()
        for name, grad in expected.items():
            assert (named[name] - grad).norm() < 1e-4 * grad.norm().clamp_min(0.3 * typical), name


def test_sampler_keeps_clean_frames(both):
    """One record for two prompts; the frame that is given is decoded as the VAE alone would decode it."""
    conditioning, model, vae, _ = both
    texts = {text: torch.randn(5, 24) for text in ("one", "two", "")}
    sampler = Sampler(
        Experts({"dense": model}),
        lambda given: [texts[text] for text in given],
        vae.decode,
        vae.z_dim,
        vae.temporal_stride,
        vae.spatial_stride,
        conditioning=conditioning,
    )
    settings = Settings({"dense": 2.0}, 5.0, steps=2)
    known = record(vae, conditioning)
    made = sampler.batch(
        ["one", "two"],
        bucket=Bucket(FRAMES, HEIGHT, WIDTH),
        settings=settings,
        seeds=[0, 1],
        inputs=model_inputs(known, conditioning),
    )
    assert [frames.shape for frames in made] == [(FRAMES, HEIGHT, WIDTH, 3)] * 2
    alone = vae.decode(known.latents_BCTHW[:, :, :1])[0, :, 0]
    same = [np.abs(frames[0] - ((alone + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51 for frames in made]
    assert same == [conditioning == "clean_frames"] * 2
    assert not np.array_equal(made[0][1:], made[1][1:])
