"""The list of published weights is consistent, and a name stands for its file and its preprocessing everywhere."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from tad.apply import feature_recipes
from tad.errors import RecipeError, WeightsError
from tad.extract import build_backbone, extract, load_backbone
from tad.extract.backbones import BACKBONES, SPECS, BackboneSpec
from tad.extract.fetch import fetch, place_of
from tad.extract.published import PUBLISHED, Published, entry_of, hash_in, of_backbone, split_name
from tad.extract.report import recipes_of
from tad.extract.snippets import SnippetPlan
from tad.extract.streams import resolve, source_of
from tad.extract.weights import sha256_of
from tad.recipe import ExtractRecipe
from tad.store import open_store
from tad.synth import make_video

ENTRIES = list(PUBLISHED.items())

# Typed from the projects' model zoos, not from the list.
HASHES = """
1cb6dfc8 701b0f6f 9c0e09bd a77ac3ee c7a3cc5b 7d1dacde 44395bae c3be9793 d565828d 3367437a 5c933ae1 b9b10241 64d69186
042b1748 f55d3c2b 2692d16c cd10898e 65d68713 2132fc87 f6a40d08 df42dc84 12ce977c a4d0d01f 4270588c 47cfe041 0aa0550b
ade133f1 0d2cf854 e6a30b2f 0547130e 91a641e6
"""
# Of these backbones nobody publishes weights that the list could name.
WITHOUT = {"tiny", "tiny-flow"}


def test_every_backbone_of_the_list_exists_and_every_other_has_an_entry() -> None:
    listed = {entry.backbone for entry in PUBLISHED.values()}
    assert listed - BACKBONES.keys() == set()
    assert BACKBONES.keys() - listed == WITHOUT


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=PUBLISHED)
def test_entries_are_well_formed(name: str, entry: Published) -> None:
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", name)
    assert entry.source
    assert entry.data
    assert entry.licence
    for url in entry.urls:
        parts = urlsplit(url)
        assert parts.scheme == "https"
        assert "." in parts.netloc
        assert not re.search(r"\s|\.\.|[{}*]|//", parts.path)
        assert parts.path.rsplit("/", 1)[1] == entry.file
        assert url.startswith("https://huggingface.co/") == entry.source.startswith("Hugging Face")
    assert bool(entry.urls) != bool(entry.by_hand)
    assert entry.top1 is None or 50 < entry.top1 < 90
    assert set(entry.spec) <= {field.name for field in fields(BackboneSpec)} - {"name", "width", "levels", "modality"}


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=PUBLISHED)
def test_overrides_say_something_and_fit_their_network(name: str, entry: Published) -> None:
    spec = SPECS[entry.backbone]
    changed = replace(spec, **entry.spec)
    assert changed.window >= changed.min_frames
    assert len(changed.mean) == len(changed.std) == len(spec.mean)
    assert changed.any_length or (changed.frames, changed.window) == (spec.frames, spec.window)
    low, high = changed.value_range
    assert all(low <= m <= high and 0 < s < high - low for m, s in zip(changed.mean, changed.std, strict=True))


def test_each_network_reads_the_files_of_its_sources() -> None:
    written = {
        "pytorchvideo": "pytorchvideo", "PySlowFast": "PySlowFast Caffe2", "mmaction2": "mmaction2", "TSP": "TSP",
        "torchvision": "torchvision", "moabitcoin": "torchvision", "mit-han-lab": "mit-han-lab", "Scenic": "tad ViViT",
        "Hugging Face": "transformers", "facebookresearch": "official", "piergiaj": "piergiaj", "hassony2": "hassony2",
    }  # fmt: skip
    for entry in PUBLISHED.values():
        (code,) = [family for source, family in written.items() if entry.source.startswith(source)]
        assert any(code in layout.family for layout in BACKBONES[entry.backbone].layouts), entry.file


def test_addresses_and_files_are_no_copies_of_each_other() -> None:
    urls = [url for entry in PUBLISHED.values() for url in entry.urls]
    assert len(urls) == len(set(urls))
    places = [place_of(name, "kept") for name in PUBLISHED]
    assert len(places) == len(set(places))


def test_hashes_are_those_of_the_file_names() -> None:
    listed = {entry.hash_prefix for entry in PUBLISHED.values()}
    assert set(HASHES.split()) <= listed
    for entry in PUBLISHED.values():
        hashed = ("openmmlab", "download.pytorch.org", "ig65m-pytorch/", "/TSP/")
        assert (entry.hash_prefix is not None) == any(part in url for url in entry.urls for part in hashed)
    assert hash_in("r2plus1d_34-tsp_on_activitynet-max_gvf-backbone_lr_0.0001-epoch_5-0d2cf854.pth") == "0d2cf854"
    assert hash_in("slowfast_r50_8xb8-8x8x1-256e_kinetics400-rgb_20220818-1cb6dfc8.pth") == "1cb6dfc8"
    for plain in ("rgb_imagenet.pt", "SLOWFAST_8x8_R50.pyth", "pytorch_model.bin", "a-deadbeef", "a-12ab.pth"):
        assert hash_in(plain) is None


def test_non_commercial_licences_are_marked() -> None:
    for entry in PUBLISHED.values():
        assert entry.noncommercial == ("NC" in entry.licence)
    marked = {entry.backbone for entry in PUBLISHED.values() if entry.noncommercial}
    assert marked == {"timesformer-b", "videomae-b"}
    assert not PUBLISHED["mm_timesformer_b_kinetics400"].noncommercial


def test_preprocessing_that_is_easily_got_wrong() -> None:
    def spec_of(name: str) -> BackboneSpec:
        return replace(SPECS[PUBLISHED[name].backbone], **PUBLISHED[name].spec)

    slow, plain = spec_of("slow_r50_4x16_kinetics400"), spec_of("slow_r50_8x8_kinetics400")
    assert (slow.frames, slow.interval, slow.window) == (4, 16, 4)
    assert (plain.frames, plain.interval, plain.window) == (8, 8, 8)
    for kind in ("ircsn", "ipcsn"):
        scratch, ig65m = spec_of(f"mm_{kind}_152_kinetics400"), spec_of(f"mm_{kind}_152_ig65m_kinetics400")
        low, high = ig65m.value_range
        assert [round(m * 255 / (high - low), 1) for m in ig65m.mean] == [123.7, 116.3, 103.5]
        assert [round(m, 2) for m in scratch.mean] == [110.2, 100.64, 95.99]
        assert scratch.value_range == (0.0, 255.0)
    for data in ("activitynet", "thumos14"):
        tsp = spec_of(f"tsp_r2plus1d_34_{data}")
        assert (tsp.frames, tsp.window, tsp.grid_fps, tsp.fps) == (16, 16, 15.0, 15.0)
    assert spec_of("mm_tsm_r50_16_kinetics400").window == 16
    assert spec_of("ig65m_r2plus1d_34_clip32_kinetics400").window == 32
    assert {name for name in PUBLISHED if spec_of(name).channel_order == "bgr"} == {
        f"{net}_r50_8x8_{data}" for net in ("slow", "slowfast") for data in ("ssv2", "charades")
    }


def test_names_and_near_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "slow_r50_8x8_kinetics400"
    assert split_name(name) == (name, None)
    assert split_name(f"{name}=a=b.pth") == (name, Path("a=b.pth"))
    for other in (
        None,
        Path(name),
        "random",
        f"{name}=",
        "i3d-rgb=x.pt",
        f"./{name}",
        {},
        "~nobody/x",
        "\0",
        "x" * 9999,
    ):
        assert split_name(other) == (None, None)
    (tmp_path / name).write_bytes(b"a file")
    assert split_name(name) == (None, None)
    assert name in of_backbone("slow-r50")
    with pytest.raises(RecipeError, match=f"Did you mean '{name}'"):
        entry_of("slow-r50-8x8-kinetics400")


# ---- a published network of our own ----------------------------------------------------------------------------------

SPEC: dict[str, Any] = {"stride": 2, "mean": (0.4, 0.45, 0.5), "channel_order": "bgr"}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny_noise`` and ``tinyflow_noise`` in the list, at file:// addresses; the file of the first."""
    monkeypatch.setenv("TAD_WEIGHTS", str(tmp_path / "cache"))
    for backbone, spec in (("tiny", SPEC), ("tiny-flow", {})):
        file = tmp_path / "server" / f"{backbone}.pth"
        file.parent.mkdir(exist_ok=True)
        torch.save(build_backbone(backbone, "random:3").state_dict(), file)
        entry = Published(backbone, "tests", "noise", "MIT", file.name, (file.as_uri(),), spec=spec)
        monkeypatch.setitem(PUBLISHED, f"{backbone.replace('-', '')}_noise", entry)
    return tmp_path / "server" / "tiny.pth"


