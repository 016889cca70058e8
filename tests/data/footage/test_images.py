"""Images as footage: rotation, transparency, depth."""

import numpy as np
import pytest
from PIL import Image

from wantrain.data.footage.clips import Window
from wantrain.data.footage.probe import probe, read_windows


def test_exif_and_transparency(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    picture.save(tmp_path / "turned.jpg", exif=exif)
    found = probe(tmp_path / "turned.jpg")
    assert (found.height, found.width, found.is_image) == (40, 20, True)
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(tmp_path / "clear.png")
    (clip,) = read_windows(tmp_path / "clear.png", probe(tmp_path / "clear.png"), [Window(0, 1)], 16)
    assert clip.shape == (1, 8, 8, 3)
    assert (clip == 255).all()


def test_16_bit_image_refused(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        probe(tmp_path / "deep.png")
