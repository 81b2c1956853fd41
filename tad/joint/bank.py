"""A bank of features: rows that are not computed anew are those of the last time that they were.

After Cheng & Bertasius, "TALLFormer: Temporal Action Localization with a Long-memory Transformer", ECCV 2022, section
3.2, which ETAD compares with in Table 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tad.errors import TadError, did_you_mean
from tad.joint.clips import Clips
from tad.joint.encoder import Encoder
from tad.joint.gradient_sampling import choose, encode_sampled, encode_snippets, in_order

DTYPES = {"float16": torch.float16, "float32": torch.float32}
Update = tuple[str, Tensor, Tensor]  # video, rows (n,) int64, values (n, D)


class FeatureBank:
    """The rows of one stream of every training video, in memory, on the CPU.

    It belongs to a training, not to a module: a deep copy of it is itself, so that averaged weights share it.

    Parameters
    ----------
    rows : (video, (R, D)) of each video, what the bank begins with: the stored rows.
    dtype : ``float32``, or ``float16`` for half the memory.

    Raises
    ------
    ValueError : another type, or rows that are no (R, D).
    TadError : a video twice; values that float16 cannot hold.
    """

    def __init__(self, rows: Iterable[tuple[str, Tensor]], *, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"a feature bank holds {' or '.join(DTYPES)}, not {dtype!r}")
        self.dtype = dtype
        self._rows: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}  # video -> (R,) bool
        for video, values in rows:
            if values.ndim != 2:
                raise ValueError(f"rows of {video} must be (R, D), got {tuple(values.shape)}")
            if video in self._rows:
                raise TadError(f"the feature bank was given {video} twice")
            self._rows[video] = self._as_kept(video, values).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureBank:
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, video: object) -> bool:
        return video in self._rows

    def read(self, video: str, rows: Tensor) -> Tensor:
        """A copy of rows ``rows`` (n,) of ``video``, (n, D) float32.

        Raises
        ------
        TadError : no such video, or no such row.
        """
        return self._of(video)[self._checked(video, rows)].float()

    def write(self, video: str, rows: Tensor, values: Tensor) -> None:
        """Replace rows ``rows`` (n,), each named once, by ``values`` (n, D), without their graph.

        Raises
        ------
        TadError : no such video or row; values that float16 cannot hold.
        ValueError : a row named twice, or values of another shape.
        """
        self._replace(video, rows, values)
        self._written.setdefault(video, torch.zeros(len(self._rows[video]), dtype=torch.bool))[rows.cpu()] = True

    def pending(self) -> list[Update]:
        """Every row written since the last call, with the value that it has now: what other processes do not know.

        Rows that came by :meth:`apply` are not among them.
        """
        written, self._written = self._written, {}
        places = {video: mask.nonzero().squeeze(1) for video, mask in written.items() if mask.any()}
        return [(video, rows, self._rows[video][rows]) for video, rows in places.items()]

    def apply(self, updates: Iterable[Update]) -> None:
        """Take over what another process has written, in its order.

        Where every process applies the lists of all processes, its own among them, by rank, all banks are equal
        afterwards; of a row that several have written, the value of the highest rank stays.

        Raises
        ------
        TadError, ValueError : as :meth:`write`.
        """
        for video, rows, values in updates:
            self._replace(video, rows, values)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types; the tensors are the bank's own. Rows to be exchanged are not among it: exchange
        them first."""
        return {"dtype": self.dtype, "rows": dict(self._rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the values of a bank of the same videos; nothing is pending afterwards.

        Raises
        ------
        TadError : a bank of other videos, shapes or type; this one is then as it was.
        """
        loaded: Mapping[str, Tensor] = state["rows"]
        other = sorted(self._rows.keys() ^ loaded.keys())
        if other:
            raise TadError(
                f"the saved feature bank is of other videos: {len(other)} are in one only, such as {other[0]}. Train "
                "anew, or resume with the annotations and the store that the training began with"
            )
        if state["dtype"] != self.dtype:
            raise TadError(f"the saved feature bank holds {state['dtype']}, this one {self.dtype}")
        for video, values in loaded.items():
            if values.shape != self._rows[video].shape:
                raise TadError(
                    f"the saved feature bank has rows {tuple(values.shape)} of {video}, the store "
                    f"{tuple(self._rows[video].shape)}: it was extracted anew since. Train anew"
                )
        for video, values in loaded.items():
            self._rows[video].copy_(values)
        self._written = {}

    def _of(self, video: str) -> Tensor:
        if video not in self._rows:
            raise TadError(f"the feature bank has no video {video!r}.{did_you_mean(video, self._rows)}")
        return self._rows[video]

    def _checked(self, video: str, rows: Tensor) -> Tensor:
        """``rows`` on the CPU."""
        held, rows = len(self._of(video)), rows.detach().cpu()
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be (n,) int64, got {tuple(rows.shape)} {rows.dtype}")
        wrong = rows[(rows < 0) | (rows >= held)]
        if len(wrong):
            raise TadError(f"the feature bank has rows 0 to {held - 1} of {video}, not {int(wrong[0])}")
        return rows

    def _as_kept(self, video: str, values: Tensor) -> Tensor:
        kept = values.detach().to("cpu", DTYPES[self.dtype])
        if self.dtype == "float16" and not bool((kept.isfinite() | ~values.detach().cpu().isfinite()).all()):
            raise TadError(
                f"features of {video} go up to {float(values.detach().abs().max()):g}, float16 ends at 65504: hold the "
                "feature bank in float32"
            )
        return kept

    def _replace(self, video: str, rows: Tensor, values: Tensor) -> None:
        own, rows = self._of(video), self._checked(video, rows)
        if values.shape != (len(rows), own.shape[1]):
            raise ValueError(f"values of {len(rows)} rows must be ({len(rows)}, {own.shape[1]}), got {values.shape}")
        if len(rows.unique()) < len(rows):
            raise ValueError(f"rows of {video} to be written are named twice: {rows.tolist()}")
        own[rows] = self._as_kept(video, values)


def encode_banked(
    encoder: Encoder,
    clips: Sequence[Clips],
    *,
    videos: Sequence[str],
    bank: FeatureBank,
    ratio: float,
    sampler: str = "random",
) -> list[Tensor]:
    """Rows (U, D) of each sample's clips, in their order: a part of the snippets is computed, with a graph, and
    written to the bank; the others are the bank's, as old as they are.

    Parameters as of :func:`~tad.joint.gradient_sampling.encode_sampled`; ``videos`` are those of the samples.
    ``fps`` and ``dpp`` look at the bank's rows. Of samples of the same video, later ones read what earlier ones wrote.
    Where gradients are switched off, as in validation, all rows are computed and the bank has no part in it.

    Raises
    ------
    RecipeError, WeightsError : as ``encode_sampled``.
    TadError : a video or row that the bank does not have, or features that float16 cannot hold.
    """
    if not torch.is_grad_enabled():
        return encode_sampled(encoder, clips, ratio=0.0)
    rows = []
    for clip, video in zip(clips, videos, strict=True):

        def old(clip: Clips = clip, video: str = video) -> Tensor:
            return bank.read(video, clip.rows)

        chosen, others = choose(len(clip.rows), ratio=ratio, sampler=sampler, features=old)
        parts = [(others, bank.read(video, clip.rows[others]).to(clip.frames.device, encoder.dtype))]
        if len(chosen):
            computed = encode_snippets(encoder, clip, chosen)
            bank.write(video, clip.rows[chosen], computed)
            parts.append((chosen, computed))
        rows.append(in_order(parts))
    return rows
