"""Stage outputs kept as maps, frames and flow stored as they are: their values, where they lie in time, how large."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tad.cli import main
from tad.errors import RecipeError, StoreError, TadError
from tad.extract import build_backbone, extract
from tad.extract.backbones import SPECS
from tad.extract.flow import FlowStream, build_flow
from tad.extract.jobs import setup_of
from tad.extract.maps import as_half, maps_of
from tad.extract.raw import RAW
from tad.extract.report import dry_run, dry_run_lines, recipes_of
from tad.extract.streams import recipe_of, resolve
from tad.extract.video import FrameReader, Geometry, crop
from tad.recipe import ExtractRecipe
from tad.store import Store, open_store
from tad.store.torch import SnippetDataset
from tad.synth import make_video
from tests.extract.videofiles import LOSSLESS, write_video

SMALL = {"fps": 10.0, "short_side": 48, "crop": (32, 40)}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    make_video(path, duration_s=5.3, seed=4, size=(72, 96), fps=10.0)
    return path


def network(name: str, **changes: object) -> ExtractRecipe:
    values: dict[str, object] = {"backbone": name, "weights": "random:3", "window": 16, "stride": 8, **SMALL}
    return ExtractRecipe(**{**values, **changes})  # type: ignore[arg-type]


def raw(name: str, **changes: object) -> ExtractRecipe:
    return ExtractRecipe(backbone=name, **changes)  # type: ignore[arg-type]


def frames_of(path: Path, geometry: Geometry, fps: float | None) -> np.ndarray:
    """All frames of a video on the grid, cut, (F, H, W, 3)."""
    with FrameReader(path, fps=fps, geometry=geometry) as reader:
        return crop(np.concatenate(list(reader)), reader.plan)


def flow_of(path: Path, geometry: Geometry, fps: float | None) -> np.ndarray:
    """The flow of all frames, estimated before the cut, (F, H, W, 2)."""
    estimator = FlowStream(build_flow("dis"))
    with FrameReader(path, fps=fps, geometry=geometry) as reader:
        frames = np.concatenate(list(reader))
        return crop(np.concatenate([estimator.push(frames), estimator.finish()]), reader.plan)


# ---- maps ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize(
    ("name", "maps", "shapes"),
    [
        ("i3d-rgb", ("s8", "s4"), {"s4-map": (14, 832, 2, 3), "s8-map": (7, 1024, 1, 2)}),
        ("i3d-flow", ("s2", "s8"), {"s2-map": (27, 480, 4, 5), "s8-map": (7, 1024, 1, 2)}),
        ("tiny", ("s1", "s2", "s4"), {"s1-map": (53, 32, 8, 10), "s2-map": (27, 64, 4, 5), "s4-map": (14, 128, 2, 3)}),
    ],
)
def test_a_pooled_level_is_the_mean_of_its_map(
    tmp_path: Path, video: Path, name: str, maps: tuple[str, ...], shapes: dict[str, tuple[int, ...]], format: str
) -> None:
    # windows overlap, and the last one is padded: both levels must be joined alike
    report = extract(video, store=tmp_path / "s", recipes=network(name, levels=True, maps=maps), format=format, batch=3)
    assert not report.failures
    with open_store(tmp_path / "s") as store:
        levels = set(build_backbone(name).spec.levels)
        assert set(store.levels(name, "v")) == {"features", *levels, *shapes}
        for level in maps:
            kept, pooled = store[name, "v", f"{level}-map"], store[name, "v", level]
            assert (kept.shape, kept.dtype) == (shapes[f"{level}-map"], np.float16)
            assert kept.axis == pooled.axis
            rows = kept.numpy().astype(np.float64)
            mean, size = rows.mean(axis=(2, 3)), np.abs(rows).mean(axis=(2, 3))
            # half of float16's last digit of every value, and its smallest step near zero
            np.testing.assert_array_less(np.abs(mean - pooled.numpy()), size * 2**-11 + 2**-24)
            assert rows.std() > 0
            if kept.shape[2] * kept.shape[3] > 1:
                assert np.abs(rows - mean[:, :, None, None]).max() > 0.01 * rows.max()  # a map, not its mean repeated
        assert store.verify(deep=True).ok


def test_maps_of_one_window_are_those_of_the_network(tmp_path: Path, video: Path) -> None:
    chosen = network("i3d-rgb", window=56, stride=56, maps=("s4", "s8"))
    extract(video, store=tmp_path / "s", recipes=chosen)
    frames = frames_of(video, Geometry(48, (32, 40)), 10.0)
    clip = torch.from_numpy(frames[np.minimum(np.arange(56), len(frames) - 1)]).permute(3, 0, 1, 2)[None]
    backbone = build_backbone("i3d-rgb", weights="random:3")
    with torch.inference_mode():
        outputs = backbone(backbone.normalise(clip), levels=True)
    with open_store(tmp_path / "s") as store:
        assert set(store.levels("i3d-rgb", "v")) == {"features", "s4-map", "s8-map"}  # maps do not ask for levels
        for level, rows in (("s4", 14), ("s8", 7)):
            feature = store["i3d-rgb", "v", f"{level}-map"]
            expected = outputs[level][0].permute(1, 0, 2, 3)[:rows].numpy()  # (T', C, H', W')
            np.testing.assert_allclose(feature.numpy(), expected, rtol=2e-3, atol=1e-3 * expected.max())
            assert feature.axis.scale_s == pytest.approx(int(level[1:]) / 10)
            assert feature.attrs["levels"][0].keys() >= {"stride_frames", "window_frames"}


def test_maps_are_part_of_the_recipe_and_a_recipe_without_keeps_its_fingerprint(tmp_path: Path, video: Path) -> None:
    without, with_maps = (resolve(network("tiny", maps=maps)).spec for maps in ((), ("s4", "s2")))
    assert with_maps == {**without, "maps": {"s2": 2, "s4": 4}}
    extract(video, store=tmp_path / "s", recipes=network("tiny", maps=("s4",)))
    for other in ((), ("s2", "s4")):
        with pytest.raises(StoreError, match="maps"):
            extract(video, store=tmp_path / "s", recipes=network("tiny", maps=other))
    assert extract(video, store=tmp_path / "s", recipes=network("tiny", maps=("s4",))).already == 1


def test_what_float16_cannot_hold_is_an_error() -> None:
    assert as_half(torch.tensor([-65504.0, 1.0]), where="x").tolist() == [-65504.0, 1.0]
    for bad in (65520.0, -1e9, float("nan"), float("inf")):
        with pytest.raises(TadError, match="tiny: s4 has values"):
            as_half(torch.tensor([0.0, bad]), where="tiny: s4")


# ---- frames ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["zarr", "hdf5"])
@pytest.mark.parametrize(
    ("changes", "geometry", "fps"),
    [
        ({}, Geometry(112, (96, 96)), None),
        ({"fps": 4.0, "short_side": 40, "crop": (32, 48)}, Geometry(40, (32, 48)), 4.0),
        ({"fps": 25.0, "short_side": 20, "crop": "full"}, Geometry(20, None), 25.0),
    ],
)
def test_frames_and_flow_are_those_of_the_reader(
    tmp_path: Path, video: Path, changes: dict[str, object], geometry: Geometry, fps: float | None, format: str
) -> None:
    recipes = [raw(name, **changes) for name in RAW]
    report = extract(video, store=tmp_path / "s", recipes=recipes, format=format, batch=5)
    assert (report.failures, report.written) == ([], 2)
    expected = {"frames": frames_of(video, geometry, fps), "flow-frames": flow_of(video, geometry, fps)}
    with open_store(tmp_path / "s") as store:
        for name, frames in expected.items():
            feature = store[name, "v"]
            assert feature.dtype == np.uint8
            np.testing.assert_array_equal(feature.numpy(), frames.transpose(0, 3, 1, 2))  # (T, C, H, W)
            assert feature.axis.center_s(0) == pytest.approx(0.5 / (fps or 10.0))
            assert feature.axis.scale_s == feature.axis.window_s == pytest.approx(1 / (fps or 10.0))
        assert store.verify(deep=True).ok


def test_networks_maps_and_frames_share_one_pass(tmp_path: Path, video: Path) -> None:
    recipes = [network("tiny", maps=("s4",)), network("tiny-flow", maps=("s4",)),
               *(raw(name, **SMALL) for name in RAW)]  # fmt: skip
    report = extract(video, store=tmp_path / "s", recipes=recipes)
    assert report.written == 4
    assert report.video_s == pytest.approx(5.3, abs=0.1)  # four passes would be 21
    again = extract(video, store=tmp_path / "s", recipes=recipes)
    assert (again.written, again.already) == (0, 4)
    with open_store(tmp_path / "s", "a") as store:
        flow = store["flow-frames", "v"].numpy()
        store.delete("flow-frames", "v")
    assert extract(video, store=tmp_path / "s", recipes=recipes).written == 1  # alone, it is the same
    with open_store(tmp_path / "s") as store:
        np.testing.assert_array_equal(store["flow-frames", "v"].numpy(), flow)
        # the flow that is stored is the one that the flow network saw
        windows = torch.from_numpy(flow[np.minimum(np.arange(16) + 8 * np.arange(6)[:, None], len(flow) - 1)])
        with torch.inference_mode():
            run = resolve(network("tiny-flow")).run(windows.permute(0, 1, 3, 4, 2))["features"]  # (B, T, H, W, C)
        np.testing.assert_allclose(store["tiny-flow", "v"].numpy(), run.numpy(), rtol=1e-4, atol=1e-5)


def test_maps_and_frames_lie_at_the_same_seconds(tmp_path: Path) -> None:
    """A flash in frames 40 to 43 of 96 is in row 10 of the map of stride 4, and in the frames of that row's seconds."""
    frames = np.full((96, 48, 64, 3), 90, np.uint8)
    frames[40:44, 12:36, 16:48] = 250
    path = write_video(tmp_path / "flash.mkv", frames, rate=10, **LOSSLESS)  # type: ignore[arg-type]
    extract(path, store=tmp_path / "s", recipes=[network("i3d-rgb", maps=("s4",)), raw("frames", **SMALL)])
    with open_store(tmp_path / "s") as store:
        maps, small = store["i3d-rgb", "flash", "s4-map"], store["frames", "flash"]
        assert (len(maps), len(small)) == (24, 96)
        for row in (0, 7, 23):
            edges_s = maps.axis.to_seconds(np.array([row, row + 1]))
            np.testing.assert_allclose(small.axis.to_rows(edges_s), [4 * row, 4 * row + 4], atol=1e-9)
            inside = small.between(*(edges_s + [1e-6, -1e-6]))
            np.testing.assert_array_equal(inside, small[4 * row : 4 * row + 4])
        assert [bool(frame.max() > 200) for frame in small.between(3.9, 4.5)] == [False, True, True, True, True, False]
        values = maps.numpy().astype(np.float32)
        change = np.abs(values - values[3]).mean(axis=(1, 2, 3))  # row 3 lies well before
        # the flash starts and ends within row 10; what the network sees is centred there
        assert abs(np.average(np.arange(24), weights=change**2) - 10) < 0.6, change
        dataset = SnippetDataset(store, [("i3d-rgb", "s4-map"), ("frames", "features")], rows=8)
        item = dataset[1]
        assert item["features"]["i3d-rgb/s4-map"].shape == (8, 832, 2, 3)
        np.testing.assert_array_equal(item["features"]["frames/features"], small[32:64])


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mkv", np.full((1, 48, 64, 3), 7, np.uint8), rate=10, **LOSSLESS)  # type: ignore[arg-type]
    recipes = [network("tiny", maps=("s4",)), *(raw(name, **SMALL) for name in RAW)]
    assert not extract(path, store=tmp_path / "s", recipes=recipes).failures
    with open_store(tmp_path / "s") as store:
        assert store["tiny", "one", "s4-map"].shape == (1, 128, 2, 3)
        assert store["frames", "one"].shape == (1, 3, 32, 40)
        assert (store["flow-frames", "one"].numpy() == 128).all()  # no motion


