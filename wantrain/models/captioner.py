"""A vision-language model that captions clips and pictures, through transformers' classes for any such model.

A model whose processor takes videos (Qwen2.5-VL, Qwen3-VL) is given a clip as a video with the times of its frames.
Any other is given the frames as pictures, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wantrain.models.formats import hub
from wantrain.util import libraries
from wantrain.video import Frames

#: Files of a repository that are fetched: configs, tokenizer, chat template and weights, no pickles and no code.
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
#: What Qwen's thinking models write before their answer ends with this.
THOUGHT_ENDS = "</think>"


#: What is captioned: frames (F, H, W, 3) uint8, evenly spaced, and how many of them a second; 0 for a picture.
Clip = tuple[Frames, float]


class Answer(NamedTuple):
    """The model's words as they came, and whether they were cut at the limit of tokens."""

    text: str
    is_cut: bool


class Captioner:
    """Clips and prompts -> captions; greedy, so the same clip and prompt give the same caption.

    max_tokens  most tokens of an answer, in the model's own tokens
    """

    def __init__(self, model: Any, processor: Any, *, max_tokens: int) -> None:
        self.model, self.processor, self.max_tokens = model.eval().requires_grad_(False), processor, max_tokens
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"  # answers begin where the prompts end
        self.takes_videos = getattr(processor, "video_processor", None) is not None
        own = model.generation_config
        own.temperature = own.top_p = own.top_k = None  # of sampling, which is off

    @torch.inference_mode()
    def describe(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[Answer]:
        """The answer to each clip with its prompt: all pictures, or all videos.

        ValueError, with the keys that help, if the device's memory is too small.
        """
        try:
            inputs = self._inputs(clips, prompts).to(self.model.device, dtype=self.model.dtype)
            with torch.autocast(self.model.device.type, enabled=False):
                rows = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        except torch.OutOfMemoryError as error:
            shape = "x".join(map(str, max(frames.shape[:3] for frames, _ in clips)))
            raise ValueError(
                f"the memory of {self.model.device} is too small for {len(clips)} clips of up to {shape} (frames x "
                "height x width) at once; give batch_size=1, a smaller frames.most= or frames.pixels=, or a smaller "
                "captioner="
            ) from error
        answers = rows[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [self._answer(text, ids.tolist()) for text, ids in zip(texts, answers, strict=True)]

    def _answer(self, text: str, ids: list[int]) -> Answer:
        ends = self.model.generation_config.eos_token_id
        is_cut = not set(ids) & set(ends if isinstance(ends, list) else [ends])
        _, thought, answer = text.rpartition(THOUGHT_ENDS)
        return Answer(answer if thought else text, is_cut)

    def _inputs(self, clips: Sequence[Clip], prompts: Sequence[str]) -> Any:
        """The processor's tensors for a batch."""
        is_video = clips[0][1] > 0
        assert all((rate > 0) == is_video for _, rate in clips), "pictures and videos are batches of their own"
        texts = []
        for (frames, _), prompt in zip(clips, prompts, strict=True):
            seen = [{"type": "video"}] if is_video and self.takes_videos else [{"type": "image"}] * len(frames)
            messages = [{"role": "user", "content": [*seen, {"type": "text", "text": prompt}]}]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        how: dict[str, Any] = {"text": texts, "padding": True, "return_tensors": "pt"}
        if not (is_video and self.takes_videos):
            return self.processor(images=[list(frames) for frames, _ in clips], **how)
        about = {"video_metadata": [_metadata(*clip) for clip in clips], "do_sample_frames": False}
        return self.processor(videos=[frames for frames, _ in clips], videos_kwargs=about, **how)


def _metadata(frames: Frames, rate: float) -> Any:
    """What transformers wants to know about a video whose frames are all given: their times, above all."""
    from transformers.video_utils import VideoMetadata

    count, height, width = frames.shape[:3]
    return VideoMetadata(
        total_num_frames=count,
        fps=rate,
        duration=count / rate,
        height=height,
        width=width,
        frames_indices=list(range(count)),
    )


def load_captioner(
    name: str, *, revision: str | None, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> Captioner:
    """The captioner in a folder, or of a hub repository (owner/name), of which only what is needed is fetched.

    ValueError, with the fix, if there is none, if it is no vision-language model that transformers has, or if its
    processor needs a library that is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and revision is not None:
        raise ValueError(
            f"captioner_revision={revision} is of a repository of the hub, and captioner={name} is a folder"
        )
    if not folder.is_dir():
        if folder.exists() or not hub.is_repository(name):
            what = "is a file" if folder.exists() else "is not there"
            raise ValueError(f"captioner={name} {what}; give a model's folder, or a repository of the hub (owner/name)")
        folder = hub.fetch(name, revision, FILES, key="captioner", revision_key="captioner_revision")
    with libraries.importing():
        from transformers import AutoModelForImageTextToText, AutoProcessor
    try:
        # Weights as safetensors, and no code of the repository's own.
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, device_map={"": device}
        )
    except Exception as error:  # of many classes: what is absent, damaged, unknown or not installed
        raise ValueError(f"captioner={name} cannot be loaded: {_reason(error)}") from error
    if not hasattr(processor, "tokenizer") or getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"captioner={name} has no chat template, so it takes no instructions; give a vision-language model that "
            "follows them, such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return Captioner(model, processor, max_tokens=max_tokens)


def _reason(error: Exception) -> str:
    """What went wrong, with the fix where it is known."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    words = " ".join(str(each) for each in chain)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is too small for it; give a smaller model, precision=bf16, or device=cpu"
    if "torchvision" in words.lower():
        return (
            "its processor needs torchvision, which is not installed or does not belong to torch "
            f"{torch.__version__}; pip install 'wantrain[captions]'"
        )
    if "trust_remote_code" in words:
        return "it needs code of its own, which is not run; give a model that transformers has"
    return " ".join(str(error).split())[:400] or type(error).__name__
