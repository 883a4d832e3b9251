"""The specification of every op: plain loops over time, one line per term of the formula.

Every other backend must equal these functions: outputs, final states and gradients (tests/ops). They run anywhere
PyTorch runs and are differentiable, so they are also the fallback where no kernel is available.

Shape letters: b sequences, T tokens, D inner channels, X = channels of x and B before the repeat, N states a channel,
K convolution taps; for Mamba-2, P channels a head. Tensors are token-major.
"""

import torch
from torch import Tensor


def starts_document(seq_idx: Tensor, t: int) -> Tensor:
    """[b, 1] bool: token t belongs to another document than token t-1. The first token of a row continues the state."""
    return (seq_idx[:, t] != seq_idx[:, max(t - 1, 0)]).unsqueeze(1)


def repeat_groups(x: Tensor, group: int, repeats: int) -> Tensor:
    """[..., X] -> [..., X * repeats]: every `group` channels stand `repeats` times in a row, as in GQA."""
    return x.unflatten(-1, (-1, group)).repeat_interleave(repeats, dim=-2).flatten(-2)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,  y_t = <C_t, h_t> + D x_t  (Mamba, eq. 2a/2b, zero-order hold on A).

    Shapes and semantics as `m1.ops.selective_scan`.
    """
    b, T, d = x.shape
    n = A.shape[1]
    x, dt, A, B, C, D = (t.float() for t in (x, dt, A, B, C, D))
    B = repeat_groups(B, n, d // B.shape[-1]).unflatten(-1, (-1, n))  # [b, T, D/N, N]: one vector a group of N channels
    C = C.unflatten(-1, (-1, n))
    h = x.new_zeros(b, d, n) if initial_state is None else initial_state.float()
    ys = []
    for t in range(T):
        if seq_idx is not None:
            h = h.masked_fill(starts_document(seq_idx, t)[..., None], 0.0)
        B_t = B[:, t].repeat_interleave(n, dim=1)  # [b, D, N]
        C_t = C[:, t].repeat_interleave(n, dim=1)
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B_t
        ys.append((C_t * h).sum(-1) + D * x[:, t])
    return torch.stack(ys, dim=1), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t  (Mamba-2, scalar decay a head).

    Shapes and semantics as `m1.ops.ssd`.
    """
    heads = C.shape[2]
    rep = heads // x.shape[2]
    dtype = x.dtype
    x, dt, A, B, C, D = (t.float() for t in (x, dt, A, B, C, D))
    x, B = x.repeat_interleave(rep, dim=2), B.repeat_interleave(rep, dim=2)  # [b, T, heads, P or N]
    h = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3]) if initial_state is None else initial_state.float()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            h = h.masked_fill(starts_document(seq_idx, t)[..., None, None], 0.0)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1).to(dtype), h


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """y_t = bias + sum_k weight[:, K-1-k] * x_{t-k}, where x_{t-k} counts only inside token t's own document.

    Shapes and semantics as `m1.ops.causal_conv`.
    """
    b, T, d = x.shape
    K = weight.shape[1]
    ys = []
    for t in range(T):
        y = x.new_zeros(b, d) if bias is None else bias.expand(b, d)
        for k in range(K):
            if t >= k:
                past = x[:, t - k]
            elif initial_state is not None:
                past = initial_state[:, K - 1 + t - k]
            else:
                continue
            if seq_idx is not None:
                past = past * (seq_idx[:, max(t - k, 0)] == seq_idx[:, t])[:, None]
            y = y + weight[:, K - 1 - k] * past
        ys.append(y)
    return torch.stack(ys, dim=1)
