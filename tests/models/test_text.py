"""TextEncoder against transformers and diffusers on the tiny pipeline's umT5, its tokenizer, and its own properties."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5TokenizerFast, UMT5EncoderModel

from wantrain.demo import vocabulary
from wantrain.demo.scene import Scene
from wantrain.models.formats.loading import load_text_encoder
from wantrain.models.text import TextEncoder, clean_prompt

ASSETS = Path(__file__).parents[2] / "assets"
TINY = ASSETS / "wan-tiny"
PROMPTS = [
    "a red circle moving left on a dark background",
    "",
    "一个红色的圆形在深色背景上向左移动",
    "Two cats, a 4k drone shot & “neon” lights; résumé 🎉🏳️‍🌈 \u0301 龘 ไทย العربية",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread: ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder(TINY)


@pytest.fixture(scope="module")
def peer():
    return UMT5EncoderModel.from_pretrained(TINY / "text_encoder").eval()


@pytest.fixture
def copied(tmp_path):
    """A tiny pipeline folder that a test may spoil."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY / part, tmp_path / part)
    return tmp_path


def pieces(encoder, text):
    return [encoder.tokenizer.id_to_token(token) for token in encoder.tokenize(text)]


def all_captions():
    for shape, colour, background, direction in itertools.product(
        [shape for shape in vocabulary.SHAPES if shape != "wug"],
        vocabulary.COLOURS,
        vocabulary.BACKGROUNDS,
        vocabulary.DIRECTIONS,
    ):
        scene = Scene(shape, colour, background, direction, size=0.4, speed=0.3, start=(0.5, 0.5))
        for language in ("en", "zh"):
            yield scene.caption(language)
            yield scene.caption(language, still_image=True)


# What reaches the tokenizer


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a &amp;amp; b\n\n c\tâ€™s “q”  ", 'a & b c \'s "q"'),
        ("&lt;b&gt; &amp;lt;i&amp;gt;", "<b> <i>"),
        ("Red  CIRCLE", "Red CIRCLE"),
        ("一个　红色", "一个 红色"),
        (" \n\t ", ""),
    ],
)
def test_cleaning(text, cleaned):
    assert clean_prompt(text) == cleaned


# Agreement


