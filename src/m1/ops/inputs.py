"""The tensors of the larger ops, declared once: names, order, sizes and dtypes, in the notation of `Shapes`.

Below an op's public function its tensors travel in one of these tuples. The public function converts them for a kernel:
activations get one dtype, other floats float32, seq_idx int32 and slots int64. The scan's conv_state gets the dtype of
the activations. A decode step updates conv_state in place, so it keeps its own dtype. The channels of a token are
contiguous, and every tensor except the activations is contiguous as a whole.

Shape letters: b sequences, T tokens, D inner channels, X channels of x and B, N states per channel, K convolution taps,
S slots, c chunks of prompts; for Mamba-2, P channels per head.
"""

from typing import Annotated, NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """The tensors that `selective_scan` takes: Mamba-1's scan over the T tokens of b sequences.

    Attributes:
        z: [b, T, D] gate.
        x: [b, T, X] inputs of the convolution.
        B: [b, T, X] input projections of the state.
        C: [b, T, D] output projections of the state.
        dt: [b, T, D] step sizes before softplus.
        A: [D, N] decay rates, negative.
        D: [D] skip weights.
        conv_weight: [D, K] taps, the last for the current token.
        conv_bias: [D].
        seq_idx: [b, T] integers, the document of each token, or None.
        conv_state: [b, X, K-1] convolution inputs before the first token, oldest first, or None for zeros.
        ssm_state: [b, D, N] recurrent state before the first token, or None for zeros.
    """

    z: Annotated[Tensor, "b T D"]
    x: Annotated[Tensor, "b T X"]
    B: Annotated[Tensor, "b T X"]
    C: Annotated[Tensor, "b T D"]
    dt: Annotated[Tensor, "b T D"]
    A: Annotated[Tensor, "D N"]
    D: Annotated[Tensor, "D"]
    conv_weight: Annotated[Tensor, "D K"]
    conv_bias: Annotated[Tensor, "D"]
    seq_idx: Annotated[Tensor | None, "b T: int or None"] = None
    conv_state: Annotated[Tensor | None, "b X K-1 or None"] = None
    ssm_state: Annotated[Tensor | None, "b D N or None"] = None


class ScanGradients(NamedTuple):
    """Buffers for the gradients of `selective_scan`, which a backend's backward pass fills.

    Each field has the shape and dtype of the `ScanInputs` field of the same name. conv_state and ssm_state are there
    even when the scan started without these states: conv_state [b, X, K-1] in x's dtype, ssm_state [b, D, N] float32.
    """

    z: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    D: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    conv_state: Tensor
    ssm_state: Tensor


class ScanOutputs(NamedTuple):
    """The results of `selective_scan`'s operator, which a backend's forward pass fills.

    Attributes:
        y: [b, T, D] outputs, in z's dtype.
        ssm_state: [b, D, N] float32, the state after the last token.
        saved: [b, chunks * D * N] float32, the state before each chunk, for the backward pass. Empty (no chunks) if no
            gradient is needed. The order of its elements is the backend's own. It is flat because a dimension of
            chunks would make an exported graph depend on whether there is more than one.
    """

    y: Annotated[Tensor, "b T D"]
    ssm_state: Annotated[Tensor, "b D N: float32"]
    saved: Annotated[Tensor, "b chunks*D*N: float32"]


class StepInputs(NamedTuple):
    """The tensors that `state_update` takes: one decode step of a Mamba-1 layer for b sequences.

    Fields without a description are as in `ScanInputs`, without the dimension T.

    Attributes:
        z, C, dt: [b, D].
        x, B: [b, X].
        A, D, conv_weight, conv_bias: [D, N], [D], [D, K], [D].
        conv_state: [S, X, K-1] last convolution inputs of each slot, oldest first. Updated in place.
        ssm_state: [S, D, N] float32, recurrent state of each slot. Updated in place.
        slots: [b] integers, the slot of each row; negative means none. None (row i has slot i) only in the public
            function; kernels always get int64 slots.
    """

    z: Annotated[Tensor, "b D"]
    x: Annotated[Tensor, "b X"]
    B: Annotated[Tensor, "b X"]
    C: Annotated[Tensor, "b D"]
    dt: Annotated[Tensor, "b D"]
    A: Annotated[Tensor, "D N"]
    D: Annotated[Tensor, "D"]
    conv_weight: Annotated[Tensor, "D K"]
    conv_bias: Annotated[Tensor, "D"]
    conv_state: Annotated[Tensor, "S X K-1"]
    ssm_state: Annotated[Tensor, "S D N: float32"]
    slots: Annotated[Tensor, "b: int or None"]


