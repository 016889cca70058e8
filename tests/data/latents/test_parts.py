"""part=K/N: starts that know nothing of each other make one folder, byte for byte that of one start."""

import pytest
from shard_helpers import contents, encode

from wantrain.util.distributed import Part


def test_parts(videos, latents, tmp_path, capsys):
    """Each part makes its own tars; the last to end writes the manifest, whichever that is, and a part again does
    nothing.
    """
    out = tmp_path / "latents"
    for number, left in ((3, True), (1, True), (2, False)):
        manifest = encode(videos, out, part=Part(number, 3))
        assert (manifest is None) == left == (not (out / "manifest.json").exists())
        assert (f"part {number} of 3 is done; " in capsys.readouterr().out) == left
    visible = {name: digest for name, digest in contents(out).items() if not name.startswith(".")}
    assert visible == {name: digest for name, digest in contents(latents).items() if not name.startswith(".")}
    assert encode(videos, out, part=Part(1, 3)) == manifest
    assert "finished already" in capsys.readouterr().out


def test_lost_part(videos, latents, tmp_path):
    """A part that never came is made by a start without part=; another number of parts takes over what is there."""
    out = tmp_path / "latents"
    assert encode(videos, out, part=Part(1, 3)) is None
    there = set(out.glob("*.tar"))
    assert encode(videos, out, part=Part(2, 2)) is None
    assert there <= set(out.glob("*.tar"))
    assert encode(videos, out) is not None
    assert {path.name for path in out.glob("*.tar")} == {path.name for path in latents.glob("*.tar")}


def test_two_end_at_once(videos, tmp_path, monkeypatch, capsys):
    """Of two parts that end at once one finishes the folder, and the other says so."""
    from wantrain.data.latents import encoding

    out, finishing = tmp_path / "latents", encoding.finishing

    def other_first(folder):
        monkeypatch.setattr(encoding, "finishing", finishing)
        assert encode(videos, out) is not None
        return finishing(folder)

    monkeypatch.setattr(encoding, "finishing", other_first)
    assert encode(videos, out, part=Part(1, 2)) is None
    assert "part 1 of 2 is done, and another part has finished the folder" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0/8", "9/8", "2", "2/", "a/b", "-1/8", "1/2/3"])
def test_refused(text):
    with pytest.raises(ValueError, match=rf"part={text} must be K/N"):
        Part.read(text)


@pytest.mark.parametrize("shared_by", [1, 2])
def test_ranks(shared_by, monkeypatch):
    """The processes of all parts, or their groups, share a list by number."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for number in (1, 2, 3):
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            found.append(list(range(12))[Part.read(f"{number}/3").share(shared_by)])
    groups = [list(range(12))[first :: 6 // shared_by] for first in range(6 // shared_by)]
    assert found == [group for group in groups for _ in range(shared_by)]
