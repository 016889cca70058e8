"""Data: footage -> video shards -> latent shards -> batches in a fixed order."""

from wantrain.batch import Batch, PixelBatch
from wantrain.data.captioning.frames import FrameOptions
from wantrain.data.captioning.review import apply_table, write_review
from wantrain.data.captioning.templates import read_template
from wantrain.data.captioning.writing import CaptionOptions, Describe, caption_footage
from wantrain.data.footage.clips import ClipOptions
from wantrain.data.footage.decode_workers import DecodeOptions
from wantrain.data.footage.sharding import ShardOptions, write_video_shards
from wantrain.data.footage.sources import find_footage
from wantrain.data.latents.conditioning import ConditioningInputs
from wantrain.data.latents.encoding import encode_shards
from wantrain.data.latents.options import EncodeOptions, Encoders
from wantrain.data.loading.dataset import LatentData
from wantrain.data.loading.mixture import MixedData, check_sets
from wantrain.data.loading.packs import Pack, PackSampler
from wantrain.data.loading.pairs import PairData
from wantrain.data.loading.phases import PhasedSampler, phase_at, phases_of
from wantrain.data.loading.pixel_dataset import PixelData
from wantrain.data.loading.protocol import TrainingData
from wantrain.data.loading.sampler import BatchSampler, share
from wantrain.data.loading.schedule import read_schedule
from wantrain.data.loading.streams import BucketStreams
from wantrain.data.report import write_report
from wantrain.data.shards import check_folder, read_manifest
from wantrain.data.upload import upload_folder

#: mypy checks here that every data set satisfies the protocol.
DATA_SETS: tuple[type[TrainingData[Batch]], type[TrainingData[Batch]], type[TrainingData[PixelBatch]]]
DATA_SETS = (LatentData, MixedData, PixelData)

__all__ = [
    "BatchSampler",
    "BucketStreams",
    "CaptionOptions",
    "ClipOptions",
    "ConditioningInputs",
    "DecodeOptions",
    "Describe",
    "EncodeOptions",
    "Encoders",
    "FrameOptions",
    "LatentData",
    "MixedData",
    "Pack",
    "PackSampler",
    "PairData",
    "PhasedSampler",
    "PixelData",
    "ShardOptions",
    "TrainingData",
    "apply_table",
    "caption_footage",
    "check_folder",
    "check_sets",
    "encode_shards",
    "find_footage",
    "phase_at",
    "phases_of",
    "read_manifest",
    "read_schedule",
    "read_template",
    "share",
    "upload_folder",
    "write_report",
    "write_review",
    "write_video_shards",
]