def test_a_name_is_fetched_loaded_and_given_its_preprocessing(tiny: Path) -> None:
    plain = build_backbone("tiny", tiny)
    for named in (
        build_backbone("tiny", "tiny_noise"),
        load_backbone("tiny_noise"),
        load_backbone(f"tiny_noise={tiny}"),
    ):
        assert named.weights_id == plain.weights_id == f"sha256:{sha256_of(tiny)}"
        assert named.spec == replace(plain.spec, **SPEC)
    clips = torch.randint(0, 256, (1, 3, 16, 32, 32), dtype=torch.uint8)
    mean = torch.tensor(SPEC["mean"]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(named.normalise(clips), (clips.flip(1) / 255 - mean) / 0.2)
    tiny.unlink()  # it is kept now
    assert build_backbone("tiny", "tiny_noise", expected_sha256=plain.weights_id).spec.stride == 2
    with pytest.raises(WeightsError, match="another file than recorded"):
        build_backbone("tiny", "tiny_noise", expected_sha256="0" * 64)


def test_a_name_is_of_one_backbone(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="tiny_noise are of tiny, not of tiny-flow"):
        build_backbone("tiny-flow", "tiny_noise")
    assert not (tmp_path / "cache").exists()  # told before anything is fetched
    with pytest.raises(WeightsError, match="holds tiny-flow, not tiny"):
        load_backbone(f"tiny_noise={tiny.parent / 'tiny-flow.pth'}")


def test_a_file_that_is_not_the_named_one_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "tiny_noise", replace(PUBLISHED["tiny_noise"], file="tiny-00000000.pth"))
    with pytest.raises(WeightsError, match="begins with 00000000"):
        load_backbone("tiny_noise")
    with pytest.raises(WeightsError, match=r"is not tiny_noise: .* not 00000000"):
        load_backbone(f"tiny_noise={tiny}")


