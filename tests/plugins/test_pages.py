"""Which Mamba layers share pages of states in vLLM."""

import pytest
import torch

from m1.model.cache_layout import layer_layout
from m1.model.configuration import ATTENTION, MAMBA, M1Config
from m1.plugins.vllm.pages import LONGEST_BLOCK, aligned_bytes, shared_pages

M1_3B = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}


def pages_of(attention, layers, mixer="mamba", **sizes):
    kinds = [ATTENTION if i in attention else MAMBA for i in range(layers)]
    config = M1Config(**(M1_3B | sizes), num_hidden_layers=layers, layer_types=kinds, mixer=mixer)
    layout = layer_layout(config, MAMBA, 0, torch.bfloat16)
    pages = shared_pages(config, layout, torch.bfloat16)
    assert [i for layers_of_page in pages for i in layers_of_page] == [i for i in range(layers) if i not in attention]
    token = 2 * config.num_key_value_heads * config.head_dim * 2
    return list(map(len, pages)), max(map(len, pages)) * sum(map(aligned_bytes, layout)) / token


def test_there_are_as_many_kinds_of_pages_as_attention_layers():
    found, block = pages_of((3, 8, 13, 18, 23, 27), 28)
    assert found == [3, 4, 4, 3, 4, 4] and 192 < block <= 208


@pytest.mark.parametrize(
    ("attention", "layers", "pages"), [((), 3, 3), ((0, 1), 4, 2), ((0, 1, 2), 4, 1), ((0, 1), 5, 2), ((3,), 4, 1)]
)
def test_few_layers(attention, layers, pages):
    """Without attention, or with as much of it, there is one group anyway."""
    assert len(pages_of(attention, layers)[0]) == pages


def test_a_page_is_no_longer_than_a_block_may_be():
    """Mamba-2's states are eight times as large: a page of four would be a block of 1,568 tokens."""
    found, block = pages_of((3, 8, 13, 18, 23, 27), 28, "mamba2")
    assert found == [1] * 22 and block <= LONGEST_BLOCK
    found, block = pages_of((3,), 28)
    assert max(found) > 1 and block <= LONGEST_BLOCK
