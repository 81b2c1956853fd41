"""``tad evaluate``, ``diagnose`` and ``compare`` as a user runs them."""

import json

import pandas as pd
import pytest
from click.testing import CliRunner

from tad.annotations import read_predictions, read_truth, write_predictions
from tad.cli import main
from tad.evaluate import bootstrap_map, compare, diagnose, evaluate, evaluate_recall

COLUMNS = ["video", "start_s", "end_s", "label", "score"]


def tad(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path):
    database = {
        "a/1": {
            "subset": "validation",
            "duration": 40.0,
            "annotations": [
                {"segment": [0, 10], "label": "run", "context-size": 2},
                {"segment": [20, 30], "label": "jump", "context-size": 0},
            ],
        },
        "é": {"subset": "validation", "duration": 100.0, "annotations": [{"segment": [5, 15], "label": "run"}]},
        "c": {"subset": "training", "duration": 100.0, "annotations": [{"segment": [5, 15], "label": "run"}]},
    }
    (tmp_path / "A.json").write_text(json.dumps({"database": database}))
    rows = [
        ("a/1", 0, 9, "run", 0.9),
        ("a/1", 20, 30, "run", 0.8),
        ("é", 5, 15, "run", 0.7),
        ("é", 50, 60, "jump", 0.6),
    ]
    write_predictions(tmp_path / "one.json", pd.DataFrame(rows, columns=COLUMNS))
    better = [*rows[:3], ("a/1", 20, 29, "jump", 0.65)]
    (tmp_path / "run").mkdir()
    write_predictions(tmp_path / "run/predictions.json", pd.DataFrame(better, columns=COLUMNS))
    write_predictions(tmp_path / "proposals.csv", pd.DataFrame(rows, columns=COLUMNS).drop(columns="label"))
    scores = {"classes": ["jump", "run"], "results": {"a/1": [0.6, 0.4], "é": [0.9, 0.1], "c": [1, 0]}}
    (tmp_path / "scores.json").write_text(json.dumps({"version": "tad-video-scores-1", **scores}))
    return tmp_path


def test_intervals_are_those_of_the_function(folder):
    arguments = ["evaluate", "--annotations", folder / "A.json", "--subset", "validation"]
    arguments += ["--predictions", folder / "one.json", "--bootstrap", 50, "--seed", 3]
    shown = json.loads(tad(*arguments, "--json").stdout)
    truth, predictions = read_truth(folder / "A.json"), read_predictions(folder / "one.json")
    expected = bootstrap_map(truth.subset("validation"), predictions, samples=50, seed=3)
    assert shown["intervals"] == expected.to_dict()
    assert shown["average_map"] == evaluate(truth, predictions, subset="validation").average
    text = tad(*arguments)
    assert text.exit_code == 0, text.output
    assert "50 samples of the videos" in text.stdout


def test_predictions_without_labels_are_proposals_and_others_when_asked(folder):
    arguments = ["evaluate", "--annotations", folder / "A.json", "--subset", "validation", "--json"]
    bare = json.loads(tad(*arguments, "--predictions", folder / "proposals.csv", "--max-avg", 2).stdout)
    asked = json.loads(tad(*arguments, "--predictions", folder / "one.json", "--proposals", "--max-avg", 2).stdout)
    assert bare == asked
    truth, predictions = read_truth(folder / "A.json"), read_predictions(folder / "proposals.csv")
    assert bare == evaluate_recall(truth, predictions, subset="validation", max_avg=2).to_dict()
    assert len(bare["curve"]["average_recall"]) == 100
    text = tad(*arguments[:-1], "--predictions", folder / "proposals.csv")
    assert "AUC" in text.stdout
    refused = tad(*arguments, "--predictions", folder / "proposals.csv", "--bootstrap", 10)
    assert refused.exit_code == 2
    assert "without labels" in refused.stderr


def test_classification(folder):
    arguments = ["evaluate", "--annotations", folder / "A.json", "--subset", "validation"]
    arguments += ["--classification", folder / "scores.json"]
    shown = tad(*arguments, "-o", folder / "new/metrics.json", "--json")
    data = json.loads(shown.stdout)
    assert data["top"] == {"1": 0.5, "5": 1.0}
    assert data["ap"] == pytest.approx({"jump": 1 / 2, "run": 1.0})
    assert json.loads((folder / "new/metrics.json").read_text()) == data
    assert data["counts"]["scores_left_out"] == 1  # a video of the training subset
    assert "top-5" in tad(*arguments).stdout


@pytest.mark.parametrize(
    "options",
    [[], ["--run", "."], ["--predictions", "one.json", "--classification", "scores.json"], ["--store", "s"]],
)
def test_one_thing_is_scored_at_a_time(folder, options):
    options = [folder / option if option.endswith((".json", ".")) else option for option in options]
    refused = tad("evaluate", "--annotations", folder / "A.json", *options)
    assert refused.exit_code == 2
    assert "give one of --predictions FILE" in refused.stderr


