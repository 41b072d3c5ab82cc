"""Folding what removed units leave behind: equal where it is constant, the mean elsewhere, and what cannot go."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import MissingStatsError, PlanError
from secateur.method import Method
from secateur.patterns import Channel
from secateur.scores import Coupled, NormScale
from secateur.structure import ShrinkReport, fold_constants_, load_pruned, save_pruned, shrink_
from secateur.targets import Target


def shrunk(model: nn.Module, example: Tensor, what: Any = None) -> tuple[nn.Module, nn.Module, ShrinkReport]:
    dense, small = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    return small, dense, shrink_(small, what or Target("channels", 0.5), example, align=1)


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1.0, 1.0)
            if module.track_running_stats:
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


class Slim(nn.Module):
    """Three normed convolutions, without bias but one, a depthwise one on the way, and a classifier."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.na = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.d, self.nd = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=padding, bias=False), nn.BatchNorm2d(8)
        self.c, self.nc = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        randomise(self)
        with torch.no_grad():
            for norm in (self.na, self.nd, self.nb, self.nc):
                norm.weight[::2] = 0.0  # what a penalty on scales ends in

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.nd(self.d(torch.relu(self.na(self.a(x))))))
        x = torch.relu(self.nb(self.b(x)))
        return self.head(torch.relu(self.nc(self.c(x))).mean((2, 3)))


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NEW = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SLIMMING = Method(target=Target("channels", 0.5), score=NormScale(), pattern=Channel())


def test_channels_without_scale_fold_exactly() -> None:
    """Into running means of norms that follow, and biases; on inputs that folding has not seen."""
    small, dense, report = shrunk(Slim(), X, SLIMMING)
    assert (small(NEW) - dense(NEW)).abs().max() > 0.02, "the standard bug: the shift is forgotten"
    done = fold_constants_(small, dense, report, [X[:1], X[1:]])
    torch.testing.assert_close(small(NEW), dense(NEW), rtol=1e-12, atol=1e-12)
    assert done.exact
    assert {layer.name: layer.into for layer in done.layers} == {
        "b": "nb.running_mean",
        "c": "c.bias",
        "head": "head.bias",
    }
    assert all(layer.constant == layer.removed == 4 for layer in done.layers)


def test_a_folded_model_is_saved_and_loaded_like_any_other(tmp_path: Any) -> None:
    small, dense, report = shrunk(Slim(), X, SLIMMING)
    fold_constants_(small, dense, report, [X])
    save_pruned(tmp_path, small, report)
    fresh = Slim()
    load_pruned(fresh, tmp_path)
    assert torch.equal(fresh.eval()(NEW), small(NEW))


def normed(model: Any, x: Tensor) -> Tensor:
    return model.nb(model.b(torch.relu(model.nd(model.d(torch.relu(model.na(model.a(x))))))))


def test_a_map_that_is_mostly_border_keeps_its_mean() -> None:
    small, dense, report = shrunk(Slim(padding=1), X, SLIMMING)
    rows = {layer.name: layer for layer in fold_constants_(small, dense, report, [X]).layers}
    assert rows["b"].uneven == 1.0, "16 of 25 positions are border"
    assert rows["c"].uneven == 0.0
    got, want = normed(small, NEW), normed(dense, NEW)[:, 1::2]
    torch.testing.assert_close(got.mean((2, 3)), want.mean((2, 3)), rtol=1e-12, atol=1e-12)
    assert (got - want).abs().max() > 1e-3


def test_a_large_padded_map_is_exact_but_for_its_border() -> None:
    big = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    small, dense, report = shrunk(Slim(padding=1), big, SLIMMING)
    done = fold_constants_(small, dense, report, [big])
    row = next(layer for layer in done.layers if layer.name == "b")
    assert row.uneven == pytest.approx(1 - 18**2 / 20**2)
    assert "meet their padding" in str(done)
    gap = (normed(small, big) - normed(dense, big)[:, 1::2]).abs().amax((0, 1))
    assert gap[1:-1, 1:-1].max() < 1e-12
    assert gap.max() > 1e-3


