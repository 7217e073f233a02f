"""Which layers of a deep chain are merged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posada.host.merging import SMALL, layers_to_keep

GIB = 1 << 30


def test_small_layers_are_merged_onto_the_base() -> None:
    assert layers_to_keep([GIB, *[1 << 20] * 16]) == 1


def test_a_large_layer_is_not_copied_for_a_few_small_ones() -> None:
    assert layers_to_keep([GIB, GIB, *[1 << 16] * 16]) == 2


def test_it_is_once_as_much_lies_above_it() -> None:
    assert layers_to_keep([GIB, GIB, *[1 << 26] * 16]) == 1


@given(st.lists(st.integers(0, 1 << 44), min_size=2, max_size=64))
def test_what_stays_is_ever_larger_so_the_depth_is_logarithmic(sizes: list[int]) -> None:
    keep = layers_to_keep(sizes)
    assert 1 <= keep < len(sizes)
    if keep > 1:
        assert sizes[keep - 1] > 2 * sum(sizes[keep:]) + SMALL


@given(st.lists(st.integers(0, 1 << 28), min_size=1, max_size=400))
def test_the_work_is_bounded_by_what_was_written(writes: list[int]) -> None:
    """Each byte is copied at most once for each doubling of what lies above it."""
    chain, copied = [GIB], 0
    for size in writes:
        chain.append(size)
        if len(chain) > 16:
            keep = layers_to_keep(chain)
            copied += sum(chain[keep:-1])
            chain = [*chain[:keep], sum(chain[keep:])]
        assert len(chain) < 40
    rounds = 2 + len(writes) // 15
    assert copied <= sum(writes) * min(rounds, 20)