# ---- recipes, sizes, the command line --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (network("tiny", maps=("s3",)), "no such stage output. Known: s1, s2, s4"),
        (network("tiny", maps=("s4",), window=10), "multiple of 4"),
        (ExtractRecipe(backbone="frames", weights="random"), "weights"),
        (ExtractRecipe(backbone="frames", stride=2), "stride"),
        (ExtractRecipe(backbone="frames", levels=True, window=16), "levels, window"),
        (ExtractRecipe(backbone="frames", flow="dis"), "flow-frames are"),
        (ExtractRecipe(backbone="flow-frames", flow="none"), "no flow method"),
        (ExtractRecipe(backbone="frame"), "Did you mean 'frames'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, video: Path, recipe: ExtractRecipe, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        extract(video, store=tmp_path / "s", recipes=recipe)
    assert not (tmp_path / "s").exists()
    with pytest.raises(RecipeError, match=r"vivit-b has no such stage output\. It has none"):
        maps_of(SPECS["vivit-b"], ("s4",))


def test_a_stored_stream_says_how_it_is_made_again(tmp_path: Path, video: Path) -> None:
    recipes = [
        network("tiny", maps=("s2", "s4"), levels=True),
        ExtractRecipe(backbone="frames", crop="full", window=1),
        ExtractRecipe(backbone="flow-frames", fps=5.0, flow="farneback", short_side=64),
    ]
    for recipe in recipes:
        stream = resolve(recipe)
        again = recipe_of(json.loads(json.dumps(stream.spec)), weights=recipe.weights)
        assert resolve(again).spec == stream.spec
        with open_store(tmp_path / "s", "a") as store:
            store.create_stream(stream.name, stream.spec, info=stream.info)
            assert store.stream_attrs(stream.name)["spec"] == stream.spec
            # what is sent to a worker is resolved there to the same stream
            sent = setup_of([stream], store, place="s", run="r", device=None, batch=1, overwrite=False, threads=None)
        assert resolve(ExtractRecipe(**json.loads(json.dumps(sent.recipes[stream.name])))).spec == stream.spec


def sizes_in(store: Store) -> dict[tuple[str, str], tuple[list[int], str, int]]:
    sizes = {}
    for stream, video in store:
        for level in store.levels(stream, video):
            feature = store[stream, video, level]
            sizes[stream, level] = (list(feature.shape), feature.dtype.name, feature.numpy().nbytes)
    return sizes


@pytest.mark.parametrize(("name", "last", "size"), [("i3d-rgb", "s8", (32, 40)), ("tiny", "s4", "full")])
def test_dry_run_tells_the_sizes(
    tmp_path: Path, video: Path, name: str, last: str, size: tuple[int, int] | str
) -> None:
    same = {**SMALL, "crop": size}
    recipes = [network(name, levels=True, maps=("s2", last), **same), network("tiny-flow", maps=("s4",), **same),
               *(raw(name, **same) for name in RAW)]  # fmt: skip
    plan = dry_run([video], store=str(tmp_path / "s"), recipes=recipes)
    assert not (tmp_path / "s").exists()
    extract(video, store=tmp_path / "s", recipes=recipes)
    with open_store(tmp_path / "s") as store:
        held = sizes_in(store)
    assert {(e["stream"], e["level"]): (e["shape"], e["dtype"], e["bytes"]) for e in plan["entries"]} == held
    assert plan["bytes"] == sum(size for _, _, size in held.values())
    text = "\n".join(dry_run_lines(plan))
    shape = held[name, f"{last}-map"][0]
    assert f"{name}/*/{last}-map: {np.prod(shape) * 2 / 2**20:.1f} MiB in all" in text
    first = dry_run_lines({**plan, "entries": [e for e in plan["entries"] if e["level"] == f"{last}-map"]})[0]
    assert f"{shape[0]} rows x {shape[1]} x {shape[2]} x {shape[3]} float16" in first


def test_values_go_to_those_that_understand_them() -> None:
    values = {"window": 16, "stride": 16, "levels": True, "maps": ("s4",), "flow": "farneback", "fps": 10.0,
              "short_side": 112, "crop": (96, 96), "precision": "fp32", "interval": None, "port": None,
              "interpolate_positions": False}  # fmt: skip
    made = {r.backbone: r for r in recipes_of(["i3d", "frames", "flow-frames"], ["random"], values)}
    assert {name: recipe.weights for name, recipe in made.items()} == {
        "i3d-rgb": "random", "i3d-flow": "random", "frames": None, "flow-frames": None,
    }  # fmt: skip
    assert made["i3d-rgb"].maps == ("s4",)
    same = {"fps": 10.0, "short_side": 112, "crop": (96, 96)}
    assert made["frames"] == raw("frames", **same)
    assert made["flow-frames"] == ExtractRecipe(backbone="flow-frames", flow="farneback", **same)  # type: ignore[arg-type]
    (alone,) = recipes_of(["frames"], [], {"window": 16})
    with pytest.raises(RecipeError, match="window"):  # nobody else could be meant
        resolve(alone)
    with pytest.raises(RecipeError, match="0 networks"):
        recipes_of(["frames"], ["random"], {})


def test_on_the_command_line(tmp_path: Path, video: Path) -> None:
    command = ["extract", str(video), "--store", str(tmp_path / "s"), "--backbone", "tiny", "--backbone", "frames",
               "--weights", "random", "--window", "16", "--stride", "16", "--fps", "10", "--short-side", "48", "--crop",
               "32x40", "--maps", "s2, s4"]  # fmt: skip
    planned = CliRunner().invoke(main, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "frames/v/features: 53 rows x 3 x 32 x 40 uint8, 0.19 MiB" in planned.stdout
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(main, ["store", "ls", str(tmp_path / "s")])
    table = {tuple(line.split()[:3]): line.split()[3:5] for line in listed.stdout.splitlines()}
    assert table["frames", "v", "features"] == ["53x3x32x40", "uint8"]
    assert table["tiny", "v", "s4-map"] == ["14x128x2x3", "float16"]
    assert CliRunner().invoke(main, ["store", "verify", str(tmp_path / "s"), "--deep"]).exit_code == 0
