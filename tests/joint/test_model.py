"""The whole model of joint mode against plain torch: what it trains, what it leaves alone, bit for bit or to 1e-12."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tad.detect.data import Step
from tad.detect.detectors import build_detector
from tad.detect.interface import Batch, Detector, Targets
from tad.detect.samplers import sample_count
from tad.detect.trainer import Trainer
from tad.errors import RecipeError
from tad.extract.backbones.tiny import Tiny3D
from tad.joint import gradient_sampling
from tad.joint.bank import FeatureBank
from tad.joint.clips import Clips, JointBatch
from tad.joint.dataset import collate
from tad.joint.encoder import Encoder
from tad.joint.freezing import freeze
from tad.joint.model import JointModel, side_by_side
from tad.recipe import DataRecipe, JointRecipe, TrainRecipe
from tad.store import Store
from tad.timeline import TimeAxis
from tad.training.distributed import World
from tad.training.rng import seed_all
from tests.joint.footage import dataset, filled, make_footage, recipe
from tests.joint.toys import noise, one_by_one, tiny

ROWS = (7, 5)  # of the samples of a batch
DETECTORS: dict[str, dict[str, Any]] = {
    "talnet": {"width": 8, "anchor_scales": [2, 4], "dropout": 0.2},
    "etad": {
        "rows": 8, "width": 8, "lstm_width": 4, "branch_width": 4, "norm_groups": 2, "roi_channels": 4,
        "head_width": 8, "branch_head_width": 4, "ratio": 0.5, "dropout": 0.2,
    },
}  # fmt: skip


def detector_of(name: str) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return build_detector(name, channels={"net": 5}, classes=2, **DETECTORS[name]).double().train()


def samples(name: str = "talnet", *, seed: int = 0) -> JointBatch:
    """Two samples of noise with an action each; of ETAD, whose videos are rescaled, of equal length and with rows that
    lie between two snippets."""
    rows = (8, 8) if name == "etad" else ROWS
    clips = [noise(clips=count, side=8, seed=seed + index) for index, count in enumerate(rows)]
    if name == "etad":
        clips[1] = noise(clips=5, side=8, seed=seed + 1)
        clips[1].place = torch.linspace(0, 4, 8)
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    axes = [TimeAxis.from_frames(fps=10, window_frames=4, stride_frames=2)] * 2
    targets = [
        Targets(torch.tensor([[1.0, 4.5]]), torch.tensor([0])),
        Targets(torch.tensor([[0.5, 2.5], [2.0, 5.5]]), torch.tensor([1, 0])),
    ]
    stored = {"net": torch.full((2, 5, max(rows)), float("nan"), dtype=torch.float64)}  # nothing may read these
    return JointBatch(["a/b", "ü"], stored, mask, axes, [3.0, 2.0], targets, clips={"net": clips})


def joined(detector: Detector, *, chunk: int = 4, checkpoint: bool = False, bank: bool = False, **joint: Any) -> Any:
    """The model, on a copy of the detector and a backbone of which all but the norms trains."""
    backbone = tiny()
    freeze(backbone, stages=0, norms=True)
    encoders = {"net": Encoder(backbone=backbone, chunk=chunk, checkpoint=checkpoint)}
    rows = [(video, torch.zeros(20, 5)) for video in ("a/b", "ü")]
    banks = {"net": FeatureBank(rows)} if bank else {}
    recipe = JointRecipe(**joint)
    return JointModel(detector=deepcopy(detector), encoders=encoders, joint=recipe, banks=banks).train()


def by_hand(backbone: Tiny3D, batch: JointBatch, detached: list[Tensor] | None = None) -> Batch:
    """The batch with rows made clip by clip; of each sample, ``detached`` are taken without a graph."""
    features = torch.zeros(*batch.mask.shape, 5, dtype=torch.float64)
    for index, clip in enumerate(batch.clips["net"]):
        rows = [row[0] for row in one_by_one(backbone, clip)]
        for place in [] if detached is None else detached[index].tolist():
            rows[place] = rows[place].detach()
        for place, at in enumerate(clip.place.tolist()):
            low, part = int(at), at - int(at)
            features[index, place] = rows[low] if part == 0 else rows[low] * (1 - part) + rows[low + 1] * part
    values = features.transpose(1, 2)
    return Batch(batch.videos, {"net": values}, batch.mask, batch.axes, batch.durations_s, batch.targets)


def backward(module: Detector, batch: Batch) -> float:
    """The gradients of one pass, from the same draws each time."""
    seed_all(7)
    terms = module.loss(module(batch), batch.targets or [])
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    return float(loss.detach())


def assert_same_gradients(module: Any, detector: Detector, backbone: Any) -> None:
    for own, other in ((module.detector, detector), (module.encoders[0].backbone, backbone)):
        expected = dict(other.named_parameters())
        assert any(p.grad is not None and p.grad.abs().max() > 1e-9 for p in expected.values())
        for name, parameter in own.named_parameters():
            wanted = expected[name].grad
            assert (parameter.grad is None) == (wanted is None), name
            if wanted is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", list(DETECTORS))
@pytest.mark.parametrize(
    "options",
    [{"mode": "full"}, {"mode": "egs", "ratio": 1.0}, {"mode": "full", "checkpoint": True, "chunk": 2},
     {"mode": "bank", "ratio": 1.0, "bank": True}],
    ids=["full", "egs", "checkpoint", "bank"],
)  # fmt: skip
def test_ratio_1_is_plain_backpropagation(name: str, options: dict[str, Any]) -> None:
    detector, batch = detector_of(name), samples(name)
    module = joined(detector, **options)
    backbone = deepcopy(module.encoders[0].backbone)
    assert backward(module, batch) == pytest.approx(backward(detector, by_hand(backbone, batch)), rel=1e-12)
    assert_same_gradients(module, detector, backbone)


@pytest.mark.parametrize(
    ("name", "sampler"), [("etad", "random"), *(("talnet", s) for s in ("random", "grid", "block", "fps", "dpp"))]
)
def test_a_ratio_is_backpropagation_with_the_others_detached(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, batch = detector_of(name), samples(name)
    module = joined(detector, mode="egs", ratio=0.4, sampler=sampler)
    backbone = deepcopy(module.encoders[0].backbone)
    drawn: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    choose = gradient_sampling.choose

    def noted(count: int, **given: Any) -> tuple[Tensor, Tensor]:
        drawn.append(choose(count, **given))
        states.append(torch.get_rng_state())
        return drawn[-1]

    monkeypatch.setattr(gradient_sampling, "choose", noted)
    loss = backward(module, batch)
    assert [len(chosen) for chosen, _ in drawn] == [sample_count(0.4, len(c.rows)) for c in batch.clips["net"]]
    hand = by_hand(backbone, batch, [others for _, others in drawn])
    torch.set_rng_state(states[-1])  # the detector draws after the snippets
    terms = detector.loss(detector(hand), batch.targets or [])
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-12)
    assert_same_gradients(module, detector, backbone)


@pytest.mark.parametrize(("name", "dropout"), [("talnet", 0.3), ("etad", 0.0)])
def test_ratio_0_is_two_stage_training_bit_for_bit(name: str, dropout: float) -> None:
    """Several steps of the trainer itself, accumulated, averaged and clipped."""
    detector = detector_of(name)
    module = joined(detector, mode="egs", ratio=0.0)
    module.feature_dropout = dropout
    before = deepcopy(module.encoders.state_dict())
    train = TrainRecipe(
        epochs=1, batch_videos=2, optimizer="adamw", lr=1e-2, ema=0.9, clip_norm=0.5, accumulate=2,
        feature_dropout=dropout,
    )  # fmt: skip
    batches = [samples(name, seed=10 * step) for step in range(4)]
    encoder = deepcopy(module.encoders[0])
    rows = []
    for batch in batches:
        with torch.no_grad():
            made = [encoder(clip.frames, clip.index)["features"] for clip in batch.clips["net"]]
        own = {"net": side_by_side(made, batch.clips["net"], batch.mask)}
        rows.append(Batch(batch.videos, own, batch.mask, batch.axes, batch.durations_s, batch.targets))
    by_one = by_hand(encoder.backbone, batches[0]).features["net"]
    torch.testing.assert_close(rows[0].features["net"], by_one, rtol=1e-12, atol=1e-12)
    found = []
    for network, given in ((module, batches), (detector, rows)):
        trainer = Trainer(network, train, World(0, 1, torch.device("cpu")))
        seed_all(3)
        feed = iter(given)
        sums = [trainer.step(Step(((0, 1), (2, 3))), feed) for _ in range(2)]
        judged = trainer.judged.detector if isinstance(trainer.judged, JointModel) else trainer.judged
        found.append((sums, judged.state_dict(), torch.get_rng_state()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][2], found[1][2])
    for (key, value), (other, expected) in zip(
        [*module.detector.state_dict().items(), *found[0][1].items()],
        [*detector.state_dict().items(), *found[1][1].items()],
        strict=True,
    ):
        assert key == other
        assert torch.equal(value, expected), key
    start = detector_of(name).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in detector.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in module.encoders.state_dict().items())


def test_the_bank_gives_the_rows_that_are_not_computed() -> None:
    detector, batch = detector_of("talnet"), samples()
    module = joined(detector, mode="bank", ratio=0.4, sampler="grid", bank=True)
    bank = module.banks["net"]
    with torch.no_grad():
        current = [torch.cat(one_by_one(module.encoders[0].backbone, clip)) for clip in batch.clips["net"]]
    rows = module.rows(batch)["net"]  # (B, D, T)
    for index, (clip, video) in enumerate(zip(batch.clips["net"], batch.videos, strict=True)):
        written = bank.read(video, clip.rows).abs().sum(1) > 0
        assert int(written.sum()) == sample_count(0.4, len(clip.rows))
        for place in range(len(clip.rows)):
            expected = current[index][place] if written[place] else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(rows[index, :, place], expected, rtol=1e-12, atol=1e-12)
        assert not rows[index, :, len(clip.rows) :].any()


def test_two_samples_of_one_batch_are_what_they_are_alone() -> None:
    detector = detector_of("talnet").eval()
    module, batch = joined(detector, mode="full").eval(), samples()
    with torch.no_grad():
        together = module.rows(batch)["net"]
        for index, clip in enumerate(batch.clips["net"]):
            alone = module.rows(JointBatch(
                batch.videos[index : index + 1], {}, batch.mask[index : index + 1, : len(clip.rows)],
                batch.axes[:1], [1.0], clips={"net": [clip]},
            ))["net"]  # fmt: skip
            assert torch.equal(together[index, :, : len(clip.rows)], alone[0])


# ---- stage outputs of one pass ---------------------------------------------------------------------------------------
LEVELS = {"s1": 32, "s2": 64, "s4": 128}
CLIP = {
    "levels": list(LEVELS), "level_channels": LEVELS, "rows": 16, "proposals": 4, "heads": 2, "width": 8,
    "interaction_width": 4, "attention_heads": 2, "feedforward": 8, "soi_points": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    root = tmp_path_factory.mktemp("footage")
    recipes = {"net": recipe(levels=True), "frames": recipe("frames")}
    with filled(make_footage(root), root / "store.zarr", recipes) as store:
        yield store


def sptad(**changes: Any) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return build_detector("sptad", channels={"net": 128}, classes=1, **{**CLIP, **changes}).double().train()


def pass_model(detector: Detector, **joint: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        backbone = Tiny3D().double()
    freeze(backbone, stages=0, norms=True)
    encoder = Encoder(backbone=backbone, keys=[need.level for need in detector.needs], checkpoint=False)
    return JointModel(detector=deepcopy(detector), encoders={"net": encoder}, joint=JointRecipe(**joint)).train()


@pytest.mark.parametrize("joint", [{"mode": "full"}, {"mode": "egs", "ratio": 1.0}, {"mode": "egs", "ratio": 0.0}])
def test_one_pass_is_plain_backpropagation(footage: Store, joint: dict[str, Any]) -> None:
    detector = sptad()
    module = pass_model(detector, **joint)
    backbone = deepcopy(module.encoders[0].backbone)
    made = dataset(footage, detector.needs, data=DataRecipe(train_stride=8, empty_windows=True))
    batch = collate([made[0, index] for index in (0, len(made) - 1, 1)])
    assert batch is not None
    assert not batch.mask.all()  # a window that ends behind its video
    levels: dict[str, list[Tensor]] = {level: [] for level in LEVELS}
    for clip in batch.clips["net"]:
        frames = clip.frames[clip.index[0]].transpose(0, 1)[None]  # (1, C, W, H, W')
        for level, values in backbone(backbone.normalise(frames, torch.float64), levels=True).items():
            if level in levels:
                levels[level].append(values.mean((3, 4))[0])
    features = {}
    for need in detector.needs:
        mask = batch.mask_of(need.key)
        rows = torch.stack([one[:, : mask.shape[1]] for one in levels[need.level]])  # (B, C, T)
        assert rows.shape == (3, LEVELS[need.level], mask.shape[1])
        features[need.key] = rows * mask[:, None]
    if joint.get("ratio") == 0.0:
        features = {key: rows.detach() for key, rows in features.items()}
    plain = Batch(batch.videos, features, batch.mask, batch.axes, batch.durations_s, batch.targets, masks=batch.masks)
    assert backward(module, batch) == pytest.approx(backward(detector, plain), rel=1e-12)
    if joint.get("ratio") == 0.0:
        assert all(parameter.grad is None for parameter in module.encoders.parameters())
    else:
        assert_same_gradients(module, detector, backbone)


@pytest.mark.parametrize("joint", [{"mode": "egs", "ratio": 0.3}, {"mode": "bank", "ratio": 1.0}])
def test_snippets_of_one_pass_cannot_be_sampled(joint: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"reads stage outputs \(net/s1, net/s2, net/s4\).*joint\.mode=full"):
        pass_model(sptad(), **joint)


class TwoWays(Detector):
    """Reads snippets of one stream and a stage of another."""

    def __init__(self, needs: Any) -> None:
        super().__init__()
        self.needs = needs

    def forward(self, batch: Batch) -> Any:
        return batch.features


def test_streams_of_both_ways_go_together(footage: Store) -> None:
    """A stream that is read snippet by snippet stays so beside one that is read in one pass."""
    from tad.detect.interface import LevelSpec

    needs = (LevelSpec("net/s4-like"), LevelSpec("net", "s4"))
    backbone = tiny(double=False)
    encoders = {
        "net/s4-like": Encoder(backbone=backbone), "net": Encoder(backbone=tiny(double=False), keys=["s4"]),
    }  # fmt: skip
    module = JointModel(detector=TwoWays(needs), encoders=encoders, joint=JointRecipe(mode="full")).eval()
    snippets = noise(clips=3)
    whole = Clips(snippets.frames[:4].repeat(3, 1, 1, 1), torch.arange(12)[None], torch.tensor([0]), torch.zeros(0))
    batch = JointBatch(
        ["v"], {}, torch.ones(1, 3, dtype=torch.bool), [], [1.0],
        clips={"net/s4-like": [snippets], "net": [whole]},
    )  # fmt: skip
    with torch.no_grad():
        rows = module(batch)
        expected = torch.cat(one_by_one(backbone, snippets))
        stage = one_by_one(encoders["net"].backbone, whole, "s4")[0].mean((3, 4))
    torch.testing.assert_close(rows["net/s4-like"][0].T, expected)
    torch.testing.assert_close(rows["net/s4"], stage)