@pytest.mark.parametrize(
    "option", [["--bootstrap", 5], ["--bootstrap", 0], ["--tiou", 0.5], ["--proposals"], ["--max-avg", 100]]
)
def test_a_classifier_has_no_options_of_detections(folder, option):
    arguments = ["evaluate", "--annotations", folder / "A.json", "--subset", "validation"]
    refused = tad(*arguments, "--classification", folder / "scores.json", *option)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{option[0]}: of detections or proposals" in refused.stderr


def test_no_option_is_passed_over_in_silence(folder):
    arguments = ["evaluate", "--annotations", folder / "A.json", "--subset", "validation"]
    arguments += ["--predictions", folder / "one.json"]
    for option, words in ((["--max-avg", 10], "--proposals"), (["--proposals", "--bootstrap", 5], "--bootstrap")):
        refused = tad(*arguments, *option)
        assert refused.exit_code == 2
        assert words in refused.stderr
    for command in ("evaluate", "diagnose", "compare"):  # as with two subsets and neither, in the test below
        assert "else the only one]" in " ".join(tad(command, "--help").stdout.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--protocol", "hcas"], "unknown protocol 'hcas'"),
        (["--subset", "fold"], "no subset 'fold'"),
        ([], "has the subsets training, validation: name one"),
        (["--subset", "val", "--bootstrap", 0], "samples must be a whole number of at least 1, got 0"),
        (["--subset", "val", "--bootstrap", 5, "--seed", -1], "seed must be"),
        (["--subset", "val", "--bootstrap", 5, "--proposals"], "--bootstrap gives intervals of mAP"),
        (["--subset", "val", "--proposals", "--max-avg", -1], "max_avg and points must be positive"),
        (["--subset", "val", "--max-avg", 5], "ask for AR@AN with --proposals"),
        (["--subset", "val", "--tiou", "0.5,1.5"], "tIoU thresholds must lie in (0, 1]"),
        (["--subset", "testing"], "the truth has no segment to score"),
    ],
)
def test_what_scoring_refuses_is_refused_before_detection(folder, options, words):
    content = json.loads((folder / "A.json").read_text())
    if "testing" in options:
        content["database"]["d"] = {"subset": "testing", "duration": 9.0, "annotations": []}
    (folder / "B.json").write_text(json.dumps(content))
    run = ["--run", folder, "--store", folder / "absent"]  # loading it is the first step of detection, and would fail
    refused = tad("evaluate", "--annotations", folder / "B.json", *run, *options)
    assert refused.exit_code in (1, 2)
    assert words in refused.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of training and validation videos, their truth, and runs with and without classes of their own."""
    import torch

    from tad.annotations import write_video_scores
    from tad.detect import train_detector
    from tests.detect.toydetector import CLASSES, make_world, toy_recipe

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    store, annotations = make_world(folder, training=6, testing=3, rows=(40, 50))
    segments = read_truth(annotations).segments
    counts = pd.crosstab(segments["video"], segments["label"]).reindex(columns=list(CLASSES), fill_value=0)
    write_video_scores(folder / "scores.json", counts.div(counts.sum(axis=1), axis=0).clip(lower=1e-3))
    short = {"store": store, "annotations": annotations, "device": "cpu"}
    steps = {"train": {"epochs": 2, "select": "last"}, "data": {"holdout": 0}}
    train_detector(toy_recipe(**steps), out=folder / "toy", **short)
    agnostic = {"detector": "toy-proposals", "classes": {"scores": str(folder / "scores.json")}}
    train_detector(toy_recipe(**agnostic, **steps), out=folder / "toy-proposals", **short)
    return folder, store, json.loads(annotations.read_text())["database"]


def of_run(world, run, database, *options, ids=True):
    """Exit status and JSON of ``tad evaluate --run`` on a truth of these videos."""
    folder, store, _ = world
    file = folder / "truth.json"
    file.write_text(json.dumps({"database": database} if ids else database))
    done = tad("evaluate", "--annotations", file, "--run", folder / run, "--store", store, "--json", *options)
    assert done.exit_code in (0, 3), done.output
    return done, json.loads(done.stdout)


@pytest.mark.parametrize("run", ["toy", "toy-proposals"])
def test_the_score_of_a_run_does_not_depend_on_what_else_is_stored(world, run):
    folder, store, database = world
    one = {video: entry for video, entry in database.items() if entry["subset"] == "validation"}
    bare = {video: {key: entry[key] for key in ("duration", "annotations")} for video, entry in one.items()}
    from tad.detect import detect

    done, whole = of_run(world, run, database, "--subset", "validation")
    assert done.exit_code == 0
    assert whole["average_map"] > 0
    assert whole["counts"]["predictions_outside"] == 0
    for again in (of_run(world, run, one), of_run(world, run, bare, ids=False)):
        assert again[0].exit_code == 0
        assert again[1] == whole
    found = detect(run=folder / run, store=store, videos=list(one))
    write_predictions(folder / "found.json", found)
    given = ["evaluate", "--annotations", folder / "truth.json", "--predictions", folder / "found.json", "--json"]
    whole.pop("without_classes", None)
    assert json.loads(tad(*given).stdout) == whole
    # a protocol's subset is not needed where the truth has none, and its tIoU thresholds count
    _, hacs = of_run(world, run, bare, "--protocol", "hacs", ids=False)
    hacs.pop("without_classes", None)
    assert hacs == json.loads(tad(*given, "--protocol", "hacs").stdout)
    _, recall = of_run(world, run, bare, "--proposals", "--max-avg", 5, ids=False)
    assert recall["counts"]["videos"] == 3
    assert recall["counts"]["predictions_outside"] == 0


def test_videos_that_fail_are_noted_and_exit_with_three(world):
    _, _, database = world
    one = {video: entry for video, entry in database.items() if entry["subset"] == "validation"}
    gone = {"subset": "validation", "duration": 9.0, "annotations": [{"segment": [1, 5], "label": "run"}]}
    _, whole = of_run(world, "toy", one)
    done, data = of_run(world, "toy", {**one, "gone/ü": gone}, "-o", world[0] / "metrics.json")
    assert done.exit_code == 3
    assert data["average_map"] < whole["average_map"]
    assert [note for note in data["notes"] if "gone/ü: no features in rgb, flow" in note]
    assert "failed: gone/ü: no features" in done.stderr
    assert json.loads((world[0] / "metrics.json").read_text()) == data
    # what a protocol leaves out is not searched, so it cannot fail
    done, _ = of_run(world, "toy", {**one, "S8GtH2Zayds": gone}, "--protocol", "hacs")
    assert done.exit_code == 0


def test_diagnose_says_what_to_do_and_writes_what_the_function_gives(folder):
    arguments = ["diagnose", "--annotations", folder / "A.json", "--subset", "validation"]
    arguments += ["--predictions", folder / "one.json"]
    text = tad(*arguments, "-o", folder / "diagnosis.json")
    assert text.exit_code == 0, text.output
    assert "1. removing predictions with a wrong label would gain" in text.stdout
    assert "context-size" in text.stdout
    data = json.loads((folder / "diagnosis.json").read_text())
    assert json.loads(tad(*arguments, "--json").stdout) == data
    truth = read_truth(folder / "A.json").subset("validation")
    expected = diagnose(truth, read_predictions(folder / "one.json")).to_dict()
    assert data["false_positives"] == expected["false_positives"]
    assert [row["bucket"] for row in data["sensitivity"]["coverage"]] == ["XS", "S"]
    assert [row["bucket"] for row in data["sensitivity"]["context-size"]] == ["0", "2"]


def test_diagnose_takes_the_buckets_of_a_protocol(folder):
    arguments = ["diagnose", "--annotations", folder / "A.json", "--predictions", folder / "one.json", "--json"]
    plain = json.loads(tad(*arguments, "--protocol", "anet-1.3").stdout)
    assert [row["bucket"] for row in plain["sensitivity"]["length"]] == ["XS"]
    thumos = json.loads(tad(*arguments, "--protocol", "thumos14-213", "--subset", "validation").stdout)
    assert [row["bucket"] for row in thumos["sensitivity"]["length"]] == ["M"]
    assert thumos["protocol"] == "thumos14-213"


def test_compare_takes_files_and_runs(folder):
    arguments = ["compare", folder / "one.json", folder / "run", "--annotations", folder / "A.json"]
    arguments += ["--subset", "validation", "--samples", 40]
    data = json.loads(tad(*arguments, "--json").stdout)
    truth = read_truth(folder / "A.json").subset("validation")
    tables = {name: read_predictions(folder / name) for name in ("one.json", "run/predictions.json")}
    expected = compare(truth, dict(zip(("one", "run"), tables.values(), strict=True)), samples=40).to_dict()
    assert data == {**expected, "protocol": None}
    assert data["others"][0]["difference"] > 0
    text = tad(*arguments)
    assert text.exit_code == 0, text.output
    assert "classes that differ most" in text.stdout


def test_compare_seeds(folder):
    arguments = ["compare", folder / "one.json", folder / "run", "--seeds", "--annotations", folder / "A.json"]
    data = json.loads(tad(*arguments, "--subset", "validation", "--json").stdout)
    one, run = (data["runs"][name]["average"] for name in ("one", "run"))
    assert data["mean"]["average"] == pytest.approx((one + run) / 2)
    assert data["sd"]["average"] == pytest.approx(abs(one - run) / 2**0.5)
    assert "mean ± sd" in tad(*arguments, "--subset", "validation").stdout


def test_compare_refuses_what_cannot_be_compared(folder):
    arguments = ["--annotations", folder / "A.json", "--subset", "validation"]
    assert tad("compare", folder / "one.json", *arguments).exit_code == 2
    twice = tad("compare", folder / "one.json", folder / "one.json", *arguments)
    assert twice.exit_code == 1
    assert "is given twice" in twice.stderr
    (folder / "empty").mkdir()
    nothing = tad("compare", folder / "one.json", folder / "empty", *arguments)
    assert nothing.exit_code == 1
    assert "holds no predictions.json; write it: tad detect" in nothing.stderr
