"""The feature bank against a dict of arrays, and what a step with it computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tad.errors import RecipeError, TadError
from tad.joint.bank import FeatureBank, encode_banked
from tad.joint.encoder import Encoder
from tad.joint.freezing import freeze
from tests.joint.toys import noise, one_by_one, tiny

LENGTHS = {"a": 5, "ü/ß 1": 1, "": 3}  # ids are whatever a dataset has; D = 2
DTYPES = {"float16": np.float16, "float32": np.float32}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def begin(dtype: str) -> tuple[FeatureBank, dict[str, np.ndarray]]:
    """A bank, and the arrays that it should be equal to."""
    rng = np.random.default_rng(0)
    arrays = {video: rng.standard_normal((length, 2)).astype(DTYPES[dtype]) for video, length in LENGTHS.items()}
    return FeatureBank(((v, torch.from_numpy(a).float()) for v, a in arrays.items()), dtype=dtype), arrays


def check_same(bank: FeatureBank, arrays: dict[str, np.ndarray]) -> None:
    for video, array in arrays.items():
        held = bank.read(video, torch.arange(len(array)))
        assert held.dtype == torch.float32
        np.testing.assert_array_equal(held.numpy(), array.astype(np.float32))


@st.composite
def actions(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Writes, exchanges, saves and loads, by two processes."""
    found: list[tuple[Any, ...]] = []
    for _ in range(draw(st.integers(0, 8))):
        video = draw(st.sampled_from(sorted(LENGTHS)))
        rows = draw(st.lists(st.integers(0, LENGTHS[video] - 1), unique=True))
        values = draw(st.lists(st.floats(-60000, 60000, width=32), min_size=2 * len(rows), max_size=2 * len(rows)))
        found.append(
            (draw(st.sampled_from(["write", "exchange", "reload"])), draw(st.integers(0, 1)), video, rows, values)
        )
    return found


@settings(max_examples=40, deadline=None)
@given(script=actions(), dtype=st.sampled_from(["float16", "float32"]))
def test_two_banks_are_dicts_of_arrays_which_an_exchange_makes_equal(script: list[Any], dtype: str) -> None:
    banks, arrays = zip(*(begin(dtype) for _ in range(2)), strict=True)
    log: list[list[tuple[str, int]]] = [[], []]  # (video, row) that the other process does not know
    lost = False  # a state was loaded before what it holds was exchanged
    for what, rank, video, rows, values in script:
        if what == "write":
            new = np.array(values, np.float32).reshape(len(rows), 2)
            banks[rank].write(video, torch.tensor(rows, dtype=torch.int64), torch.from_numpy(new))
            arrays[rank][video][rows] = new.astype(DTYPES[dtype])
            log[rank] += [(video, row) for row in rows]
        elif what == "exchange":
            sent = [(v, r, arrays[process][v][r].copy()) for process in (0, 1) for v, r in log[process]]
            for own in arrays:
                for v, r, value in sent:
                    own[v][r] = value
            updates = [bank.pending() for bank in banks]
            assert [sorted((v, r) for v, rs, _ in own for r in rs.tolist()) for own in updates] == [
                sorted(set(own)) for own in log
            ]
            for bank in banks:
                for own in updates:
                    bank.apply(own)
            log = [[], []]
            assert [bank.pending() for bank in banks] == [[], []]
            for v in LENGTHS:
                assert lost or np.array_equal(arrays[0][v], arrays[1][v])
        else:
            file = io.BytesIO()
            torch.save(banks[rank].state_dict(), file)
            file.seek(0)
            banks[rank].load_state_dict(torch.load(file, weights_only=True))
            lost = lost or bool(log[rank])
            log[rank] = []
        for bank, own in zip(banks, arrays, strict=True):
            check_same(bank, own)


def test_what_is_read_and_written_is_a_copy_and_the_stored_rows_stay() -> None:
    stored, places = torch.zeros(3, 2), torch.tensor([0, 2])
    bank = FeatureBank([("v", stored)])
    read = bank.read("v", torch.tensor([2, 0, 2]))
    read += 1
    values = torch.ones(2, 2, requires_grad=True)
    bank.write("v", places, values)
    assert not bank.read("v", places).requires_grad
    with torch.no_grad():
        values.zero_()
    assert bank.read("v", torch.arange(3)).tolist() == [[1, 1], [0, 0], [1, 1]]
    assert not stored.any()
    assert "v" in bank
    assert "w" not in bank
    assert len(bank) == 1


