"""Inputs that the proof makes up."""

from __future__ import annotations

import pytest
import torch

from secateur.graph.examples import Example, made_up


@pytest.mark.parametrize(("batch", "sizes"), [(1, [2, 1]), (2, [1, 2]), (3, [2, 3]), (4, [2, 3, 4]), (64, [2, 63, 64])])
def test_another_number_of_samples_comes_first(batch: int, sizes: list[int]) -> None:
    tried = made_up(Example((torch.randn(batch, 3),), {"mask": torch.ones(batch, 5)}))
    assert [len(e.args[0]) for e in tried] == sizes
    assert [len(e.kwargs["mask"]) for e in tried] == sizes


def test_inputs_without_one_batch_dimension_keep_their_shapes() -> None:
    tried = made_up(Example((torch.randn(4, 3), torch.randn(7)), {}))
    assert [(e.args[0].shape, e.args[1].shape) for e in tried] == [((4, 3), (7,))]
    assert [e.args[0].shape for e in made_up(Example((torch.randn(0, 3),), {}))] == [(0, 3)]