def test_embeddings_match_transformers(encoder, peer):
    """Embeddings agree with those of transformers, padded to 512 rows."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    tokens = tokenizer([clean_prompt(p) for p in PROMPTS], padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        theirs = peer(tokens.input_ids, tokens.attention_mask).last_hidden_state
    padded = encoder(PROMPTS)
    assert padded.shape == (4, 512, 64) and padded.dtype == torch.float32
    for row, (text, prompt) in enumerate(zip(encoder.encode_unpadded(PROMPTS), PROMPTS, strict=True)):
        length = int(tokens.attention_mask[row].sum())
        assert encoder.tokenize(prompt) == tokens.input_ids[row, :length].tolist()
        assert text.shape == (length, encoder.dim)
        torch.testing.assert_close(text, theirs[row, :length], atol=1e-4, rtol=0)
        assert torch.equal(padded[row, :length], text)
        assert not padded[row, length:].any()


def test_embeddings_match_diffusers(encoder, peer):
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TINY / "tokenizer"),
        text_encoder=peer,
        vae=None,
        scheduler=None,
        transformer=None,
    )
    for prompt in (*PROMPTS, "red " * 600):
        theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(encoder([prompt]), theirs, atol=1e-4, rtol=0)


# Our own properties


def test_embeddings_independent_of_batch(encoder):
    """The embedding of a text does not depend on the other texts of its batch."""
    together = encoder.encode_unpadded([*PROMPTS, "red " * 300])
    for prompt, text in zip(PROMPTS, together, strict=False):
        torch.testing.assert_close(encoder.encode_unpadded([prompt])[0], text, atol=1e-5, rtol=0)
    assert encoder.encode_unpadded([]) == []


def test_long_prompt_truncated(encoder, capsys):
    """A prompt over 512 tokens is cut with its end token kept, and the cut is reported."""
    exact = encoder.tokenize("red " * 511)
    assert len(exact) == 512 and not capsys.readouterr().out
    cut = encoder.tokenize("red " * 511 + "blue")
    assert cut == exact and cut[-1] == encoder.end
    assert "513 tokens is cut to 512" in capsys.readouterr().out


def test_encoder_frozen(encoder):
    """The encoder is frozen, and its embeddings can enter a training step."""
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.model.training
    layer = torch.nn.Linear(64, 2)
    layer(encoder(["a red circle"])).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_autocast_has_no_effect(encoder):
    plain = encoder(["a red circle"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(["a red circle"]), plain)


def test_bfloat16_is_near_float32(encoder):
    half = load_text_encoder(TINY, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    ours, wanted = half(PROMPTS), encoder(PROMPTS)
    assert ours.dtype == torch.float32
    assert (ours - wanted).norm() / wanted.norm() < 0.03


# The tokenizer of the tiny pipeline


def test_ids_are_umt5s(encoder):
    assert [encoder.tokenizer.id_to_token(i) for i in range(4)] == ["<pad>", "</s>", "<unk>", "<0x00>"]
    assert encoder.tokenize("") == [1] and encoder.pad == 0
    assert encoder.tokenizer.get_vocab_size() == encoder.model.config.vocab_size <= 600


def test_no_text_is_unknown(encoder):
    for text in (*PROMPTS, "".join(map(chr, range(32, 1500))), "한국어 Ελληνικά עברית 日本語 ∑∞ \U0001f600"):
        cleaned = clean_prompt(text)
        ids = encoder.tokenizer.encode(cleaned).ids
        assert 2 not in ids
        assert encoder.tokenizer.decode(ids) == cleaned


def test_byte_tokens_in_text(encoder):
    """Text such as <0x41> is not encoded as the token of a byte."""
    assert not [piece for piece in pieces(encoder, "<0x41> a<0xFF>b") if piece.startswith("<0x")]


def test_captions_are_whole_words(encoder):
    english = {f"▁{word}" for caption in all_captions() for word in caption.split() if word.isascii()}
    for caption in all_captions():
        words = set(pieces(encoder, caption)) - {"▁", "</s>", ":", "的", "在", "上"}
        single = {word for word in words if len(word) == 1 or word.startswith("<0x")}
        assert not single, f"{caption}: spelled {single}"
        assert all(word in english or not word.isascii() for word in words)


def test_words_are_clearly_different(encoder):
    def cosines(template, words):
        """The most alike two embeddings of different words at the same place."""
        texts = encoder.encode_unpadded([template.format(word) for word in words])
        place = template.split().index("{}") if "{}" in template.split() else template.index("{}") + 1
        rows = torch.nn.functional.normalize(torch.stack([text[place] for text in texts]), dim=-1)
        return (rows @ rows.T - 2 * torch.eye(len(words))).max()

    assert cosines("a {} circle moving left", list(vocabulary.COLOURS)) < 0.6
    assert cosines("a red {} moving left", list(vocabulary.SHAPES)) < 0.6
    assert cosines("a red circle moving {}", [d for d in vocabulary.DIRECTIONS if d != "still"]) < 0.6
    assert cosines("{}圆形", [chinese for chinese, _ in vocabulary.COLOURS.values()]) < 0.6


@pytest.mark.parametrize("name", ["T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_tokenizer_class_in_config(encoder, copied, name):
    """Token ids do not depend on the class that tokenizer_config.json names."""
    file = copied / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))
    again = load_text_encoder(copied)
    assert [again.tokenize(prompt) for prompt in PROMPTS] == [encoder.tokenize(prompt) for prompt in PROMPTS]


def test_tokenizer_class_in_diffusers(encoder):
    """Captions have the same ids with either tokenizer class that model_index.json may name for diffusers.

    The published T5TokenizerFast has no bytes there.
    """
    captions = list(itertools.islice(all_captions(), 0, None, 7))
    for tokenizer_class in (PreTrainedTokenizerFast, T5TokenizerFast):
        tokenizer = tokenizer_class.from_pretrained(TINY / "tokenizer")
        assert tokenizer([clean_prompt(c) for c in captions]).input_ids == [encoder.tokenize(c) for c in captions]
    faithful = PreTrainedTokenizerFast.from_pretrained(TINY / "tokenizer")
    assert faithful(clean_prompt(PROMPTS[3])).input_ids == encoder.tokenize(PROMPTS[3])


def test_saved_tokenizer_limits(encoder, copied):
    """Truncation and padding that are saved with a tokenizer have no effect."""
    file = str(copied / "tokenizer" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(file)
    assert load_text_encoder(copied).tokenize(PROMPTS[0]) == encoder.tokenize(PROMPTS[0])


def test_asset_script(tmp_path):
    """The script writes the tiny text encoder's files byte for byte."""
    spec = importlib.util.spec_from_file_location("maker", ASSETS / "make_tiny_text_encoder.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.main(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 4
    for file in files:
        assert (tmp_path / file).read_bytes() == (TINY / file).read_bytes(), file
    assert sum((TINY / file).stat().st_size for file in files) < 400_000


# Folders


@pytest.mark.parametrize("part", [".", "text_encoder"])
def test_load_from_folder_or_part(encoder, copied, part):
    assert torch.equal(load_text_encoder(copied / part)(PROMPTS), encoder(PROMPTS))


def test_load_with_both_embedding_names(encoder, copied):
    """A file that holds the embedding under both of its names loads."""
    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, file)
    again = load_text_encoder(copied)
    assert again.model.encoder.embed_tokens is again.model.shared
    assert torch.equal(again(PROMPTS), encoder(PROMPTS))


def test_float16_refused(encoder):
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        load_text_encoder(TINY, dtype=torch.float16)
    model = UMT5EncoderModel(encoder.model.config).to(torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        TextEncoder(model, encoder.tokenizer)


def test_tokenizer_mismatch(encoder, copied):
    """A tokenizer of another model is refused."""
    foreign = Tokenizer(models.Unigram([("<pad>", 0.0), ("a", -1.0)], unk_id=0))
    foreign.save(str(copied / "tokenizer" / "tokenizer.json"))
    with pytest.raises(ValueError, match="encodes an empty text"):
        load_text_encoder(copied)
    encoder.tokenizer.save(str(copied / "tokenizer" / "tokenizer.json"))
    larger = Tokenizer.from_file(str(copied / "tokenizer" / "tokenizer.json"))
    larger.add_tokens(["one", "more"])
    larger.save(str(copied / "tokenizer" / "tokenizer.json"))
    with pytest.raises(ValueError, match="different models"):
        load_text_encoder(copied)


def test_missing_or_damaged_files(copied):
    """The error names each file that is missing, damaged or of another model."""
    file = copied / "tokenizer" / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_text_encoder(copied)
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is not there"):
        load_text_encoder(copied)
    config = copied / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "t5"}))
    with pytest.raises(ValueError, match="holds a t5, not a umT5"):
        load_text_encoder(copied)
    with pytest.raises(ValueError, match="text_encoder"):
        load_text_encoder(copied / "tokenizer" / "nothing")


def test_missing_tensor(copied):
    """The error names a missing tensor."""
    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing.*final_layer_norm"):
        load_text_encoder(copied)
