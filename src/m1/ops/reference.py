"""The specification of every op: plain loops over time, one line per term of the formula.

Every other backend must match these functions: outputs, final states and gradients (tests/ops). They run anywhere
PyTorch runs, so they are also the fallback where no kernel is available. Those used in training are differentiable.
Shapes and semantics are those of the functions of the same names in `m1.ops`.

Shape letters: b sequences, T tokens, D inner channels, X = channels of x and B before the repeat, N states per channel,
K convolution taps; for Mamba-2, P channels per head. Tensors are token-major.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops import inputs as columns
from m1.ops.chunks import bounds
from m1.ops.inputs import PrefillInputs, ScanInputs, SSDPrefillInputs, SSDStepInputs, StepInputs
from m1.ops.quantize import GROUP, Quantized
from m1.ops.random_bits import uniforms


def starts_document(seq_idx: Tensor, t: int) -> Tensor:
    """[b, 1] bool: token t is in another document than token t-1. False for a row's first token: its state is kept."""
    return (seq_idx[:, t] != seq_idx[:, max(t - 1, 0)]).unsqueeze(1)


def repeat_groups(x: Tensor, group: int, repeats: int) -> Tensor:
    """[..., X] -> [..., X * repeats]: each block of `group` channels is repeated `repeats` times, as in GQA."""
    return x.unflatten(-1, (-1, group)).repeat_interleave(repeats, dim=-2).flatten(-2)


def selective_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """u = silu(conv(x)),  dt = softplus(dt),  h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t  (Mamba, eq. 2a/2b, zero-order
    hold on A),  y_t = (<C_t, h_t> + D u_t) silu(z_t)."""
    z, x, B, C, dt, A, D, conv_weight, conv_bias = (t.float() for t in inputs[:9])
    seq_idx, conv_state, ssm_state = inputs[9:]
    d, n = A.shape
    rep = d // x.shape[-1]
    x = repeat_groups(x, n, rep)
    if conv_state is not None:
        conv_state = repeat_groups(conv_state.float().mT, n, rep).mT
    u = F.silu(causal_conv(x, conv_weight, conv_bias, seq_idx, conv_state))
    dt = F.softplus(dt)
    B = repeat_groups(B, n, rep).unflatten(-1, (-1, n))  # [b, T, D/N, N]: one vector per group of N channels
    C = C.unflatten(-1, (-1, n))
    h = x.new_zeros(x.shape[0], d, n) if ssm_state is None else ssm_state.float()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            h = h.masked_fill(starts_document(seq_idx, t)[..., None], 0.0)
        B_t = B[:, t].repeat_interleave(n, dim=1)  # [b, D, N]
        C_t = C[:, t].repeat_interleave(n, dim=1)
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B_t
        ys.append(((C_t * h).sum(-1) + D * u[:, t]) * F.silu(z[:, t]))
    return torch.stack(ys, dim=1).to(inputs.z.dtype), h


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    seq_idx: Tensor | None = None, ssm_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t  (Mamba-2, one scalar decay per head)."""
    heads = C.shape[2]
    rep = heads // x.shape[2]
    dtype = x.dtype
    x, dt, A, B, C, D = (t.float() for t in (x, dt, A, B, C, D))
    x, B = x.repeat_interleave(rep, dim=2), B.repeat_interleave(rep, dim=2)  # [b, T, heads, P or N]
    h = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3]) if ssm_state is None else ssm_state.float()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            h = h.masked_fill(starts_document(seq_idx, t)[..., None, None], 0.0)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1).to(dtype), h


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None = None, conv_state: Tensor | None = None
) -> Tensor:
    """y_t = bias + sum_k weight[:, K-1-k] * x_{t-k}, where x_{t-k} counts only inside token t's own document."""
    b, T, d = x.shape
    K = weight.shape[1]
    ys = []
    for t in range(T):
        y = x.new_zeros(b, d) if bias is None else bias.expand(b, d)
        for k in range(K):
            if t >= k:
                past = x[:, t - k]
            elif conv_state is not None:
                past = conv_state[:, :, K - 1 + t - k]
            else:
                continue
            if seq_idx is not None:
                past = past * (seq_idx[:, max(t - k, 0)] == seq_idx[:, t])[:, None]
            y = y + weight[:, K - 1 - k] * past
        ys.append(y)
    return torch.stack(ys, dim=1).to(x.dtype)


