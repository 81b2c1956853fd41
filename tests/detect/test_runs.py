"""The run folder: written whole or not at all, read back with errors that say what to do."""

import csv
import json
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import nn

from tad.detect import runs
from tad.detect.detectors import build_detector
from tad.detect.runs import Run, differing_keys, load_into, read_state, read_weights, remove_run, run_state
from tad.errors import RecipeError, WeightsError
from tests.detect.toydetector import AXIS, toy_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, written by hand."""
    path = tmp_path / "run"
    runs.dump_recipe(path, toy_recipe(model={"width": 4}))
    runs.write_json(path / "classes.json", ["a", "Ünï", "c/d"])
    stream = {"spec": {"fps": 25}, "fingerprint": "f", "dtype": "float16", "axis": AXIS.to_dict()}
    runs.write_json(path / "features.json", {"rgb": {**stream, "channels": 5}, "flow": {**stream, "channels": 3}})
    torch.manual_seed(0)
    detector = build_detector("toy", channels={"rgb": 5, "flow": 3}, classes=3, width=4)
    runs.write_weights(path / "best.safetensors", detector.state_dict(), epoch=3)
    runs.write_json(path / "metrics.json", {})
    return path


def test_a_run_is_read_back(folder: Path) -> None:
    run = Run.load(str(folder))
    assert run.recipe == toy_recipe(model={"width": 4})
    assert run.classes == ["a", "Ünï", "c/d"]
    assert run.channels == {"rgb": 5, "flow": 3}
    assert list(run.features) == ["rgb", "flow"]
    assert run.features["flow"]["spec"] == {"fps": 25}
    assert run.finished
    detector = run.build()
    assert not detector.training
    torch.manual_seed(0)
    expected = build_detector("toy", channels={"rgb": 5, "flow": 3}, classes=3, width=4)
    for name, value in expected.state_dict().items():
        assert torch.equal(detector.state_dict()[name], value)


@pytest.mark.parametrize("name", ["recipe.yaml", "classes.json", "features.json"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RecipeError, match=f"has no {name}: is it the folder of a detector's run"):
        Run.load(folder)


def test_what_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere does not exist; 'tad train-detector"):
        Run.load(tmp_path / "nowhere")
    (folder / "classes.json").write_text('{"a": 1}')
    with pytest.raises(RecipeError, match=r"classes\.json must hold a list of names"):
        Run.load(folder)
    (folder / "classes.json").write_text('["a", ')
    with pytest.raises(RecipeError, match=r"classes\.json cannot be read"):
        Run.load(folder)


def test_streams_must_be_described(folder: Path) -> None:
    features = json.loads((folder / "features.json").read_text())
    del features["flow"]["fingerprint"]
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(RecipeError, match=r"features\.json lacks fingerprint of stream 'flow'"):
        Run.load(folder)


def test_weights_that_are_absent_damaged_or_of_another_network(folder: Path) -> None:
    run = Run.load(folder)
    with pytest.raises(WeightsError, match=r"no last\.safetensors: the file was removed"):
        run.build("last")
    (folder / "metrics.json").unlink()
    with pytest.raises(WeightsError, match=r"no last\.safetensors: no epoch was finished yet"):
        run.build("last")
    data = (folder / "best.safetensors").read_bytes()
    (folder / "best.safetensors").write_bytes(data[:-7])
    with pytest.raises(WeightsError, match=r"best\.safetensors are damaged"):
        run.build()
    state = {"hidden.weight": torch.zeros(4, 9, 3), "other": torch.zeros(1)}
    with pytest.raises(WeightsError) as error:
        load_into(build_detector("toy", channels={"rgb": 8}, classes=3, width=4), state, where="FILE")
    for part in (
        "FILE",
        "missing: hidden.bias",
        "unknown: other",
        "hidden.weight is (4, 9, 3), the network has (4, 8, 3)",
    ):
        assert part in str(error.value)


def test_weights_round_trip_whatever_their_memory_looks_like(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"shared": base, "also": base, "turned": base.T, "part": base[1:, ::2], "count": torch.tensor(7)}
    state |= {"half": base.half(), "bf16": base.bfloat16(), "flag": base > 3, "grad": nn.Parameter(base.clone())}
    runs.write_weights(tmp_path / "w.safetensors", state, epoch=1)
    back = read_weights(tmp_path / "w.safetensors")
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    runs.write_text(tmp_path / "a.txt", "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_atomic(tmp_path / "a.txt", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_state_holds_plain_types_only(tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    state = {"a": [1, 2.5, None, "x", True], "t": torch.arange(3), "nested": {"tuple": (1, (2, 3))}}
    runs.write_state(path, state)
    back = read_state(path)
    assert torch.equal(back.pop("t"), state.pop("t"))  # type: ignore[call-overload]
    assert back == state

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("pwned",))

    torch.save({"x": Evil()}, path)
    with pytest.raises(WeightsError, match=r"resume\.pt cannot be read.*overwrite"):
        read_state(path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(WeightsError, match=r"resume\.pt cannot be read"):
        read_state(path)
    torch.save([1], path)
    with pytest.raises(WeightsError, match="holds list"):
        read_state(path)


def test_csv_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    runs.write_csv(tmp_path / "m.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None, "map": 0.25}])
    with open(tmp_path / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"epoch": "1", "loss": "0.5", "map": ""}, {"epoch": "2", "loss": "", "map": "0.25"}]


def test_the_state_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert run_state(tmp_path / "absent") == "absent"
    assert run_state(folder) == "finished"
    (folder / "metrics.json").unlink()
    assert run_state(folder) == "unfinished"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".recipe.yaml.123.tmp").write_text("half")  # a writer was killed here
    assert run_state(empty) == "empty"
    (empty / "holiday.jpg").write_text("")
    assert run_state(empty) == "foreign"
    assert run_state(empty / "holiday.jpg") == "foreign"


def test_only_a_runs_own_files_are_removed(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".best.safetensors.9.tmp").write_text("half")
    (folder / "raw").mkdir()
    (folder / "raw" / "test.npz").write_bytes(b"")
    (folder / "raw" / "mine.txt").write_bytes(b"")
    remove_run(folder)
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert left == ["notes.txt", "raw/mine.txt"]


@pytest.mark.parametrize(
    ("resume", "overwrite", "finished", "message"),
    [
        (False, False, True, "holds a finished run; overwrite it, or choose another"),
        (False, False, False, "holds an unfinished run; resume it, overwrite it, or"),
        (True, True, False, "exclude each other"),
        (True, False, True, None),
        (False, True, False, None),
    ],
)
def test_a_folder_that_is_taken(
    folder: Path, resume: bool, overwrite: bool, finished: bool, message: str | None
) -> None:
    if not finished:
        (folder / "metrics.json").unlink()
    if message is None:
        runs.require_free(folder, resume=resume, overwrite=overwrite)
    else:
        with pytest.raises(RecipeError, match=message):
            runs.require_free(folder, resume=resume, overwrite=overwrite)


def test_a_foreign_folder_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="not the folder of a run"):
            runs.require_free(tmp_path, resume=False, overwrite=overwrite)


def test_differences_are_named_by_their_dotted_keys() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 0}}, "new": {"x": 1}}
    assert differing_keys(old, new) == [
        ("b.c", [1, 2], [1, 3]),
        ("b.d.e", None, 0),
        ("gone", 3, None),
        ("new", None, {"x": 1}),
    ]
    assert differing_keys(old, old) == []


def test_environment_names_versions_device_and_command() -> None:
    env = runs.environment(device=torch.device("cpu"), seed=4, world=1)
    assert env["torch"] == torch.__version__
    assert env["numpy"] == np.__version__
    assert env["seed"] == 4
    assert env["device_type"] == "cpu"
    assert env["command"]
    json.dumps(env)
