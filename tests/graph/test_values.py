"""What a proof computes with: memory that is used again, values that tell indices apart, the pruned model's own."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import GraphError
from secateur.graph import changes
from secateur.graph.values import Pool, Probe, is_constant


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    pool = Pool()
    large, small = torch.randn(300, 400), torch.randn(200, 300)
    first = pool.double(large)
    view = first.t()[5:]
    del first
    second = pool.double(small)
    assert second.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert torch.equal(view, large.double().t()[5:])
    place = view.untyped_storage().data_ptr()
    del view
    third = pool.double(large + 1)
    assert third.untyped_storage().data_ptr() == place
    assert torch.equal(third, (large + 1).double())
    assert torch.equal(second, small.double())


def test_a_copy_in_the_pool_can_be_written_to() -> None:
    pool, weight = Pool(), torch.randn(300, 400, dtype=torch.float64)
    before = weight.clone()
    pool.double(weight).zero_()
    assert torch.equal(weight, before)


def test_only_tensors_that_are_equal_everywhere_are_constant() -> None:
    late = torch.zeros(1000)
    late[-1] = 1.0
    assert is_constant(torch.full((10, 100), 0.3))
    assert not is_constant(late)
    assert not is_constant(torch.ones(1))
    assert not is_constant(torch.full((3,), float("nan")))


@pytest.mark.parametrize("weight", [torch.randn(6, 5), torch.ones(6, 5)])
def test_both_models_get_the_same_values(weight: Tensor) -> None:
    kept = {0: np.array([0, 2, 5]), 1: np.array([1, 4])}
    probe = Probe([weight])
    ours = probe.small(0, changes.slice_tensor(weight, kept), kept)
    assert torch.equal(ours, changes.slice_tensor(probe.value(0), kept))
    assert len(probe.value(0).unique()) == 30


def test_values_of_a_constant_are_not_changed_by_writing_to_them() -> None:
    probe = Probe([torch.ones(6)])
    first = probe.value(0).clone()
    probe.value(0).zero_()
    assert torch.equal(probe.value(0), first)


def test_a_wrong_cut_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = changes.slice_tensor
    monkeypatch.setattr(changes, "slice_tensor", lambda tensor, kept: right(tensor, kept).roll(1, 0))
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GraphError):
        secateur.shrink_(model, secateur.Target("macs", 0.5), torch.randn(2, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embeddings_are_compared() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(50, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.words(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    dense, small, ids = Words(), Words(), torch.randint(0, 50, (3, 7))
    small.load_state_dict(dense.state_dict())
    report = secateur.shrink_(small, secateur.Target("macs", 0.5), ids)
    assert small.words.embedding_dim == 16
    assert secateur.verify(dense, small, ids, report).equal
    with torch.no_grad():
        small.words.weight[ids[0, 0], 3] += 1e-3
    assert not secateur.verify(dense, small, ids, report).equal


def test_nothing_is_left_for_the_garbage_collector() -> None:
    model, x = net(), torch.randn(2, 8)
    secateur.make_plan(model, secateur.Target("macs", 0.5), x)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        secateur.make_plan(model, secateur.Target("macs", 0.5), x)
        assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) <= before
    finally:
        gc.enable()


class Alike(nn.Module):
    """A norm over values that are nearly alike: in training mode it enlarges the last digits of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 512), nn.Linear(512, 8)
        self.norm, self.head = nn.BatchNorm1d(8, eps=1e-30), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.b(torch.relu(self.a(x)))))


class Biased(Alike):
    """The same, with a share of the width that only training mode sees."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (4e-3 / self.a.weight.shape[0] if self.training else 0.0)


def test_rounding_that_training_mode_enlarges_is_no_difference() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, dtype=torch.float64) * (1 + 1e-8 * torch.randn(6, 1, dtype=torch.float64))
    for kind, prunable in ((Alike, True), (Biased, False)):
        net = kind().double()
        try:
            report = secateur.shrink_(net, secateur.Target("channels", 0.5), x)
        except GraphError:
            assert not prunable
            assert net.a.out_features == 512
            continue
        assert prunable
        assert report.proof.equal
        assert net.a.out_features < 512
