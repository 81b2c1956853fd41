"""mAP, AR@AN and AUC against the values that the reference evaluators gave, to 1e-9."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tad.annotations import Truth, read_predictions, read_truth
from tad.evaluate import ANET_TIOU, PROTOCOLS, average_recall, detection_map, evaluate, evaluate_recall

CLOSE = 1e-9
MAIN = ("thumos_main_s1", "thumos_hard_s2", "anet_main_s1")
EDGE = (
    "all_scores_equal",
    "duplicate_gt",
    "duplicates_equal_scores",
    "empty_lists",
    "empty_results_dict",
    "exact_threshold_decimal",
    "gt_class_without_predictions",
    "gt_videos_without_predictions",
    "heavy_ties",
    "logit_scores",
    "perfect",
    "plain",
    "second_best_gt",
    "single_prediction",
    "string_segments",
    "unknown_label",
    "videos_absent_from_gt",
    "videos_without_gt_in_subset",
    "zero_length_and_inverted_predictions",
    "zero_length_gt",
    "zero_length_gt_and_prediction",
)
# Their average mAP, copied here so that these cases are checked to a value even if the golden files change.
EDGE_AVERAGE = {
    "all_scores_equal": 0.2905647897456398,  # mmaction2: a stable order of equal scores
    "heavy_ties": 0.7859294284697291,  # likewise
    "duplicate_gt": 0.7633056516645136,
    "exact_threshold_decimal": 0.5023148148148149,
    "second_best_gt": 0.8885714285714286,
    "single_prediction": 1 / 60,
    "unknown_label": 0.7878694268421149,
    "videos_absent_from_gt": 0.395634564117222,
    "zero_length_and_inverted_predictions": 0.7604369885431621,
    "zero_length_gt": 0.733868976127041,
    "zero_length_gt_and_prediction": 0.8374166613632937,
    "empty_results_dict": 0.0,
}


def golden(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "golden/evaluation/eval" / f"{name}.golden.json").read_text())


def main_case(shared: Path, name: str) -> tuple[dict[str, Any], Truth, pd.DataFrame]:
    folder = shared / "golden/evaluation"
    expected = golden(shared, name)
    truth = read_truth(folder / expected["gt"]).subset(expected["subset"])
    return expected, truth, read_predictions(folder / "eval" / expected["pred"])


def edge_case(shared: Path, name: str, tmp_path: Path) -> tuple[dict[str, Any], Truth, pd.DataFrame]:
    case = json.loads((shared / "golden/evaluation/eval_edge" / f"{name}.json").read_text())
    (tmp_path / "truth.json").write_text(json.dumps(case["ground_truth"]))
    (tmp_path / "predictions.json").write_text(json.dumps(case["predictions"]))
    truth = read_truth(tmp_path / "truth.json").subset(case["subset"])
    return case, truth, read_predictions(tmp_path / "predictions.json")


def assert_same(result, expected, per_class=True):
    np.testing.assert_allclose(list(result.map.values()), expected["mAP"], rtol=0, atol=CLOSE)
    assert result.average == pytest.approx(expected["average_mAP"], abs=CLOSE)
    assert result.counts["segments"] == expected.get("n_gt", result.counts["segments"])
    if per_class and "per_class_AP" in expected:
        assert set(result.ap.columns) == set(expected["per_class_AP"])
        for label, values in expected["per_class_AP"].items():
            np.testing.assert_allclose(result.ap[label], values, rtol=0, atol=CLOSE, err_msg=label)


def assert_same_recall(result, expected):
    np.testing.assert_allclose(result.average_recall, expected["avg_recall_curve"], rtol=0, atol=CLOSE)
    assert result.auc == pytest.approx(expected["AUC"], abs=CLOSE)
    np.testing.assert_allclose(result.recall.iloc[:, -1], expected["recall_at_100_per_tiou"], rtol=0, atol=CLOSE)
    if "proposals_per_video" in expected:
        np.testing.assert_allclose(result.average_number, expected["proposals_per_video"], rtol=0, atol=CLOSE)


# ---- every file that is there ------------------------------------------------------------------------------------
def test_no_golden_file_is_forgotten(shared):
    folder = shared / "golden/evaluation"
    assert {path.stem for path in (folder / "eval_edge").glob("*.json")} == set(EDGE)
    names = {path.name.removesuffix(".golden.json") for path in (folder / "eval").glob("*.golden.json")}
    others = {"anet_full_val", "anet_official_sample", "anet_prop_s1", "mmaction2_fixture", "thumos_main_s1_vs_gtad_gt"}
    assert names == {*MAIN, *others}


def test_anet_thresholds_are_the_reference_s(shared):
    assert list(ANET_TIOU) == golden(shared, "anet_main_s1")["tiou_thresholds"]


# ---- detection ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MAIN)
def test_map_of_the_main_cases(shared, name):
    expected, truth, predictions = main_case(shared, name)
    result = detection_map(truth, predictions, expected["tiou_thresholds"])
    assert_same(result, expected["detection"]["anet_official"])
    assert result.counts["predictions"] == expected["n_pred"]
    assert result.counts["videos"] == expected["n_videos"]
    deduplicated = detection_map(truth, predictions, expected["tiou_thresholds"], dedupe_s=1e-3, drop_zero_length=True)
    assert_same(deduplicated, expected["detection"]["opentad"])
    assert_same(deduplicated, expected["detection"]["actionformer"])


@pytest.mark.parametrize("name", EDGE)
def test_map_of_the_edge_cases(shared, tmp_path, name):
    case, truth, predictions = edge_case(shared, name, tmp_path)
    result = detection_map(truth, predictions, case["tiou_thresholds"])
    # With equal scores ActivityNet's order is that of an unstable sort; mmaction2's is the order of the file.
    base = "mmaction2" if name in ("all_scores_equal", "heavy_ties") else case["detection_base"]
    assert_same(result, case["detection"][base], per_class=base == case["detection_base"])
    assert result.average == pytest.approx(EDGE_AVERAGE.get(name, result.average), abs=CLOSE)

    if "error" not in case["detection"]["opentad"] and base != "mmaction2":
        other = detection_map(truth, predictions, case["tiou_thresholds"], dedupe_s=1e-3, drop_zero_length=True)
        assert_same(other, case["detection"]["opentad"])
    if base != "mmaction2":
        nonzero = detection_map(truth, predictions, case["tiou_thresholds"], drop_zero_length=True)
        assert_same(nonzero, case["detection"]["gtad_csv"], per_class=False)
        with_segments = truth.segments["video"].unique()
        own_videos = detection_map(truth, predictions, case["tiou_thresholds"], videos=with_segments)
        assert_same(own_videos, case["detection"]["afsd"], per_class=False)


def test_map_of_the_official_sample(shared):
    expected = golden(shared, "anet_official_sample")
    truth = read_truth(shared / "golden/evaluation/gt/anet13_trainval_gt.json")
    predictions = read_predictions(shared / expected["pred"])
    result = evaluate(truth, predictions, "anet-1.3")
    assert_same(result, expected["detection_as_is"]["mmaction2"])  # every score is 1.0, so the order decides
    assert result.counts["predictions_outside"] == len(predictions) - 7293
    own = detection_map(truth.subset("val"), predictions, ANET_TIOU, videos=truth.subset("val").videos["video"])
    assert_same(own, expected["detection_predictions_restricted_to_gt_videos"]["anet_official"])


def test_map_of_the_full_validation_set(shared):
    expected = golden(shared, "anet_full_val")
    truth = read_truth(shared / "golden/evaluation" / expected["gt"])
    for name, path in (
        ("sample", shared / "data/activitynet13/sample_detection_prediction.json"),
        ("anet_main_s1", shared / "golden/evaluation/eval/anet_main_s1.pred.json.gz"),
    ):
        predictions = read_predictions(path)
        result = evaluate(truth, predictions, "anet-1.3")
        assert_same(result, expected[name]["detection"]["anet_official"])
        assert result.counts["videos"] == 4926
        assert not any("this annotation gives" in note for note in result.notes)
        if name == "anet_main_s1":
            recall = evaluate_recall(truth, predictions, "anet-1.3")
            assert_same_recall(recall, expected[name]["proposal_max_avg_100"]["anet_official"])


def test_map_against_gtad_s_annotation(shared):
    expected = golden(shared, "thumos_main_s1_vs_gtad_gt")
    truth = read_truth(shared / "data/thumos14/thumos_gt.json").subset("test")
    predictions = read_predictions(shared / "golden/evaluation/eval/thumos_main_s1.pred.json.gz")
    values = expected.get("detection", expected)
    assert_same(detection_map(truth, predictions), values["anet_official"])
    assert_same(detection_map(truth, predictions, videos=truth.videos["video"]), values["afsd"])


def test_map_of_mmaction2_s_fixture(shared):
    expected = golden(shared, "mmaction2_fixture")
    truth = read_truth(shared / expected["gt"], strip_prefix="v_")
    result = evaluate(truth, read_predictions(shared / expected["pred"]), tiou=ANET_TIOU)
    assert_same(result, expected["mmaction2"])
    assert_same(result, expected["others"]["anet_official"])


# ---- proposals ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*MAIN, "anet_prop_s1"])
def test_recall_of_the_main_cases(shared, name):
    expected = golden(shared, name)
    folder = shared / "golden/evaluation"
    truth = read_truth(folder / expected["gt"]).subset(expected["subset"])
    predictions = read_predictions(folder / "eval" / expected["pred"])
    levels = expected["tiou_thresholds"]
    reference = expected["proposal_max_avg_100"]["anet_official"]
    result = average_recall(truth, predictions, levels)
    assert_same_recall(result, reference)
    for number, value in reference["AR"].items():
        assert result.at(int(number)) == pytest.approx(value, abs=CLOSE)
        assert result.ar[int(number)] == result.at(int(number))
    opentad = average_recall(truth, predictions, levels, dedupe_s=1e-3, drop_zero_length=True)
    assert_same_recall(opentad, expected["proposal_max_avg_100"]["opentad"])
    if "proposal_max_avg_50" in expected:
        fifty = expected["proposal_max_avg_50"]
        assert_same_recall(average_recall(truth, predictions, levels, 50), fifty["anet_official"])
        options = {"points": 50, "dedupe_s": 1e-3, "drop_zero_length": True}
        assert_same_recall(average_recall(truth, predictions, levels, 50, **options), fifty["opentad"])


@pytest.mark.parametrize("name", EDGE)
def test_recall_of_the_edge_cases(shared, tmp_path, name):
    case, truth, predictions = edge_case(shared, name, tmp_path)
    expected = case["proposals_max_avg_100"]["anet_official"]
    result = average_recall(truth, predictions, case["tiou_thresholds"])
    if "error" in expected:  # a division by zero there
        assert predictions.empty
        assert result.auc == 0
        assert not result.average_recall.any()
        assert math.isfinite(result.average_number[-1])
        assert any("no video" in note for note in result.notes)
    elif name in ("all_scores_equal", "heavy_ties"):
        # Equal scores: mmaction2 and BMN sort as unstably as ActivityNet here, so only what no order changes is fixed.
        assert result.average_recall[-1] == pytest.approx(expected["avg_recall_curve"][-1], abs=CLOSE)
    else:
        assert_same_recall(result, expected)


# ---- protocols ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "file", "videos", "segments"),
    [
        ("thumos14-213", "test_Annotation.csv", 213, 3358),
        ("thumos14-213", "thumos14_test_groundtruth.csv", 213, 3358),
        ("thumos14-212", "thumos14_actionformer_format.json", 212, 3358),
        ("thumos14-212", "thumos14_test_extra_characteristics.json", 212, 3358),
        ("thumos14-212", "test_Annotation.csv", 212, 3358),
        ("thumos14-212", "test_Annotation_ours.csv", 212, 3358),
        ("thumos14-211", "test_Annotation.csv", 211, 3329),
        ("thumos14-211", "thumos14_actionformer_format.json", 211, 3329),
        ("thumos14-210", "test_Annotation.csv", 210, 3311),
        ("thumos14-210", "thumos_gt.json", 210, 3311),
    ],
)
def test_protocols_count_what_they_are_named_after(shared, name, file, videos, segments):
    truth = read_truth(shared / "data/thumos14" / file)
    predictions = read_predictions(shared / "golden/evaluation/eval/thumos_main_s1.pred.json.gz")
    result = evaluate(truth, predictions, name)
    assert (result.counts["videos"], result.counts["segments"]) == (videos, segments)
    assert (videos, segments) in PROTOCOLS[name].sizes
    assert result.protocol == name == result.to_dict()["protocol"]
    assert not any("this annotation gives" in note for note in result.notes)
    if name in ("thumos14-213", "thumos14-212"):  # nothing is predicted on the 213th video
        assert result.average == pytest.approx(0.7056865301647303, abs=CLOSE)
    if name == "thumos14-210":  # AFSD ignores predictions on videos that gtad's file does not have
        assert result.average == pytest.approx(0.7091010527173935, abs=CLOSE)
        left_out = predictions["video"].isin(["video_test_0000270", "video_test_0001496"]).sum()
        assert result.counts["predictions_left_out"] == {"left_out_videos": left_out}


def test_a_protocol_says_when_the_annotation_has_other_counts(shared):
    truth = read_truth(shared / "data/thumos14/thumos_gt.json")
    predictions = read_predictions(shared / "golden/evaluation/eval/thumos_main_s1.pred.json.gz")
    result = evaluate(truth, predictions, "thumos14-212")
    assert any("212 videos and 3358 segments; this annotation gives 210 and 3311" in note for note in result.notes)
