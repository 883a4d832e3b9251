"""Peers that run on GPUs only are handed the right layouts: stand-ins with their signatures give the same numbers."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_rms_close

from m1.bench import peers
from m1.bench.scan import ScanCase, forward_backward, own_scan
from m1.bench.state import start_own

D, X, N = 64, 32, 16


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def mamba_ssm():
    """A stand-in made of transformers' functions: its scan group by group, and Mamba-2's update, heads as groups."""
    [library], _ = peers.mamba_libraries("cpu")

    def scan(u, delta, A, B, C, D, z, delta_softplus):
        G = B.shape[1]
        groups = [t.unflatten(dim, (G, -1)).unbind(dim) for t, dim in ((u, 1), (delta, 1), (A, 0), (D, 0), (z, 1))]
        ys = [
            library.scan(u, delta, A, B[:, g], C[:, g], D, z=z, delta_softplus=delta_softplus)
            for g, (u, delta, A, D, z) in enumerate(zip(*groups, strict=True))
        ]
        return torch.cat(ys, dim=1)

    return library._replace(grouped=True, scan=scan)


def parameters():
    A = -torch.rand(D, N, generator=torch.Generator().manual_seed(1)) * 4 - 0.1
    return {"A": A, "D": normal(D), "conv_weight": normal(D, 4), "conv_bias": normal(D)}


def test_scan_with_groups_of_their_own(mamba_ssm):
    tokens = {name: normal(2, 7, width) for name, width in zip("zxBC", (D, X, X, D), strict=True)}
    case = ScanCase(tokens | {"dt": normal(2, 7, D)} | parameters(), normal(2, 7, D).flip(0))
    ours = forward_backward(own_scan("reference", case))
    theirs = forward_backward(peers.mamba_scan(mamba_ssm, *case))
    names = ["y", "dA", "dD", "dconv_weight", "dconv_bias"]
    assert_rms_close([theirs[name] for name in names], [ours[name] for name in names], 1e-5, names)
    assert_rms_close([theirs["ddt_channels"].mT, theirs["dz_channels"].mT], [ours["ddt"], ours["dz"]], 1e-5)


def test_decode_step_with_groups_of_their_own(mamba_ssm):
    tokens = {name: normal(3, width) for name, width in zip("zxBC", (D, X, X, D), strict=True)}
    states = {"conv_state": normal(3, X, 3), "ssm_state": normal(3, D, N), "slots": torch.arange(3)}
    layer = tokens | {"dt": normal(3, D).flip(0)} | parameters() | states
    ours, theirs = start_own(layer, "reference"), peers.mamba_step(mamba_ssm, layer)
    for _ in range(5):  # until the convolution has left its first window behind
        assert_rms_close(theirs().values(), ours().values(), 1e-5)


def test_flash_attention_reads_tokens_first(monkeypatch):
    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens):
        assert k_cache.is_contiguous() and cache_seqlens.dtype == torch.int32 and cache_seqlens.tolist() == [9, 9]
        q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    module = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache, __version__="2.0")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found, skipped = peers.attention_peers("cuda", "bfloat16")
    assert "flash-attn 2.0" in found and not skipped
    cache = {"k_cache": normal(2, 2, 9, 16), "v_cache": normal(2, 2, 9, 16).flip(0)}
    layer = {"q": normal(2, 6, 16), **cache, "lengths": torch.tensor([9, 9])}
    torch.testing.assert_close(found["flash-attn 2.0"](layer)()["y"], peers.sdpa_step(layer)()["y"])


def test_missing_peers_are_a_line_each(monkeypatch):
    for module in ("mamba_ssm", "causal_conv1d", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    found, skipped = peers.mamba_libraries("cuda")
    assert [library.name.split()[0] for library in found] == ["transformers"]
    assert skipped == ["mamba-ssm: needs mamba_ssm and causal_conv1d, built for this torch"]
    assert peers.attention_peers("cuda", "bfloat16")[1] == ["flash-attn: needs flash_attn, built for this torch"]
    monkeypatch.setitem(sys.modules, "transformers.models.mamba.modeling_mamba", None)
    assert peers.mamba_libraries("cpu")[1][0].startswith("transformers")
