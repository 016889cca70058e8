"""Small shards for the tests of encoding: nine files of footage, their video shards and their latent shards."""

import shutil
from pathlib import Path

import pytest
from shard_helpers import encode, shard

from wantrain.demo.footage import make_footage


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoding")
    make_footage(folder / "footage", num_videos=7, num_images=2)
    shard(folder / "footage", folder / "videos")
    return folder / "videos"


@pytest.fixture(scope="session")
def latents(videos):
    encode(videos, videos.parent / "latents")
    return videos.parent / "latents"


@pytest.fixture
def mine(latents, tmp_path):
    """A copy of the latents to change."""
    return Path(shutil.copytree(latents, tmp_path / "latents"))


@pytest.fixture
def footage(videos, tmp_path):
    """A copy of the footage to change."""
    return Path(shutil.copytree(videos.parent / "footage", tmp_path / "footage"))
