"""Files that are no weights say what they are: formats, downloads that went wrong, damage."""

import gzip

import pytest
import torch
from safetensors.torch import save, save_file

from wantrain.models.formats.file_kind import why_unreadable
from wantrain.models.formats.inspect import describe
from wantrain.models.formats.lora import read_lora
from wantrain.models.formats.weights import read_file, read_metadata

WHOLE = save({"blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 64), "b": torch.ones(3)})
LENGTH = 8 + int.from_bytes(WHOLE[:8], "little")
KINDS = {
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(200), "it is a GGUF file, a quantised format"),
    "HTML": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer of git-lfs"),
    "error text": (b'{"error": "Repository not found"}', "it is text .*Repository not found"),
    "one word": (b"Forbidden\n", "it is text .*Forbidden.*; download or export it again"),
    "gzip": (gzip.compress(b"weights"), "it is a gzip file"),
    "empty": (b"", "it is empty"),
    "cut in the header": (WHOLE[: LENGTH - 20], "it is cut short: its header alone takes"),
    "cut in a tensor": (WHOLE[:-100], rf"it is cut short: {len(WHOLE) - 100:,} of {len(WHOLE):,} bytes are there"),
    "cut by one byte": (WHOLE[:-1], "it is cut short"),
    "cut in the first bytes": (WHOLE[:5], "its first bytes are not the header of such a file; .*download or export"),
    "video": (b"\x00\x00\x00\x20ftypisom" + bytes(range(256)), "its first bytes are not the header of such a file"),
    "pickle": (b"\x80\x02}q\x00.", "it is a pickle; give it the suffix .pth"),
}


@pytest.mark.parametrize(("content", "words"), KINDS.values(), ids=KINDS)
def test_what_a_file_is(content, words, tmp_path):
    """Each kind is named by every reader, with the file first."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for read in (read_file, read_metadata, read_lora, describe):
        with pytest.raises(ValueError, match=rf"model\.safetensors cannot be read as safetensors: .*{words}"):
            read(file)


def test_torch_files(tmp_path):
    """A torch file under a foreign suffix is named; a damaged or foreign one under its own is no pickle of ours."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.pth").read_bytes())
    with pytest.raises(ValueError, match=r"it is a zip file, as torch writes \(\.pth, \.pt\); give it its own suffix"):
        read_file(tmp_path / "a.safetensors")
    (tmp_path / "b.pth").write_bytes(b"<html></html>")
    with pytest.raises(ValueError, match=r"b\.pth .*it is a web page"):
        read_file(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"c\.pth cannot be read as torch weights"):
        read_file(tmp_path / "c.pth")


def test_places(tmp_path):
    """A path that is not there, and a folder in place of a file, are named; a whole file has nothing to say."""
    with pytest.raises(ValueError, match="it does not exist"):
        read_file(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="it is a folder; give the file in it"):
        read_file(tmp_path)
    save_file({"a": torch.ones(3)}, tmp_path / "cat.safetensors")
    assert why_unreadable(tmp_path / "cat.safetensors") is None
    with pytest.raises(
        ValueError, match=r"is a folder, not a LoRA file; give the \.safetensors file in it \(cat\.safet"
    ):
        read_lora(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder, not a LoRA file; .*\(it holds none\)"):
        read_lora(tmp_path / "empty")
