"""Videos → features: backbones, decoding, optical flow, and the extraction that joins them."""

from tad.extract.backbones import BACKBONES, build_backbone, load_backbone
from tad.extract.flow import FLOWS
from tad.extract.inputs import find_videos
from tad.extract.pipeline import ExtractReport, extract

__all__ = ["BACKBONES", "FLOWS", "ExtractReport", "build_backbone", "extract", "find_videos", "load_backbone"]