@pytest.mark.parametrize("sizes", [(4, 60), (64,)])
def test_means_are_kept_and_the_rest_is_the_lost_variance(sizes: tuple[int, ...]) -> None:
    """FLAP's identity: what is left of the removed inputs has mean zero and the covariance W Cov(x) W'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).double()
    x = torch.randn(64, 5, dtype=torch.float64) + 0.5
    small, dense, report = shrunk(model, x)
    done = fold_constants_(small, dense, report, x.split(sizes))
    left = (dense(x) - small(x)).detach()
    torch.testing.assert_close(left.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    gone = [i for i in range(8) if i not in report.plan.kept["2.weight"][1]]
    hidden, w = nn.functional.gelu(dense[0](x))[:, gone], dense[2].weight[:, gone]
    want = w @ torch.cov(hidden.T, correction=0) @ w.T
    torch.testing.assert_close(torch.cov(left.T, correction=0), want.detach())
    assert not done.exact
    assert done.layers[0].constant == 0
    assert "the mean was taken" in str(done)


class Readers(nn.Module):
    """Constant units, a quarter of sixteen, read in one way or another."""

    def __init__(self, reader: nn.Module, tail: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.norm = nn.Conv2d(2, 16, 1), nn.BatchNorm2d(16)
        self.read, self.tail = reader, tail or nn.Identity()
        randomise(self)
        with torch.no_grad():
            self.norm.weight[3::4] = 0.0
            self.norm.bias[3::4] = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.read(torch.relu(self.norm(self.make(x))))).sum((2, 3))


X2 = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
QUARTER = Method(target=Target("channels", 0.75), score=NormScale(), pattern=Channel(), include=("make*",))


@pytest.mark.parametrize(
    ("reader", "uneven"),
    [
        (nn.Conv2d(16, 4, 3, stride=2), False),
        (nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(16, 4, 3, padding="same", dilation=2), True),
        (nn.ConvTranspose2d(16, 4, 1), False),
        (nn.ConvTranspose2d(16, 4, 1, groups=2), False),
        (nn.ConvTranspose2d(16, 4, 3, stride=2), True),
        (nn.Conv2d(16, 8, 3, groups=4), False),
    ],
    ids=str,
)
def test_kinds_of_readers(reader: nn.Module, uneven: bool) -> None:
    model = Readers(reader)
    if getattr(reader, "groups", 1) == 4:  # the same place of all four groups is one unit
        with torch.no_grad():
            model.norm.weight.fill_(1.0)[3::4] = 0.0
    small, dense, report = shrunk(model, X2, QUARTER)
    before = (small(X2) - dense(X2)).abs().max()
    done = fold_constants_(small, dense, report, [X2])
    assert done.exact != uneven
    assert bool(done.layers[0].uneven) == uneven
    after = small(X2) - dense(X2)
    if not uneven:
        assert after.abs().max() < 1e-12 < before
    elif done.layers[0].uneven == 1.0:  # the mean over positions was folded, and the model adds positions up
        assert after.abs().max() < 1e-9 < before


def test_conv1d_of_language_models_stores_its_weight_the_other_way() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 3).double()), nn.Parameter(torch.randn(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Conv1D()).double()
    with torch.no_grad():
        model[0].weight[:4] = 0.0
    what = Method(target=Target("channels", 0.5), score=Coupled(over="out"), pattern=Channel())
    small, dense, report = shrunk(model, X.flatten(1)[:, :4], what)
    assert fold_constants_(small, dense, report, [X.flatten(1)[:, :4]]).exact
    torch.testing.assert_close(small(NEW.flatten(1)[:, :4]), dense(NEW.flatten(1)[:, :4]))


# What cannot be folded


class Twice(nn.Module):
    """A convolution whose output the norm gets, and a sum past it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        (nn.Conv2d(16, 4, 1, bias=False), "no bias, and no batch norm"),
        (nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(4)), "no bias, and no batch norm"),
        (nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4, track_running_stats=False)), "no bias, and"),
        (Twice(), "goes elsewhere, too"),
    ],
    ids=["nothing", "a norm behind a ReLU", "a norm of the batch", "a norm and a sum"],
)
def test_what_cannot_be_folded_is_listed_and_left_alone(reader: nn.Module, why: str) -> None:
    small, dense, report = shrunk(Readers(reader), X2, QUARTER)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    done = fold_constants_(small, dense, report, [X2])
    assert not done.exact
    assert why in done.layers[0].why
    assert "not folded: read" in str(done)
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


def test_statistics_over_removed_channels_are_never_called_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 2)).double()
    with torch.no_grad():
        model[1].weight[:8] = 0.0
    x = torch.randn(32, 4, dtype=torch.float64)
    what = Method(target=Target("channels", 0.5), score=NormScale(), pattern=Channel())
    small, dense, report = shrunk(model, x, what)
    done = fold_constants_(small, dense, report, [x])
    assert done.layers[0].exact, "the reader itself loses nothing"
    assert done.normalised == ("1",)
    assert not done.exact
    assert "behind 1 normalisations" in str(done)
    assert done.to_dict()["normalised"] == ["1"]


def test_a_layer_whose_input_has_other_channels_than_its_weight_is_listed() -> None:
    class Unshuffling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pixel_unshuffle(x, 2))

    small, dense, report = shrunk(Readers(Unshuffling(64, 4, 1)), X2, QUARTER)
    row = fold_constants_(small, dense, report, [X2]).layers[0]
    assert row.why == "it gets 16 channels for 64 columns, so which is which is not known"


def test_recurrent_readers_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.inner, self.head = nn.Linear(4, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.relu(self.make(x)))[0])

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    small, dense, report = shrunk(Net(), x)
    done = fold_constants_(small, dense, report, [x])
    rows = {layer.name: layer for layer in done.layers}
    assert "what a LSTM reads by it cannot be watched" in rows["inner.weight_ih_l0"].why
    assert rows["head"].into == "head.bias"


def test_models_that_do_not_belong_together_are_refused() -> None:
    small, dense, report = shrunk(Slim(), X, SLIMMING)
    with pytest.raises(MissingStatsError, match="no batches"):
        fold_constants_(small, dense, report, [])
    with pytest.raises(PlanError, match="pruned already"):
        fold_constants_(small, small, report, [X])
    with pytest.raises(PlanError, match="the dense one a"):
        fold_constants_(nn.Linear(2, 2), dense, report, [X])
    fold_constants_(small, dense, report, [X])
    with pytest.raises(PlanError, match=r"has changed since .* fold once"):
        fold_constants_(small, dense, report, [X])
