"""The data room: footage -> video shards -> latent shards -> batches in a planned order."""

from wantrain.data.footage.pixels import prepare_pixels
from wantrain.data.footage.probe import Footage
from wantrain.data.footage.sharding import write_video_shards
from wantrain.data.footage.sources import find_footage
from wantrain.data.latents.conditioning import Conditions
from wantrain.data.latents.encoding import encode_shards
from wantrain.data.loading.dataset import LatentData
from wantrain.data.loading.mixture import MixedData, check_sets
from wantrain.data.loading.pixel_dataset import PixelData
from wantrain.data.loading.sampler import Plan, share
from wantrain.data.prefetch import prefetch
from wantrain.data.rejects import Reject
from wantrain.data.report import write_report
from wantrain.data.shards import check_folder, read_manifest

__all__ = [
    "Conditions",
    "Footage",
    "LatentData",
    "MixedData",
    "PixelData",
    "Plan",
    "Reject",
    "check_folder",
    "check_sets",
    "encode_shards",
    "find_footage",
    "prefetch",
    "prepare_pixels",
    "read_manifest",
    "share",
    "write_report",
    "write_video_shards",
]
