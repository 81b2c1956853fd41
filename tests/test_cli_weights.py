"""``tad weights`` as scripts and people see it, and the names of published weights in ``tad extract``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tad.cli import main
from tad.extract import build_backbone
from tad.extract.backbones import BACKBONES
from tad.extract.published import PUBLISHED, Published
from tad.extract.weights import sha256_of
from tad.synth import make_video


def tad(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``tiny_noise`` in the list, not yet here, and ``tiny_gone`` whose address is dead; the file of the first."""
    monkeypatch.setenv("TAD_WEIGHTS", str(tmp_path / "cache"))
    file = tmp_path / "server" / "tiny.pth"
    file.parent.mkdir()
    torch.save(build_backbone("tiny", "random:3").state_dict(), file)
    for name, url in (("tiny_noise", file.as_uri()), ("tiny_gone", file.with_name("gone.pth").as_uri())):
        entry = Published(
            "tiny", "tests", "noise", "CC-BY-NC-4.0", "tiny.pth", (url,), 51.5, True, {"stride": 2}, "loud"
        )
        monkeypatch.setitem(PUBLISHED, name, entry)
    return file


def test_ls_lists_all_or_those_of_one_backbone_and_says_which_are_here(tiny: Path) -> None:
    rows = json.loads(tad("weights", "ls", "--json").stdout)
    assert [row["name"] for row in rows] == list(PUBLISHED)
    assert all(row["file"] is None for row in rows)
    assert tad("weights", "fetch", "tiny_noise").exit_code == 0
    rows = json.loads(tad("weights", "ls", "--backbone", "tiny", "--json").stdout)
    assert [(row["name"], row["file"] is not None, row["noncommercial"]) for row in rows] == [
        ("tiny_noise", True, True),
        ("tiny_gone", False, True),
    ]
    shown = tad("weights", "ls", "--backbone", "tiny")
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["name", "backbone", "data", "top-1", "licence", "here"]
    assert lines[1].split() == ["tiny_noise", "tiny", "noise", "51.50", "CC-BY-NC-4.0", "yes"]
    assert lines[2].split() == ["tiny_gone", "tiny", "noise", "51.50", "CC-BY-NC-4.0"]
    assert shown.stderr == "not for commercial use: tiny_noise, tiny_gone\n"
    refused = tad("weights", "ls", "--backbone", "tinny")
    assert refused.exit_code == 1
    assert "Did you mean 'tiny'" in refused.stderr
    assert "by hand" in tad("weights", "ls", "--backbone", "vivit-b-fe").stdout


def test_show_says_everything_with_the_preprocessing_that_applies(tiny: Path, tmp_path: Path) -> None:
    shown = tad("weights", "show", "tiny_noise").stdout
    for words in ("tiny, tests", "noise", "51.50 %", "CC-BY-NC-4.0 - NOT FOR COMMERCIAL USE", tiny.as_uri(), "loud",
                  f"{tmp_path / 'cache/tiny_noise/tiny.pth'} (not here yet)", "32x32", "0.5 0.5 0.5"):  # fmt: skip
        assert words in shown
    assert [line.split() for line in shown.splitlines() if "stride" in line] == [
        ["stride", "2", "(of", "this", "file)"]
    ]
    found = json.loads(tad("weights", "show", "mm_ircsn_152_kinetics400", "--json").stdout)
    assert found["preprocessing"]["mean"] == [110.2008, 100.63983, 95.99475]
    assert found["hash_prefix"] == "5c933ae1"
    assert not found["here"]
    missing = tad("weights", "show", "tiny_nois")
    assert missing.exit_code == 1
    assert "Did you mean 'tiny_noise'" in missing.stderr


def test_every_entry_can_be_shown() -> None:
    for name in PUBLISHED:
        shown = tad("weights", "show", name)
        assert shown.exit_code == 0, shown.output
        assert PUBLISHED[name].licence in shown.stdout


def test_fetch_goes_on_after_a_failure_and_exits_with_three(tiny: Path, tmp_path: Path) -> None:
    done = tad("weights", "fetch", "tiny_gone", "tiny_noise", "no_such_name", tiny.as_uri(), "--json")
    assert done.exit_code == 3
    report = json.loads(done.stdout)
    assert report["files"].keys() == {"tiny_noise", tiny.as_uri()}
    assert report["failures"].keys() == {"tiny_gone", "no_such_name"}
    assert "tiny_noise: licence CC-BY-NC-4.0, NOT FOR COMMERCIAL USE" in done.stderr
    assert "--from FILE" in done.stderr
    again = tad("weights", "fetch", "tiny_noise", "--dir", tmp_path / "other")
    assert again.exit_code == 0
    assert again.stdout == f"tiny_noise: {tmp_path / 'other/tiny_noise/tiny.pth'}\n"
    assert "licence" not in tad("weights", "fetch", "tiny_noise").stderr  # it is here already


