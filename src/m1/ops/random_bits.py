"""Counter-based random numbers: SplitMix64 (Steele, Lea, Flood 2014), which has no state and runs on any device."""

from torch import Tensor


def signed(bits: int) -> int:
    """A 64-bit number, 0 to 2^64 - 1, as the int64 with the same bits."""
    return bits - 2**64 if bits >= 2**63 else bits


UNSIGNED_STEP, UNSIGNED_FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
STEP, FACTORS = signed(UNSIGNED_STEP), tuple(map(signed, UNSIGNED_FACTORS))


def fold_in(seed: int, i: int) -> int:
    """Derives the i-th child seed of a seed, e.g. that of a request's i-th sequence."""
    return _mixed(_mixed(seed % 2**64) + i)


def uniforms(streams: Tensor, index: Tensor) -> Tensor:
    """Element `index` of each stream: [b] float64 in [0, 1), for int64 tensors [b]. `fold_in`'s function of bits."""
    x = streams + (index + 1) * STEP
    x = (x ^ _shifted(x, 30)) * FACTORS[0]
    x = (x ^ _shifted(x, 27)) * FACTORS[1]
    return _shifted(x ^ _shifted(x, 31), 11).double() * 2.0**-53


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted to the right, filled with zeros. torch fills with the sign."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _mixed(x: int) -> int:
    """SplitMix64's finalizer on 64 bits."""
    x = (x + UNSIGNED_STEP) % 2**64
    x = (x ^ (x >> 30)) * UNSIGNED_FACTORS[0] % 2**64
    x = (x ^ (x >> 27)) * UNSIGNED_FACTORS[1] % 2**64
    return x ^ (x >> 31)
