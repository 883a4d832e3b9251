"""Mamba-2's scan as matrix products (state-space duality), in differentiable PyTorch for any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.ops.shapes import Shapes

CHECK = Shapes(
    "ssd", where={"G must divide heads": lambda G, heads: G > 0 and heads % G == 0},
    x="b T G P", dt="b T heads", A="heads", B="b T G N", C="b T heads N", D="heads",
    seq_idx="b T: int or None", ssm_state="b heads P N or None",
)  # fmt: skip
CHUNK = 64  # tokens whose pairwise products are formed; more of them mean more work but fewer sequential steps


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    seq_idx: Tensor | None = None, ssm_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t, with a state matrix h per head.

    The chunked form of Mamba-2 (§6): masked, decayed attention inside a chunk, and a recurrence of states between
    chunks. The specification is `reference.ssd`.

    Args:
        x: [b, T, G, P] inputs, after convolution and activation; head i reads group i // (heads / G) of x and B.
        dt: [b, T, heads] step sizes >= 0, after softplus. A step of 0 leaves the state as it is (padding).
        A: [heads], negative.
        B: [b, T, G, N].
        C: [b, T, heads, N].
        D: [heads] skip weights.
        seq_idx: [b, T] integers, the document of each token; the state is cleared where it changes.
        ssm_state: [b, heads, P, N], the state before the first token; zero when None.

    Returns:
        y [b, T, heads, P] in x's dtype and the final state [b, heads, P, N] in float32. Arithmetic is in float32.

    Raises:
        ValueError: a tensor that doesn't fit.
    """
    CHECK(x, dt, A, B, C, D, seq_idx, ssm_state)
    run = _as_one_operator if torch.compiler.is_exporting() else _ssd
    return run(x, dt, A, B, C, D, seq_idx, ssm_state)


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None, ssm_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd`, without its checks."""
    b, T, G, P = x.shape
    heads, N = C.shape[2:]
    with torch.autocast(x.device.type, enabled=False):  # autocast would run the products in bfloat16
        rep, out_dtype = heads // G, x.dtype
        size = min(CHUNK, T)
        chunks = -(-T // size)
        if torch.compiler.is_compiling():  # sizes that hold for any T: the last chunk always ends with padding
            size, chunks = CHUNK, T // CHUNK + 1
        state = x.new_zeros(b, G, rep, P, N, dtype=torch.float32)
        if ssm_state is not None:
            state = ssm_state.float().unflatten(1, (G, rep))

        def chunked(t: Tensor) -> Tensor:
            """[b, T, ...] -> [b, chunks, size, ...] float32; tokens added at the end have dt = 0."""
            t = F.pad(t.float(), [0, 0] * (t.ndim - 2) + [0, chunks * size - T])
            return t.unflatten(1, (chunks, size))

        skip = D.float().view(G, rep, 1) * x.float().unsqueeze(3)
        x, dt, B, C = chunked(x), chunked(dt).unflatten(-1, (G, rep)), chunked(B), chunked(C).unflatten(3, (G, rep))
        log_decay = (dt * A.float().view(G, rep)).cumsum(2)  # [b, chunks, size, G, rep], from the start of the chunk
        starts, ends, pairs = _within_documents(seq_idx, b, chunks, size, x.device)

        between = (log_decay.unsqueeze(3) - log_decay.unsqueeze(2)).masked_fill(~pairs[..., None, None], -torch.inf)
        scores = torch.einsum("bcigrn,bcjgn->bcijgr", C, B) * between.exp() * dt.unsqueeze(2)
        y = torch.einsum("bcijgr,bcjgp->bcigrp", scores, x)

        to_end = (log_decay[:, :, -1:] - log_decay).exp() * dt * ends[..., None, None]
        added = torch.einsum("bcjgr,bcjgp,bcjgn->bcgrpn", to_end, x, B)
        from_start = log_decay.exp() * starts[..., None, None]
        carried = _decay_between(log_decay[:, :, -1], starts[:, :, -1])
        states = torch.einsum("bcegr,begrpn->bcgrpn", carried, torch.cat([state.unsqueeze(1), added], dim=1))
        y = y + torch.einsum("bcigrn,bcgrpn,bcigr->bcigrp", C, states[:, :-1], from_start)
        y = y.flatten(1, 2)[:, :T] + skip
        return y.flatten(2, 3).to(out_dtype), states[:, -1].flatten(1, 2)


def _decay_between(log_decay: Tensor, unbroken: Tensor) -> Tensor:
    """How much of what each chunk adds to the state is left before each later chunk.

    Sums of logarithms, each over its own chunks: a difference of running sums would lose digits. A loop over the chunks
    would make a compiled graph depend on their number.

    Args:
        log_decay: [b, chunks, ...] of each whole chunk.
        unbroken: [b, chunks], whether no document begins in the chunk.

    Returns:
        [b, chunks + 1, chunks + 1, ...]: entry (i, 0) is what is left before chunk i of the first state, and (i, j) of
        what chunk j - 1 adds; zero for j > i. The last i is behind all chunks.
    """
    chunks = log_decay.shape[1]
    edge = torch.arange(chunks + 1, device=log_decay.device)
    later = edge[:-1, None] >= edge  # [chunk, source]: the chunk comes after what the source added
    later = later.view(1, *later.shape, *[1] * (log_decay.dim() - 2))
    total = F.pad((log_decay.unsqueeze(2) * later).cumsum(1), [0, 0] * (log_decay.dim() - 1) + [1, 0])
    breaks = F.pad((~unbroken).cumsum(1), (1, 0))
    kept = (breaks.unsqueeze(2) == breaks.unsqueeze(1)) & (edge[:, None] >= edge)
    return total.exp() * kept.view(*kept.shape, *[1] * (log_decay.dim() - 2))


def _within_documents(
    seq_idx: Tensor | None, b: int, chunks: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Three bool masks: which tokens of a chunk share a document with another token.

    Returns:
        starts: [b, chunks, size], token i with the last token before the chunk.
        ends: [b, chunks, size], token i with the chunk's last token.
        pairs: [b, chunks, size, size], token i with token j <= i of the chunk.
    """
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if seq_idx is None:
        ones = torch.ones(1, 1, 1, dtype=torch.bool, device=device).expand(b, chunks, size)
        return ones, ones, causal.expand(b, chunks, size, size)
    documents = F.pad((seq_idx.diff(dim=1) != 0).cumsum(1), (1, 0))
    last = documents[:, -1:].expand(-1, chunks * size - documents.shape[1])
    documents = torch.cat([documents, last], dim=1).unflatten(1, (chunks, size))
    in_front = torch.cat([documents[:, :1, :1], documents[:, :-1, -1:]], dim=1)
    same = documents.unsqueeze(3) == documents.unsqueeze(2)
    return documents == in_front, documents == documents[:, :, -1:], same & causal


@torch.library.custom_op("m1::ssd", mutates_args=())
def _as_one_operator(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, seq_idx: Tensor | None, ssm_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd` for exported graphs, not differentiable. Their length is unknown, and so is the number of chunks."""
    return _ssd(x, dt, A, B, C, D, seq_idx, ssm_state)


@_as_one_operator.register_fake
def _outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    (b, T, heads, N), P = C.shape, x.shape[3]
    return x.new_empty(b, T, heads, P), x.new_empty(b, heads, P, N, dtype=torch.float32)