def test_a_file_of_that_name_wins(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(build_backbone("tiny", "random:4").state_dict(), "tiny_noise")
    assert build_backbone("tiny", "tiny_noise").weights_id == f"sha256:{sha256_of('tiny_noise')}"


def test_without_weights_the_error_names_the_published_ones() -> None:
    with pytest.raises(WeightsError, match=r"slow_r50_8x8_kinetics400 or .*--weights random"):
        resolve(ExtractRecipe(backbone="slow-r50"))
    with pytest.raises(WeightsError, match="there are none of this network"):
        resolve(ExtractRecipe(backbone="tiny"))


def test_names_go_to_their_backbones(tiny: Path) -> None:
    found = recipes_of(["tiny", "tiny-flow"], ["tinyflow_noise", "tiny_noise"], {})
    assert [(r.backbone, r.weights) for r in found] == [("tiny", "tiny_noise"), ("tiny-flow", "tinyflow_noise")]
    found = recipes_of(["tiny", "tiny-flow"], ["tinyflow_noise", "some.pt"], {})
    assert [r.weights for r in found] == ["some.pt", "tinyflow_noise"]
    found = recipes_of(["tiny"], [f"tiny_noise={tiny}"], {})
    assert found[0].weights == f"tiny_noise={tiny}"
    with pytest.raises(RecipeError, match="1 --weights for 0 networks"):
        recipes_of(["tiny"], ["tiny_noise", "tiny_noise"], {})
    with pytest.raises(WeightsError, match="are of tiny-flow"):
        resolve(recipes_of(["tiny"], ["tinyflow_noise"], {})[0])


def test_weights_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "slow_r50_8x8_kinetics400"
    assert source_of(name) == name
    assert source_of("random:7") == "random:7"
    assert source_of("a.pt") == str(tmp_path / "a.pt")
    assert source_of(f"{name}=a.pt") == f"{name}={tmp_path / 'a.pt'}"


def test_features_by_name_are_made_again_by_name(tiny: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", duration_s=2.0, seed=0, size=(48, 64), fps=12.5)
    common = {"format": "zarr", "device": "cpu"}
    extract(
        tmp_path / "v.mp4", store=tmp_path / "s", names=["named", "plain"], **common,
        recipes=[ExtractRecipe(backbone="tiny", weights=weights) for weights in ("tiny_noise", str(tiny))],
    )  # fmt: skip
    with open_store(tmp_path / "s") as store:
        attrs = {name: store.stream_attrs(name) for name in ("named", "plain")}
        rows = {name: store[name, "v"].numpy() for name in attrs}
    named, plain = attrs["named"], attrs["plain"]
    assert named["weights_source"] == "tiny_noise"
    assert plain["weights_source"] == str(tiny)
    assert named["spec"]["weights"] == plain["spec"]["weights"]
    assert named["spec"]["channel_order"] == "bgr"
    assert "channel_order" not in plain["spec"]
    assert named["fingerprint"] != plain["fingerprint"]
    assert len(rows["named"]) > len(rows["plain"])  # stride 2 instead of 4

    def again(stream: str = "named", **places: str) -> dict[str, Any]:
        run = SimpleNamespace(path=tmp_path / "run", features={stream: {**attrs[stream], **features}})
        run.parts = [run]
        recipe = feature_recipes(run, weights=places)[stream]  # type: ignore[arg-type]
        return json.loads(json.dumps(resolve(recipe, name=stream).spec))

    features: dict[str, Any] = {}
    assert again() == named["spec"]
    assert again("plain") == plain["spec"]
    kept = fetch("tiny_noise")
    kept.unlink()
    assert again() == named["spec"]  # fetched again
    tiny.unlink()
    assert again() == named["spec"]
    assert again("plain", plain="tiny_noise") == plain["spec"]  # that file, prepared as it was at extraction
    moved = kept.rename(tmp_path / "moved.pth")  # no address, no cache: a file that is given
    assert again(named=str(moved)) == named["spec"]
    assert again(named=f"tiny_noise={moved}") == named["spec"]
    features["weights_source"] = f"tiny_noise={moved}"
    assert again() == named["spec"]
    features.clear()
    (tmp_path / "run" / "weights").mkdir(parents=True)
    moved.rename(tmp_path / "run" / "weights" / "w.pth")
    assert again() == named["spec"]
    (tmp_path / "run" / "weights" / "w.pth").rename(kept)
    assert again() == named["spec"]
    kept.unlink()
    with pytest.raises(WeightsError, match="could not be fetched"):
        again()


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_levels_can_be_extracted_without_another_flag(name: str, entry: Published) -> None:
    spec = replace(SPECS[entry.backbone], **entry.spec)
    plan = SnippetPlan(spec.window, spec.interval, spec.stride)
    for level, info in spec.levels.items():
        plan.check_level(level, info.stride)