def state_update(inputs: StepInputs) -> Tensor:
    """`selective_scan` of one token per row. It continues and updates the states of the row's slot."""
    z, x, *_, conv_state, ssm_state, slots = inputs
    rows, at = occupied(slots, len(ssm_state))
    tokens = [t[rows, None] for t in inputs[:5]]
    scan = ScanInputs._make([*tokens, *inputs[5:9], None, conv_state[at], ssm_state[at]])
    y, ssm_state[at] = selective_scan(scan)
    conv_state[at] = shifted(conv_state[at], x[rows])
    return torch.zeros_like(z).index_copy(0, rows, y[:, 0])


def ssd_update(inputs: SSDStepInputs) -> Tensor:
    """Convolution, silu and `ssd` of one token per row. It continues and updates the states of the row's slot."""
    xBC, dt, A, D, conv_weight, conv_bias, conv_state, ssm_state, slots = inputs
    _, heads, P, N = ssm_state.shape
    groups = (xBC.shape[1] - heads * N) // (P + N)
    rows, at = occupied(slots, len(ssm_state))
    token = xBC[rows, None].float()
    u = F.silu(causal_conv(token, conv_weight.float(), conv_bias.float(), None, conv_state[at].float()))
    x, B, C = u.split([groups * P, groups * N, heads * N], dim=-1)
    x, B, C = x.unflatten(-1, (groups, P)), B.unflatten(-1, (groups, N)), C.unflatten(-1, (heads, N))
    y, ssm_state[at] = ssd(x, F.softplus(dt[rows, None].float()), A, B, C, D, None, ssm_state[at])
    conv_state[at] = shifted(conv_state[at], xBC[rows])
    return xBC.new_zeros(len(xBC), heads, P).index_copy(0, rows, y[:, 0].to(xBC.dtype))


def prefill_scan(inputs: PrefillInputs) -> Tensor:
    """`selective_scan` of each chunk alone. It continues and updates the states of the chunk's slot."""
    z, x, *_, conv_state, ssm_state, slots, cu_seqlens, _ = inputs
    y = torch.zeros_like(z)
    for slot, (first, end) in zip(slots.tolist(), bounds(cu_seqlens), strict=True):
        if slot >= 0 and first < end:
            tokens = [t[None, first:end] for t in inputs[:5]]
            scan = ScanInputs._make([*tokens, *inputs[5:9], None, conv_state[slot, None], ssm_state[slot, None]])
            y[first:end], ssm_state[slot] = (t[0] for t in selective_scan(scan))
            for t in range(first, end):
                conv_state[slot] = shifted(conv_state[slot, None], x[t, None])[0]
    return y


def prefill_ssd(inputs: SSDPrefillInputs) -> Tensor:
    """`ssd_update` of the tokens of each chunk, one after another. y is float32."""
    xBC, dt, *rest, slots, cu_seqlens, _ = inputs
    ssm_state = inputs.ssm_state
    y = ssm_state.new_zeros(len(xBC), *ssm_state.shape[1:3])
    for slot, (first, end) in zip(slots[:, None], bounds(cu_seqlens), strict=True):
        for t in range(first, end):
            y[t] = ssd_update(SSDStepInputs._make([xBC[t, None].float(), dt[t, None], *rest, slot]))[0]
    return y


def existing(slots: Tensor, count: int) -> Tensor:
    """The slots, if there are so many. Raises IndexError on a CPU for one that doesn't exist."""
    if slots.device.type == "cpu" and (unknown := (slots >= count).nonzero().flatten().tolist()):
        row = unknown[0]
        raise IndexError(f"row {row} has slot {int(slots[row])}, but there are {count} slots")
    return slots


