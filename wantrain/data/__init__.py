"""The data room: footage -> video shards -> latent shards -> batches in a planned order."""

from wantrain.data.conditions import Conditions
from wantrain.data.cutting import write_video_shards
from wantrain.data.demo import SETS, make_footage
from wantrain.data.encoding import encode_shards
from wantrain.data.footage import Footage, Reject
from wantrain.data.judge import Verdict, judge, scores, spared_scenes, wug_scenes
from wantrain.data.loader import LatentData, PixelData
from wantrain.data.mix import MixedData, check_sets
from wantrain.data.pixels import prepare_pixels
from wantrain.data.plan import Plan, share
from wantrain.data.prefetch import prefetch
from wantrain.data.report import write_report
from wantrain.data.shards import check_folder, read_manifest
from wantrain.data.sources import find_footage

__all__ = [
    "SETS",
    "Conditions",
    "Footage",
    "LatentData",
    "MixedData",
    "PixelData",
    "Plan",
    "Reject",
    "Verdict",
    "check_folder",
    "check_sets",
    "encode_shards",
    "find_footage",
    "judge",
    "make_footage",
    "prefetch",
    "prepare_pixels",
    "read_manifest",
    "scores",
    "share",
    "spared_scenes",
    "write_report",
    "write_video_shards",
    "wug_scenes",
]
