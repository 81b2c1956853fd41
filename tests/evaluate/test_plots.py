"""Figures: what is drawn is what was computed; names are text; without matplotlib the error says what to install."""

import importlib.util
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from tad.annotations import Truth, write_predictions
from tad.cli import main
from tad.errors import AnnotationError, TadError
from tad.evaluate import average_recall, detection_map, diagnose, plots, pr_curves
from tad.evaluate.report import score_report

pytest.importorskip("matplotlib")

TRUTH = pd.DataFrame(
    [("a", 0.0, 10.0, "run"), ("a", 20.0, 30.0, "$x$"), ("b", 5.0, 6.0, "run"), ("a", 12.0, 13.0, "run")],
    columns=["video", "start_s", "end_s", "label"],
)
FOUND = pd.DataFrame(
    [
        ("a", 0.0, 9.0, "run", 0.9),
        ("a", 0.0, 10.0, "run", 0.5),
        ("b", 5.0, 6.5, "run", 0.8),
        ("a", 0.0, 1.0, "$x$", 0.7),
        ("a", 40.0, 41.0, "_odd $", 0.1),
    ],
    columns=["video", "start_s", "end_s", "label", "score"],
)


def test_map_and_its_intervals():
    figure = plots.plot_map({0.5: 0.25, 0.3: 0.5}, {0.3: (0.4, 0.6)})
    curve, bar = figure.axes[0].lines
    assert list(curve.get_xdata()) == [0.3, 0.5]
    assert list(curve.get_ydata()) == [50.0, 25.0]
    assert list(bar.get_ydata()) == [40.0, 60.0]


def test_pr_curves_and_their_mean():
    curves = {"x": (np.array([0.0, 0.5]), np.array([1.0, 0.8])), "$y$": (np.array([0.0, 1.0]), np.array([0.4, 0.2]))}
    figure = plots.plot_pr(curves, tiou=0.3)
    first, second, mean = figure.axes[0].lines
    assert list(first.get_xdata()) == [0, 50]
    assert list(second.get_ydata()) == pytest.approx([40, 20])
    values = dict(zip(np.round(mean.get_xdata()).astype(int), mean.get_ydata(), strict=True))
    assert values[0] == pytest.approx(70)
    assert values[50] == pytest.approx(50)  # 0.8 is reached at 0.5, and 0.2 further on
    assert values[51] == pytest.approx(10)
    assert values[100] == pytest.approx(10)
    assert "0.3" in figure.axes[0].get_title()


def test_the_mean_curve_has_the_area_of_the_map():
    """Interpolated precision: the area under the mean of the envelopes is mAP, but for the grid's width."""
    random = np.random.default_rng(0)
    truth = pd.DataFrame({"video": "v", "start_s": np.arange(400) * 10.0}).assign(label=np.repeat(["x", "y"], 200))
    truth["end_s"] = truth["start_s"] + 5
    found = truth.iloc[random.integers(0, 400, 900)].assign(score=random.random(900))
    mean = plots.plot_pr(pr_curves(truth, found, 0.5)).axes[0].lines[-1]
    area = np.mean(mean.get_ydata()[1:]) / 100
    assert area == pytest.approx(detection_map(truth, found, 0.5).average, abs=0.01)


