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
