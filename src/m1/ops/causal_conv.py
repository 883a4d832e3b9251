"""Depthwise causal convolution over time, with document boundaries in packed rows."""

import torch
from torch import Tensor

from m1.ops.shapes import Shapes

CHECK = Shapes(
    "causal_conv", where={"K must be at least 1": lambda K: K > 0},
    x="b T D", weight="D K", bias="D or None", seq_idx="b T: int or None", conv_state="b D K-1 or None",
)  # fmt: skip


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, conv_state: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution; the specification is `reference.causal_conv`.

    It runs as K shifted multiply-adds. With K = 4 they are memory-bound and take a few percent of the time of the
    projections around them.

    Args:
        x: [b, T, D].
        weight: [D, K]; the last tap multiplies the current token.
        bias: [D] or None.
        seq_idx: [b, T] integers, the document of each token. Taps on another document count as zero.
        conv_state: [b, D, K-1], the inputs before the first token, oldest first. They belong to the first token's
            document. Zero when None.

    Returns:
        [b, T, D] in x's dtype.

    Raises:
        ValueError: a tensor that doesn't fit.
    """
    CHECK(x, weight, bias, seq_idx, conv_state)
    T, K = x.shape[1], weight.shape[1]
    y = x * weight[:, K - 1]
    if bias is not None:
        y = y + bias
    past = x.new_zeros(x.shape[0], K - 1, x.shape[2]) if conv_state is None else conv_state.mT.to(x.dtype)
    padded = torch.cat([past, x], dim=1)
    if seq_idx is not None:
        documents = torch.cat([seq_idx[:, :1].expand(-1, K - 1), seq_idx], dim=1)
    for k in range(1, K):
        past = padded[:, K - 1 - k : K - 1 - k + T]
        if seq_idx is not None:
            past = past * (documents[:, K - 1 - k : K - 1 - k + T] == seq_idx).unsqueeze(-1)
        y = torch.addcmul(y, past, weight[:, K - 1 - k])
    return y.to(x.dtype)