def test_averaged_weights_share_it() -> None:
    bank, _ = begin("float32")
    holder = {"bank": bank, "other": [1]}
    copied = copy.deepcopy(holder)
    assert copied["bank"] is bank
    assert copied["other"] is not holder["other"]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    bank, arrays = begin("float16")
    bank.write("a", torch.tensor([1]), torch.ones(1, 2))
    arrays["a"][1] = 1
    good = bank.state_dict()
    rows = {video: torch.zeros_like(held) for video, held in good["rows"].items()}
    for state, message in (
        ({"dtype": "float16", "rows": {**rows, "b": torch.zeros(1, 2)}}, "1 are in one only, such as b"),
        ({"dtype": "float16", "rows": {"a": rows["a"]}}, "2 are in one only"),
        ({"dtype": "float32", "rows": rows}, "holds float32, this one float16"),
        ({"dtype": "float16", "rows": {**rows, "": torch.zeros(4, 2)}}, r"rows \(4, 2\) of"),
    ):
        with pytest.raises(TadError, match=message):
            bank.load_state_dict(state)
        check_same(bank, arrays)
    assert [(video, places.tolist()) for video, places, _ in bank.pending()] == [("a", [1])]


def test_what_is_refused() -> None:
    bank, arrays = begin("float16")
    one = torch.zeros(1, 2)
    for video, row, values, error, message in (
        ("A", [0], one, TadError, "no video 'A'"),
        ("a", [5], one, TadError, "rows 0 to 4 of a, not 5"),
        ("a", [-1], one, TadError, "not -1"),
        ("a", [1, 1], torch.zeros(2, 2), ValueError, "named twice"),
        ("a", [0, 1], one, ValueError, r"must be \(2, 2\)"),
        ("a", [0], torch.zeros(1, 3), ValueError, r"must be \(1, 2\)"),
        ("a", [0], one + 7e4, TadError, "a go up to 70000.*float32"),
    ):
        with pytest.raises(error, match=message):
            bank.write(video, torch.tensor(row), values)
        with pytest.raises(error, match=message):
            bank.apply([(video, torch.tensor(row), values)])
    with pytest.raises(TadError, match="no video 'b'"):
        bank.read("b", torch.tensor([0]))
    with pytest.raises(TadError, match="rows 0 to 0"):
        bank.read("ü/ß 1", torch.tensor([1]))
    with pytest.raises(ValueError, match="int64"):
        bank.read("a", torch.tensor([True]))
    assert bank.pending() == []
    check_same(bank, arrays)
    with pytest.raises(TadError, match="a twice"):
        FeatureBank([("a", one), ("a", one)])
    with pytest.raises(ValueError, match="float64"):
        FeatureBank([], dtype="float64")
    with pytest.raises(ValueError, match="of a must be"):
        FeatureBank([("a", torch.zeros(2, 3, 4))])
    with pytest.raises(TadError, match="a go up to 70000"):
        FeatureBank([("a", one + 7e4)], dtype="float16")


def test_values_that_are_no_numbers_are_kept_as_they_are() -> None:
    """A store may hold them; that the bank's float16 does not make them is all that it can say."""
    for dtype in DTYPES:
        bank = FeatureBank([("v", torch.tensor([[torch.nan, torch.inf]])), ("empty", torch.zeros(0, 2))], dtype=dtype)
        assert bank.read("v", torch.tensor([0])).isnan().tolist() == [[True, False]]
        assert bank.read("empty", torch.zeros(0, dtype=torch.int64)).shape == (0, 2)


# ---- a step with it -------------------------------------------------------------------------------------------------
def banked(dtype: str = "float32") -> tuple[Encoder, FeatureBank, dict[str, Tensor]]:
    """An encoder, and a bank of two videos with rows that it would never compute."""
    backbone = tiny()
    freeze(backbone, stages=1, norms=True)
    rows = {"a": torch.full((12, 5), 100.0), "b": torch.full((12, 5), 200.0)}
    return Encoder(backbone=backbone, chunk=3).train(), FeatureBank(rows.items(), dtype=dtype), rows