def occupied(slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The indices of the rows that have one of `count` slots, and those. A negative slot means no slot."""
    rows = (existing(slots, count) >= 0).nonzero().flatten()
    return rows, slots[rows]


def shifted(conv_state: Tensor, tokens: Tensor) -> Tensor:
    """conv_state [b, channels, K-1] without its oldest input, and with `tokens` [b, channels] appended."""
    return torch.cat([conv_state, tokens[..., None].to(conv_state.dtype)], dim=-1)[..., 1:]


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, page_table: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """softmax(scale q k^T) v over the first `length` keys of each row's slot. Zero when there are none."""
    out, slots = torch.zeros_like(q), existing(slots, len(page_table))
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if slot >= 0 and length > 0:
            k, v = (keys_of(t, page_table[slot], length) for t in (k_cache, v_cache))
            out[row] = attention(q[row, None], k, v, scale)[0].to(q.dtype)
    return out


def prefill_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, cu_seqlens: Tensor, page_table: Tensor, slots: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Causal softmax(scale q k^T) v of each chunk over the keys of its slot, its own and earlier ones."""
    out = torch.zeros_like(q)
    for slot, start, (first, end) in zip(slots.tolist(), starts.tolist(), bounds(cu_seqlens), strict=True):
        if slot >= 0 and first < end:
            k, v = (keys_of(t, page_table[slot], start + end - first) for t in (k_cache, v_cache))
            out[first:end] = attention(q[first:end], k, v, scale).to(q.dtype)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax(scale q k^T) v in float32: queries [T, heads, d] of the last T of the keys [kv_heads, L, d]."""
    T, heads, _ = q.shape
    kv_heads, L, _ = k.shape
    k, v = (t.float().repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
    after = torch.ones(T, L, dtype=torch.bool, device=q.device).triu(L - T + 1)
    scores = scale * torch.einsum("thd,hld->htl", q.float(), k)
    return torch.einsum("htl,hld->thd", torch.softmax(scores.masked_fill(after, -torch.inf), dim=-1), v)


def keys_of(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first `length` keys [kv_heads, length, head_dim] in the pages of one slot."""
    used = -(-length // cache.shape[2])
    return cache.index_select(0, pages[:used].long()).transpose(0, 1).flatten(1, 2)[:, :length]


def add_rms_norm(hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden += update, in place; returns hidden / sqrt(mean(hidden^2) + eps) * weight."""
    if update is not None:
        hidden += update
    x = hidden.float()
    return (x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.float()).to(hidden.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def sample_token(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of probabilities passes uniform, and its log-probability."""
    greedy = temperature == 0
    heat = temperature.float().masked_fill(greedy, 1.0)[:, None]
    scaled = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / heat  # overflows to -inf at most
    weights, logprobs = scaled.exp(), scaled.log_softmax(dim=-1)
    sums, possible = weights.double().cumsum(dim=-1), weights > 0
    passed = (sums > uniform[:, None] * sums[:, -1:]) & possible
    # if rounding leaves no token past the target, draw the last one with any probability
    last = (possible * torch.arange(logits.shape[1], device=logits.device)).argmax(dim=-1)
    drawn = torch.where(passed.any(dim=-1), passed.to(torch.uint8).argmax(dim=-1), last)
    tokens = torch.where(greedy, logprobs.argmax(dim=-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def quantized_linear(x: Tensor, weight: Quantized, bias: Tensor | None, rounds_rows: bool) -> Tensor:
    """x weight^T + bias in float32.

    Args:
        x: [rows, in].
        weight: [out, in].
        bias: [out], or None.
        rounds_rows: whether rows are rounded to -127..127 first, with one scale per GROUP inputs.
    """
    x, inputs = x.float(), x.shape[1]
    if rounds_rows:
        groups = F.pad(x, (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(2, keepdim=True) / 127
        x = ((groups / scales).nan_to_num().round() * scales).flatten(1)[:, :inputs]
    return F.linear(x, weight.values(), None if bias is None else bias.float())


def rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, slots: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """The specification of ops/rotary.py."""
    kv_heads, page_size = k_cache.shape[1:3]
    q_heads = qkv.shape[1] - 2 * kv_heads
    qk, values = qkv.split([q_heads + kv_heads, kv_heads], dim=1)
    first, second = qk.chunk(2, dim=-1)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    rotated = (qk.to(dtype) * cos + torch.cat([-second, first], dim=-1).to(dtype) * sin).to(qkv.dtype)
    queries, keys = rotated.split([q_heads, kv_heads], dim=1)
    kept = existing(slots, len(page_table)) >= 0
    if not kept.all():
        slots, positions, keys, values = (t[kept] for t in (slots, positions, keys, values))
    positions = positions.long()  # bytes would be read as a mask
    pages, places = page_table[slots.long(), positions // page_size].long(), positions % page_size
    k_cache[pages, :, places], v_cache[pages, :, places] = keys, values
    return queries


def read_registers(integers: Tensor, floats: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
    """The specification of ops/registers.py: tokens, active, lengths, keys, uniform, temperature."""
    rows = integers[existing(slots, len(integers))]
    tokens, lengths = rows[:, columns.TOKEN].contiguous(), rows[:, columns.LENGTH].contiguous()
    active = torch.where(rows[:, columns.ENDED] > 0, -1, slots)
    uniform = uniforms(rows[:, columns.STREAM], rows[:, columns.DRAWN])
    return tokens, active, lengths, lengths + 1, uniform, floats[slots, columns.TEMPERATURE]


def advance_registers(integers: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """The specification of ops/registers.py."""
    rows = integers[existing(slots, len(integers))]
    runs = 1 - rows[:, columns.ENDED]
    rows[:, columns.TOKEN] = tokens
    rows[:, columns.LENGTH] += runs
    rows[:, columns.DRAWN] += runs
    rows[:, columns.ENDED] |= (rows[:, columns.STOPS :] == tokens[:, None]).any(dim=1)
    integers[slots] = rows