class PrefillInputs(NamedTuple):
    """The tensors that `prefill_scan` takes: chunks of several prompts in a Mamba-1 layer, one after another.

    Fields without a description are as in `ScanInputs`, without the dimension b.

    Attributes:
        z, C, dt: [T, D].
        x, B: [T, X].
        A, D, conv_weight, conv_bias: [D, N], [D], [D, K], [D].
        conv_state: [S, X, K-1] last convolution inputs of each slot, oldest first. Updated in place.
        ssm_state: [S, D, N] float32, recurrent state of each slot. Updated in place.
        slots: [c] integers, the slot of each chunk; negative means none. Kernels get int64.
        cu_seqlens: [c+1] integers; chunk j is tokens cu_seqlens[j] to cu_seqlens[j + 1]. Kernels get int64.
        max_length: at least the length of the longest chunk.
    """

    z: Annotated[Tensor, "T D"]
    x: Annotated[Tensor, "T X"]
    B: Annotated[Tensor, "T X"]
    C: Annotated[Tensor, "T D"]
    dt: Annotated[Tensor, "T D"]
    A: Annotated[Tensor, "D N"]
    D: Annotated[Tensor, "D"]
    conv_weight: Annotated[Tensor, "D K"]
    conv_bias: Annotated[Tensor, "D"]
    conv_state: Annotated[Tensor, "S X K-1"]
    ssm_state: Annotated[Tensor, "S D N: float32"]
    slots: Annotated[Tensor, "c: int"]
    cu_seqlens: Annotated[Tensor, "c+1: int"]
    max_length: int


class SSDStepInputs(NamedTuple):
    """The tensors that `ssd_update` takes: one decode step of a Mamba-2 layer for b sequences.

    Attributes:
        xBC: [b, channels] x, B and C before the convolution; channels = G P + G N + heads N with G groups of x and B.
        dt: [b, heads] step sizes before softplus.
        A: [heads] decay rates, negative.
        D: [heads] skip weights.
        conv_weight: [channels, K] taps, the last for the current token.
        conv_bias: [channels].
        conv_state: [S, channels, K-1] last convolution inputs of each slot, oldest first. Updated in place.
        ssm_state: [S, heads, P, N] float32, recurrent state of each slot. Updated in place.
        slots: [b] integers, the slot of each row; negative means none. None (row i has slot i) only in the public
            function; kernels always get int64 slots.
    """

    xBC: Annotated[Tensor, "b channels"]
    dt: Annotated[Tensor, "b heads"]
    A: Annotated[Tensor, "heads"]
    D: Annotated[Tensor, "heads"]
    conv_weight: Annotated[Tensor, "channels K"]
    conv_bias: Annotated[Tensor, "channels"]
    conv_state: Annotated[Tensor, "S channels K-1"]
    ssm_state: Annotated[Tensor, "S heads P N: float32"]
    slots: Annotated[Tensor, "b: int or None"]


class SSDPrefillInputs(NamedTuple):
    """The tensors that `prefill_ssd` takes: chunks of several prompts in a Mamba-2 layer, one after another.

    Fields are as in `SSDStepInputs` and, from slots on, in `PrefillInputs`.

    Attributes:
        xBC: [T, channels].
        dt: [T, heads].
        A, D, conv_weight, conv_bias: [heads], [heads], [channels, K], [channels].
        conv_state: [S, channels, K-1]. Updated in place.
        ssm_state: [S, heads, P, N] float32. Updated in place.
        slots, cu_seqlens, max_length: [c], [c+1], a number.
    """

    xBC: Annotated[Tensor, "T channels"]
    dt: Annotated[Tensor, "T heads"]
    A: Annotated[Tensor, "heads"]
    D: Annotated[Tensor, "heads"]
    conv_weight: Annotated[Tensor, "channels K"]
    conv_bias: Annotated[Tensor, "channels"]
    conv_state: Annotated[Tensor, "S channels K-1"]
    ssm_state: Annotated[Tensor, "S heads P N: float32"]
    slots: Annotated[Tensor, "c: int"]
    cu_seqlens: Annotated[Tensor, "c+1: int"]
    max_length: int


# A step's registers (registers.py). Columns of the integers: the last token drawn, the number of tokens that the slot
# has seen, the number of tokens drawn, whether the sequence has ended, its random stream, its top_k, its stop tokens
# (-1 for none). Columns of the floats: temperature, top_p, min_p.
TOKEN, LENGTH, DRAWN, ENDED, STREAM, TOP_K, STOPS = range(7)
MAX_STOPS = 8  # stop tokens of a sequence that the device knows; a sequence with more of them ends a step later there
TEMPERATURE, TOP_P, MIN_P = range(3)