@pytest.mark.parametrize("sampler", ["random", "grid", "block", "fps", "dpp"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_chosen_are_computed_and_written_and_the_others_are_stale(sampler: str, dtype: str) -> None:
    encoder, bank, stored = banked(dtype)
    clips = [noise(clips=8, seed=1), noise(clips=3, seed=2)]  # rows 3 to 10 of a, 3 to 5 of b
    computed: list[int] = []
    encoder.backbone.register_forward_pre_hook(lambda _, args: computed.append(len(args[0])))
    rows = encode_banked(encoder, clips, videos=["a", "b"], bank=bank, ratio=0.4, sampler=sampler)
    assert computed == [3, 1]  # nothing but the chosen ones is computed
    computed.clear()
    loss = 0.0
    expected_loss = 0.0
    for video, clip, found, count in zip("ab", clips, rows, (3, 1), strict=True):
        held = bank.read(video, torch.arange(12))
        old = float(stored[video][0, 0])
        chosen = (found != old).all(1)
        assert int(chosen.sum()) == count
        fresh = torch.cat(one_by_one(encoder.backbone, clip))
        torch.testing.assert_close(found[chosen], fresh[chosen], rtol=1e-12, atol=1e-12)
        assert (found[~chosen] == old).all()
        precision = torch.float16 if dtype == "float16" else torch.float32
        assert torch.equal(held[3 : 3 + len(found)][chosen], found[chosen].detach().to(precision).float())
        unseen = torch.ones(12, dtype=torch.bool)
        unseen[clip.rows[chosen]] = False
        assert (held[unseen] == old).all()
        loss = loss + found.square().mean(0).sin().sum()
        slow = torch.where(chosen[:, None], fresh, torch.full_like(fresh, old))
        expected_loss = expected_loss + slow.square().mean(0).sin().sum()
    weights = [p for p in encoder.parameters() if p.requires_grad]
    for found_gradient, wanted in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected_loss, weights), strict=True
    ):
        torch.testing.assert_close(found_gradient, wanted, rtol=1e-12, atol=1e-12)


def test_a_snippet_that_is_never_chosen_keeps_its_first_features_through_a_training() -> None:
    encoder, bank, stored = banked()
    clip = noise(clips=8, seed=1)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.05)
    last: dict[int, Tensor] = {}
    for _ in range(4):
        rows = encode_banked(encoder, [clip], videos=["a"], bank=bank, ratio=0.2)[0]
        for place in range(8):
            before = last.get(place, stored["a"][place + 3].double())
            if not torch.equal(rows[place].detach().float(), before.float()):
                last[place] = rows[place].detach()
        (rows - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < len(last) < 8
    for place in range(8):
        expected = last[place].float() if place in last else stored["a"][place + 3]
        assert torch.equal(bank.read("a", torch.tensor([place + 3]))[0], expected), place
    now = torch.cat(one_by_one(encoder.backbone, clip)).float()
    stale = [place for place in last if not torch.allclose(now[place], last[place].float(), atol=1e-7)]
    assert stale  # rows that were computed with earlier weights are not computed anew


def test_none_and_all() -> None:
    encoder, bank, stored = banked()
    clip, before = noise(clips=4), torch.random.get_rng_state()
    rows = encode_banked(encoder, [clip], videos=["b"], bank=bank, ratio=0.0)[0]
    assert torch.equal(rows, stored["b"][3:7].double())
    assert not rows.requires_grad
    assert bank.pending() == []
    rows = encode_banked(encoder, [clip], videos=["b"], bank=bank, ratio=1.0)[0]
    torch.testing.assert_close(rows, torch.cat(one_by_one(encoder.backbone, clip)), rtol=1e-12, atol=1e-12)
    [(video, places, values)] = bank.pending()
    assert (video, places.tolist()) == ("b", [3, 4, 5, 6])
    assert torch.equal(values, rows.detach().float())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_validation_computes_everything_and_leaves_the_bank_alone() -> None:
    encoder, bank, stored = banked()
    clip, before = noise(clips=4), torch.random.get_rng_state()
    with torch.no_grad():
        rows = encode_banked(encoder.eval(), [clip], videos=["held out"], bank=bank, ratio=0.5, sampler="dpp")[0]
    torch.testing.assert_close(rows, torch.cat(one_by_one(encoder.backbone, clip)), rtol=1e-12, atol=1e-12)
    assert bank.pending() == []
    assert torch.equal(bank.read("a", torch.arange(12)), stored["a"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_later_samples_of_a_video_read_what_earlier_ones_wrote() -> None:
    encoder, bank, _ = banked()
    clip = noise(clips=4)
    first, second = encode_banked(encoder, [clip, clip], videos=["a", "a"], bank=bank, ratio=0.5)
    written = (first != 100).all(1)
    assert int(written.sum()) == 2
    torch.testing.assert_close(second[written].float(), first[written].float(), rtol=1e-6, atol=1e-6)


def test_rows_and_videos_that_the_bank_does_not_have_are_named() -> None:
    encoder, bank, _ = banked()
    clip = noise(clips=4)
    with pytest.raises(TadError, match="no video 'c'"):
        encode_banked(encoder, [clip], videos=["c"], bank=bank, ratio=0.5)
    clip.rows += 8
    with pytest.raises(TadError, match="not 12"):
        encode_banked(encoder, [clip], videos=["a"], bank=bank, ratio=1.0)
    with pytest.raises(RecipeError, match=r"joint\.ratio"):
        encode_banked(encoder, [clip], videos=["a"], bank=bank, ratio=1.5)
