import io
import re

import pytest

from tad.progress import duration_text, progress, silent


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_most_once_an_interval_and_say_rate_and_rest() -> None:
    out, clock = io.StringIO(), Clock()
    with progress(100, "detect", "videos", interval_s=30, stream=out, clock=clock) as bar:
        for _ in range(80):
            clock.now += 1
            bar.advance(1, "news")
        assert out.getvalue().splitlines() == [
            "detect: 30/100 videos, 1 videos/s, 1m10s left, news",
            "detect: 60/100 videos, 1 videos/s, 40s left, news",
        ]
        clock.now += 1
        bar.advance(20)
    assert out.getvalue().splitlines()[-1] == "detect: 100/100 videos, 1.23 videos/s, took 1m21s, news"
    assert len(out.getvalue().splitlines()) == 3


def test_seconds_of_video_and_a_total_that_lied() -> None:
    out, clock = io.StringIO(), Clock()
    with progress(10.0, "extract", "s of video", interval_s=1, stream=out, clock=clock) as bar:
        clock.now = 2.0
        bar.advance(12.5)
    first, last = out.getvalue().splitlines()
    assert first == "extract: 12.5/10 s of video, 6.25 s of video/s"  # no remaining time that could be negative
    assert last.endswith("took 2s")


def test_nothing_to_do() -> None:
    out = io.StringIO()
    with progress(0, "detect", "videos", stream=out, clock=Clock()):
        pass
    assert out.getvalue() == "detect: 0/0 videos, took 0s\n"


def test_an_error_is_not_reported_as_done() -> None:
    out, clock = io.StringIO(), Clock()

    def loop() -> None:
        with progress(5, "train", "steps", stream=out, clock=clock) as bar:
            bar.advance()
            clock.now = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert out.getvalue() == "train: stopped at 1/5 steps, 1 steps/s, took 1s\n"


def test_quiet() -> None:
    out = io.StringIO()
    with progress(2, "x", "y", quiet=True, stream=out) as bar:
        bar.advance(2, "note")
    with silent(2, "x", "y") as bar:
        bar.advance(2)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with progress(2, "de[tec]t", "videos", stream=out) as bar:
        bar.advance(1, "fir[s]t")
        bar.advance(1)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "de[tec]t" in text
    assert "2/2 videos" in text
    assert "fir[s]t" in text  # square brackets are text, not markup

    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with progress(1, "x", "y", stream=out):
        pass
    assert out.getvalue().startswith("x: 0/1 y")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (125, "2m05s"), (3599, "59m59s"), (11220, "3h07m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