def test_many_classes_are_not_named():
    curves = {f"class {k}": (np.array([0.0, 1.0]), np.array([1.0, 0.5])) for k in range(30)}
    (legend,) = [plots.plot_pr(curves).axes[0].get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["mean over classes"]
    assert plots.plot_pr({}).axes[0].get_legend() is None


def test_recall():
    result = average_recall(TRUTH, FOUND)
    axes = plots.plot_recall(result).axes[0]
    assert np.allclose(axes.lines[0].get_ydata(), 100 * result.average_recall)
    assert f"{100 * result.auc:.2f}" in axes.get_title()


def test_errors_are_stacked_to_all():
    analysis = diagnose(TRUTH, FOUND, tiou=0.5).to_dict()
    left, right = plots.plot_errors(analysis).axes
    rows = analysis["false_positives"]["by_limit"]
    heights = np.array([[bar.get_height() for bar in container] for container in left.containers])
    assert heights.shape == (6, len(rows))
    assert heights[0] == pytest.approx([100 * row["true_positive"] for row in rows])
    tops = [bar.get_y() + bar.get_height() for bar in left.containers[-1]]
    assert tops == pytest.approx([100.0 if row["count"] else 0.0 for row in rows])
    gains = {
        label.get_text(): bar.get_width() for label, bar in zip(right.get_yticklabels(), right.patches, strict=True)
    }
    expected = analysis["false_positives"]["gain"]
    assert gains == pytest.approx({kind.replace("_", " "): 100 * value for kind, value in expected.items()})


def test_characteristics_with_an_empty_bucket():
    rows = [
        {"bucket": "S", "ap": 0.5, "share": 0.25, "count": 4},
        {"bucket": "L", "ap": None, "share": None, "count": 0},
    ]
    analysis = {"sensitivity": {"overall": 0.4, "length": rows, "coverage": rows}, "false_negatives": {"length": rows}}
    for figure, name, value in (
        (plots.plot_sensitivity(analysis), "length", 50.0),
        (plots.plot_missed(analysis), "length", 25.0),
    ):
        axes = figure.axes[0]
        assert axes.get_title() == name
        assert [bar.get_height() for bar in axes.containers[0]] == [value, 0.0]
        assert [text.get_text() for text in axes.texts] == [f"{value:.0f}", "–"]
    assert plots.plot_sensitivity(analysis).axes[0].lines[0].get_ydata()[0] == 40.0
    assert not plots.plot_missed(analysis).axes[0].lines


def test_confusion_is_shaded_by_rows():
    figure = plots.plot_confusion({"confusion": {"classes": ["a", "b"], "matrix": [[3, 1], [0, 0]]}})
    axes = figure.axes[0]
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert [text.get_text() for text in axes.texts] == ["3", "1"]
    assert axes.get_ylabel() == "true"


def test_training_out_of_text_with_gaps():
    rows = [
        {"epoch": str(e), "loss": str(1 / e), "lr": "0.1", "map_0.5": "" if e % 2 else str(e / 10)}
        for e in (1, 2, 3, 4)
    ]
    left, right = plots.plot_training(rows).axes
    assert [line.get_label() for line in left.lines] == ["loss"]
    assert list(right.lines[0].get_xdata()) == [2, 4]
    assert list(right.lines[0].get_ydata()) == pytest.approx([20, 40])
    with pytest.raises(TadError, match="no finished epoch"):
        plots.plot_training([])


def colours(figure):
    """(start, end, class row, colour, filled) of every box."""
    from matplotlib.colors import to_hex

    return {
        (box.get_x(), box.get_x() + box.get_width(), round(box.get_y()), to_hex(box.get_edgecolor()), box.get_fill())
        for box in figure.axes[0].patches
    }


def test_a_timeline_by_hand():
    videos = pd.DataFrame({"video": ["a", "b", "e"], "subset": "", "duration_s": [50.0, 9.0, 7.0], "fps": 25.0})
    figure = plots.plot_timeline(Truth(videos, TRUTH), FOUND, "a")
    boxes = figure.axes[0].patches
    assert len(boxes) == 7
    assert figure.axes[0].get_xlim() == (0, 50)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["run", r"\$x\$", r"odd \$"]
    drawn = {(start, end, row): (colour, filled) for start, end, row, colour, filled in colours(figure)}
    assert drawn[0.0, 9.0, 0][0] == plots.BLUE  # the surer of the two takes the segment
    assert drawn[12.0, 13.0, 0] == (plots.VERMILION, False)  # missed
    assert drawn[0.0, 1.0, 1] == (plots.ORANGE, False)
    assert drawn[40.0, 41.0, 2][0] == plots.ORANGE
    assert len(plots.plot_timeline(TRUTH, FOUND, "a", min_score=0.6).axes[0].patches) == 5
    assert len(plots.plot_timeline(Truth(videos, TRUTH), FOUND, "e").axes[0].patches) == 0
    alone = plots.plot_timeline(None, FOUND, "a")
    assert {colour for _, _, _, colour, _ in colours(alone)} == {plots.BLUE}
    with pytest.raises(AnnotationError, match="of video 'q'"):
        plots.plot_timeline(TRUTH, FOUND, "q")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_files_are_whole_and_equal(tmp_path, suffix):
    paths = [
        plots.save(plots.plot_timeline(TRUTH, FOUND, "a"), tmp_path / "deep" / f"{k}{suffix}", dpi=50) for k in (0, 1)
    ]
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        assert b">$x$<" in first  # a name, not mathematics
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [f"0{suffix}", f"1{suffix}"]


def test_other_files_are_refused(tmp_path):
    figure = plots.plot_map({0.5: 0.5})
    with pytest.raises(TadError, match=r"\.png, \.svg, \.pdf"):
        plots.save(figure, tmp_path / "figure.jpg")
    (tmp_path / "file").touch()
    with pytest.raises(TadError, match="cannot be written"):
        plots.save(figure, tmp_path / "file" / "figure.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    with pytest.raises(TadError, match=r"tad-pipeline\[report\]"):
        plots.plot_map({0.5: 0.5})
    done = CliRunner().invoke(main, ["plot", "map", "-o", str(tmp_path / "x.png")])
    assert done.exit_code == 1
    assert "tad-pipeline[report]" in done.stderr


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys; from tad.evaluate import plots; import tad.evaluate.report\n"
        "assert 'matplotlib' not in sys.modules and 'cv2' not in sys.modules\n"
        "plots.plot_map({0.5: 0.5}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the command ---------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, monkeypatch):
    TRUTH.rename(columns={"start_s": "start", "end_s": "end"}).to_csv(tmp_path / "truth.csv", index=False)
    write_predictions(tmp_path / "found.csv", FOUND)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch,loss,average_map\n1,2.0,\n2,1.0,0.5\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = ["--annotations", "truth.csv", "--predictions", "found.csv"]


@pytest.mark.parametrize("kind", [*plots.PLOTS, "timeline", "training"])
def test_every_kind_is_drawn(folder, kind):
    arguments = {"timeline": [*FILES, "--video", "a"], "training": ["--run", "run"]}.get(kind, FILES)
    done = CliRunner().invoke(main, ["plot", kind, *arguments, "-o", f"{kind}.svg"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{kind}.svg\n"
    assert (folder / f"{kind}.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pr"], 2, "needs --predictions FILE and --annotations FILE"),
        (["pr", "--predictions", "found.csv"], 2, "--annotations"),
        (["timeline", *FILES], 2, "--video ID"),
        (["timeline", *FILES, "--video", "aa"], 1, "Did you mean 'a'"),
        (["training"], 2, "--run RUN"),
        (["training", "--run", "."], 1, "no finished epoch"),
        (["map", *FILES, "-o", "x.jpg"], 1, ".png"),
    ],
)
def test_wrong_use_is_told(folder, arguments, status, words):
    output = [] if "-o" in arguments else ["-o", "x.png"]
    done = CliRunner().invoke(main, ["plot", *arguments, *output])
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert not list(folder.glob("x.*"))


def test_the_command_draws_the_numbers_of_the_report(folder):
    from tad.annotations import read_predictions, read_truth

    given = score_report(read_truth("truth.csv"), read_predictions("found.csv"))
    axes = plots.PLOTS["map"](given).axes[0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([100 * value for value in given["metrics"]["map"].values()])
