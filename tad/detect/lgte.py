"""LGTE, the local-global temporal encoder: self-attention whose first heads see neighbours, whose others see all rows.

Qing et al., "Temporal Context Aggregation Network for Temporal Action Proposal Refinement", 2021, §3.2. Every head has
its own projections; a local head differs in which rows it may look at, in nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tad.errors import RecipeError

BAND_ABOVE = 1000  # rows: longer sequences never build a T x T matrix for the local heads


class LGTE(nn.Module):
    """One encoder layer over rows: attention, then a feed-forward network, each with a residual and LayerNorm behind.

    No positional encoding: the local heads alone know which rows are neighbours.

    Parameters
    ----------
    channels : C of the rows, a multiple of ``heads``.
    heads, local_heads : how many there are, and how many of them, the first ones, are local.
    window : odd; row i of a local head sees the rows j with ``|i - j| <= window // 2``. At both ends of a sequence the
        window is cut: the first row sees ``window // 2 + 1`` rows, not ``window`` others in their place.
    feedforward : hidden width of the feed-forward network (ReLU).
    dropout : of attention weights, hidden units, and both results before they are added.
    mask_padding : False treats padded rows as ordinary ones, as the authors' published code does; a video's output then
        depends on what it is padded with.

    Raises
    ------
    RecipeError : values that do not fit together.
    """

    def __init__(
        self,
        *,
        channels: int,
        heads: int = 8,
        local_heads: int = 4,
        window: int = 9,
        feedforward: int = 256,
        dropout: float = 0.1,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, heads, feedforward) < 1 or channels % heads:
            raise RecipeError(
                f"an LGTE of {channels} channels cannot have {heads} heads of equal width; choose a divisor"
            )
        if not 0 <= local_heads <= heads:
            raise RecipeError(f"an LGTE with {heads} heads cannot have {local_heads} local ones")
        if window < 1 or window % 2 == 0:
            raise RecipeError(f"the window of an LGTE must be an odd number of rows, got {window}")
        if not 0.0 <= dropout <= 1.0:
            raise RecipeError(f"the dropout of an LGTE must be a share from 0 to 1, got {dropout}")
        self.heads, self.local_heads, self.window = heads, local_heads, window
        self.dropout, self.mask_padding = dropout, mask_padding
        self.projection = nn.Linear(channels, 3 * channels)  # queries, keys, values of all heads
        self.output = nn.Linear(channels, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.hidden, self.back = nn.Linear(channels, feedforward), nn.Linear(feedforward, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Rows ``x`` (B, C, T), of which ``mask`` (B, T) bool says which are real → (B, C, T), zero where none is.

        Without ``mask_padding`` the mask is not looked at, and no row is zeroed.
        """
        if self.mask_padding:
            x = x.masked_fill(~mask[:, None], 0.0)  # NaN times a weight of 0 would still be NaN
        else:
            mask = torch.ones_like(mask)
        y = x.transpose(1, 2)  # (B, T, C)
        y = self.norm1(y + self._drop(self._attend(y, mask)))
        y = self.norm2(y + self._drop(self.back(self._drop(F.relu(self.hidden(y))))))
        y = y.transpose(1, 2)  # (B, C, T)
        return y.masked_fill(~mask[:, None], 0.0)

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """Multi-head attention of ``x`` (B, T, C), each head to the rows that it may see."""
        query, key, value = self.projection(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        dropout, near = self.dropout if self.training else 0.0, slice(self.local_heads)
        parts = []
        if self.local_heads > 0:
            attention = banded_attention if x.shape[1] > BAND_ABOVE else masked_attention
            local = query[:, near], key[:, near], value[:, near]
            parts.append(attention(*local, mask, window=self.window, dropout=dropout))
        if self.local_heads < self.heads:
            far = slice(self.local_heads, None)
            # a sample without any real row sees all of its rows, since not every kernel survives a row that sees none
            seen = None if bool(mask.all()) else (mask | ~mask.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, T)
            parts.append(
                F.scaled_dot_product_attention(
                    query[:, far], key[:, far], value[:, far], attn_mask=seen, dropout_p=dropout
                )
            )
        return self.output(torch.cat(parts, 1).transpose(1, 2).flatten(2))  # (B, T, C)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, window: int, dropout: float) -> Tensor:
    """Attention of rows (B, H, T, d) to real rows ``mask`` (B, T) within ``window // 2``, by a T x T mask.

    A row that is not real sees itself too, so that no row sees nothing.
    """
    row = torch.arange(mask.shape[1], device=mask.device)
    distance = (row[:, None] - row).abs()  # (T, T)
    seen = (distance <= window // 2) & (mask[:, None] | (distance == 0))  # (B, T, T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], dropout_p=dropout)


def banded_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, window: int, dropout: float) -> Tensor:
    """What :func:`masked_attention` gives, in O(T · window) time and memory: one neighbour at a time, for all rows."""
    half, rows = window // 2, query.shape[2]
    key, value = (F.pad(x, (0, 0, half, half)) for x in (key, value))  # (B, H, T + 2 half, d)
    real = F.pad(mask, (half, half))  # (B, T + 2 half)
    query = query * query.shape[3] ** -0.5
    scores, seen = [], []
    for shift in range(window):
        scores.append((query * key[:, :, shift : shift + rows]).sum(3))  # (B, H, T)
        seen.append(real[:, shift : shift + rows] if shift != half else torch.ones_like(mask))
    weights = torch.stack(scores, 3).masked_fill(~torch.stack(seen, 2)[:, None], -torch.inf).softmax(3)
    weights = F.dropout(weights, dropout).to(value.dtype)  # (B, H, T, window)
    result = torch.zeros_like(query)
    for shift in range(window):
        result = result + weights[..., shift, None] * value[:, :, shift : shift + rows]
    return result
