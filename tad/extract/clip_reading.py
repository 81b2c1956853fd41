"""Where the clips of a training come from: from frames in memory, or from videos decoded in sequence meanwhile.

Frames are never sought: OpenCV's seeking is not exact. A streamed epoch decodes each video once from its start, cuts
the clips that are wanted of it in passing, and stops behind the last of them. Both ways give the same clips, pixel by
pixel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tad.errors import TadError, VideoError
from tad.extract.clip_sampling import ClipPlan
from tad.extract.clips import Clip, ClipFormat, LabelledVideo, cut, read_chunks
from tad.extract.frames import UNREADABLE
from tad.extract.video import Geometry, Plan

AHEAD_CLIPS = 8  # decoded beyond the pool, so that a batch need not wait for each of its clips
Clips = Generator[np.ndarray | None, None, None]
Report = Callable[[str, str], None]  # of a video that cannot be read: its id, and why


class ClipReader(Protocol):
    """Gives the clips of one plan after the other, each (window, h, w, C) uint8, or ``None`` where its video failed."""

    def read(self, plans: Iterable[ClipPlan]) -> Clips: ...


class MemoryReader:
    """Cuts clips from frames (n, H, W, C) in memory; ``frames[k]`` are those of the ``k``-th video, cropped already if
    they have the size of ``geometry``'s crop."""

    def __init__(self, frames: dict[int, np.ndarray], geometry: Geometry, *, whole: bool) -> None:
        self.frames, self.geometry, self.whole = frames, geometry, whole

    def read(self, plans: Iterable[ClipPlan]) -> Clips:
        for plan in plans:
            for clip in plan.clips:
                frames = self.frames[clip.video]
                box = _box(self.geometry, frames) if self.whole else None
                yield cut(frames[clip.frames], clip, box)


def _box(geometry: Geometry, frames: np.ndarray) -> Plan:
    """Where the centre's crop lies in frames that are scaled already."""
    tall, wide = frames.shape[1:3]
    height, width = geometry.crop or (tall, wide)
    return Plan((tall, wide), (tall - height) // 2, (wide - width) // 2, height, width)


class StreamReader:
    """Decodes videos in threads (decoders let go of the interpreter) and holds at most the plan's pool of clips,
    ``AHEAD_CLIPS`` more, and in each thread the frames that one clip spans.

    Plans follow each other without a gap: while the last clips of one are waiting, the next one is decoded already.
    ``failed`` is told of every video that cannot be read, once a plan.
    """

    def __init__(
        self, videos: Sequence[LabelledVideo], form: ClipFormat, *, workers: int, failed: Report = lambda *_: None
    ) -> None:
        self.videos, self.form, self.workers, self.failed = videos, form, workers, failed

    def read(self, plans: Iterable[ClipPlan]) -> Clips:
        session = _Session(self, plans)
        try:
            session.start()
            yield from session.clips()
        finally:
            session.stop()


class _Session:
    """One call of :meth:`StreamReader.read`: its threads, and the clips that are between them and the caller."""

    def __init__(self, reader: StreamReader, plans: Iterable[ClipPlan]) -> None:
        self.reader = reader
        self.tasks = self._tasks(plans)
        self.asking = threading.Lock()  # one thread at a time advances `tasks`
        self.change = threading.Condition()
        self.ready: dict[int, np.ndarray | None] = {}
        self.taken = 0  # clips handed to the caller
        self.known = 0  # clips of the plans begun so far
        self.working = reader.workers  # threads that may still bring something
        self.stopped = False
        self.mistakes: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._work, name=f"tad-clips-{k}", daemon=True) for k in range(reader.workers)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        with self.change:
            self.stopped = True
            self.change.notify_all()
        for thread in self.threads:
            thread.join(timeout=30)

    def clips(self) -> Iterator[np.ndarray | None]:
        while True:
            with self.change:
                self.change.wait_for(lambda: self.taken in self.ready or self.mistakes or not self.working)
                if self.mistakes:
                    raise self.mistakes[0]
                if self.taken not in self.ready:
                    return  # every plan is done
                clip = self.ready.pop(self.taken)
                self.taken += 1
                self.change.notify_all()
            yield clip

    def _tasks(self, plans: Iterable[ClipPlan]) -> Iterator[tuple[int, list[tuple[int, int, Clip]]]]:
        """Videos to decode, each with (number when it is wanted, last number taken before it may wait, clip)."""
        arrival = 0
        for plan in plans:
            base, self.known = self.known, self.known + len(plan.clips)
            for visit in plan.visits:
                wanted = []
                for position in visit:
                    # a clip may wait in the pool when those before it, but for a pool full, have been taken
                    wanted.append((base + position, arrival - plan.pool - AHEAD_CLIPS, plan.clips[position]))
                    arrival += 1
                yield wanted[0][2].video, wanted

    def _work(self) -> None:
        try:
            while not self.stopped:
                with self.asking:
                    task = next(self.tasks, None)
                if task is None:
                    break
                self._decode(*task)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - a mistake of ours; it is raised where the clips are read
            self.mistakes.append(error)
        finally:
            with self.change:
                self.working -= 1
                self.change.notify_all()

    def _decode(self, number: int, wanted: list[tuple[int, int, Clip]]) -> None:
        video, left = self.reader.videos[number], iter(wanted)
        clips = [clip for *_, clip in wanted]
        arrays = cut_clips(video, self.reader.form, clips, given_up=lambda: self.stopped)
        try:
            for array in arrays:
                self._put(array, *next(left)[:2])
        except UNREADABLE as error:
            self.reader.failed(video.video, str(error) if isinstance(error, TadError) else repr(error))
            for key, after, _ in left:
                self._put(None, key, after)
        finally:
            arrays.close()

    def _put(self, array: np.ndarray | None, key: int, after: int) -> None:
        with self.change:
            self.change.wait_for(lambda: self.stopped or self.taken > after)
            if self.stopped:
                raise _Stopped
            self.ready[key] = array
            self.change.notify_all()


class _Stopped(Exception):
    """The caller has gone."""


def cut_clips(
    video: LabelledVideo, form: ClipFormat, clips: Sequence[Clip], *, given_up: Callable[[], bool] = lambda: False
) -> Generator[np.ndarray, None, None]:
    """Clips of one video, sorted by their last frame, in one pass; only the frames that are still needed are held.
    It ends early once it is ``given_up``.

    Raises :class:`VideoError` for a file that cannot be decoded, or that has become shorter.
    """
    needed_from = np.minimum.accumulate([int(clip.frames[0]) for clip in reversed(clips)])[::-1]
    held: dict[int, np.ndarray] = {}
    done = count = 0
    chunks = read_chunks(video.path, form)
    try:
        for chunk, plan, _ in chunks:
            for frame in chunk:
                if done < len(clips) and count >= needed_from[done]:
                    held[count] = frame
                count += 1
            while done < len(clips) and clips[done].frames[-1] < count:
                clip = clips[done]
                yield cut(np.stack([held[int(k)] for k in clip.frames]), clip, plan)
                done += 1
                oldest = needed_from[done] if done < len(clips) else count
                for k in [k for k in held if k < oldest]:
                    del held[k]
            if done == len(clips) or given_up():
                return
    finally:
        chunks.close()
    raise VideoError(f"{video.path}: it has {count} frames now, {video.frames} were counted: it changed meanwhile")