def test_fetch_from_a_file_that_was_got_by_hand(tiny: Path) -> None:
    done = tad("weights", "fetch", "tiny_gone", "--from", tiny)
    assert done.exit_code == 0, done.stderr
    assert sha256_of(done.stdout.strip().removeprefix("tiny_gone: ")) == sha256_of(tiny)
    assert tad("weights", "fetch", "tiny_gone", "tiny_noise", "--from", tiny).exit_code == 2
    assert tad("weights", "fetch", "tiny_gone", "--from", tiny.with_name("gone.pth")).exit_code == 3


def test_check_reads_names_and_files(tiny: Path, tmp_path: Path) -> None:
    assert "tad weights fetch NAME" in tad("weights", "check").stdout
    assert tad("weights", "check", "tiny_noise").exit_code == 1
    tad("weights", "fetch", "tiny_noise")
    (report,) = json.loads(tad("weights", "check", "--json").stdout)
    parameters = sum(p.numel() for p in build_backbone("tiny", tiny).parameters())
    assert report["problem"] is None
    assert (report["backbone"], report["family"], report["parameters"]) == ("tiny", "tad Tiny3D", parameters)
    assert report["sha256"] == sha256_of(tiny)
    assert report["preprocessing"]["stride"] == 2
    (plain,) = json.loads(tad("weights", "check", tiny, "--json").stdout)
    assert plain["preprocessing"]["stride"] == 4
    assert "tiny_noise=FILE" in plain["hint"]
    text = tad("weights", "check", tiny)
    assert text.exit_code == 0
    assert text.stdout.startswith(f"{tiny}: fine\n")
    assert f"parameters {parameters:,} in " in text.stdout


def test_check_finds_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    state = dict(torch.load(tiny, weights_only=True))
    state.pop(next(key for key in state if key.startswith("s4")))
    torch.save(state, tmp_path / "less.pth")
    (tmp_path / "none.pth").write_bytes(b"no checkpoint")
    done = tad("weights", "check", tiny, tmp_path / "less.pth", tmp_path / "none.pth", tmp_path / "gone.pth", "--json")
    assert done.exit_code == 1
    fine, *wrong = json.loads(done.stdout)
    assert fine["problem"] is None
    for report, words in zip(wrong, ("tensors missing|cannot be told", "no checkpoint", "cannot be read"), strict=True):
        assert any(word in report["problem"] for word in words.split("|")), report
    tad("weights", "fetch", "tiny_noise")
    kept = tmp_path / "cache/tiny_noise/tiny.pth"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    flipped = tad("weights", "check")
    assert flipped.exit_code == 1
    assert "tiny_noise: PROBLEM" in flipped.stdout
    assert "another file than at its first use" in flipped.stdout


def test_extract_takes_a_name(tiny: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "v.mp4", duration_s=2.0, seed=0, size=(48, 64), fps=12.5)
    args = ["extract", tmp_path / "v.mp4", "--store", tmp_path / "s", "--backbone", "tiny"]
    done = tad(*args, "--weights", "tiny_noise")
    assert done.exit_code == 0, done.stderr
    assert "NOT FOR COMMERCIAL USE" in done.stderr
    info = json.loads(tad("store", "info", tmp_path / "s").stdout)["streams"]["tiny"]
    assert info["weights_source"] == "tiny_noise"
    assert info["spec"]["weights"] == f"sha256:{sha256_of(tiny)}"
    assert info["spec"]["stride"] == 2
    refused = tad(*args)
    assert refused.exit_code == 1
    assert "--weights tiny_noise or tiny_gone" in refused.stderr


def test_no_network_has_weights_that_its_own_error_does_not_name() -> None:
    for backbone in BACKBONES:
        refused = tad("extract", __file__, "--store", "nowhere", "--backbone", backbone)
        assert refused.exit_code == 1
        for name, entry in PUBLISHED.items():
            assert (entry.backbone == backbone) == (name in refused.stderr.replace(",", " ").split())
