"""Constant and equal units: found, folded, cut out, and the function stays."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import GraphError, MissingStatsError, PlanError
from secateur.structure import fold_duplicates_

SEEN = torch.Generator().manual_seed(1)
X = torch.randn(64, 5, generator=SEEN, dtype=torch.float64)
NEW = 3.0 * torch.randn(64, 5, generator=SEEN, dtype=torch.float64)
IMAGES = torch.randn(8, 3, 9, 9, generator=SEEN, dtype=torch.float64)
OTHERS = 2.0 * torch.randn(8, 3, 9, 9, generator=SEEN, dtype=torch.float64)


@torch.no_grad()
def follow(layer: Any, unit: int, twin: int, scale: float = 1.0) -> None:
    """Make a unit of a linear layer or convolution a multiple of another, whatever comes in."""
    layer.weight[unit] = scale * layer.weight[twin]
    if layer.bias is not None:
        layer.bias[unit] = scale * layer.bias[twin]


def mlp(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), activation, nn.Linear(9, 6), activation, nn.Linear(6, 3)).double()


def unchanged(model: nn.Module, dense: nn.Module, *inputs: Tensor) -> None:
    for x in inputs:
        torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)


def test_duplicates_opposites_and_constants() -> None:
    """The unit rules of 1988, on data that folding has not seen too."""
    model = mlp(nn.Tanh())
    follow(model[0], 3, 1)
    follow(model[0], 4, 1, -1.0)  # tanh is odd: the opposite
    follow(model[0], 7, 6, -1.0)
    with torch.no_grad():
        model[0].weight[5] = 0.0  # tanh(bias), whatever comes in
        model[2].weight[0] = 0.0
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [X[:40], X[40:]])
    assert [(u.group, u.unit, u.twin, u.kind) for u in report.units] == [
        ("0", 3, 1, "duplicate"),
        ("0", 4, 1, "opposite"),
        ("0", 5, None, "constant"),
        ("0", 7, 6, "opposite"),
        ("2", 0, None, "constant"),
    ]
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (5, 5, 5)
    unchanged(model, dense, X, NEW)
    assert report.difference < 1e-12
    assert report.shrunk is not None
    assert report.shrunk.proof.equal
    assert "3 duplicate" not in str(report)
    assert "5 units folded" in str(report)


def test_affine_relations_between_units() -> None:
    """a = 2 b and, behind linear units, a = -0.5 b + c: the constant goes into the reader's bias."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 3)).double()
    follow(model[0], 1, 0, 2.0)
    follow(model[0], 4, 3, -0.5)
    with torch.no_grad():
        model[0].bias[4] += 0.7
    dense = copy.deepcopy(model)
    units = fold_duplicates_(model, [X]).units
    # The width exceeds the inputs' five dimensions by none once these are gone, so that nothing else is dependent.
    assert [(u.unit, u.twin, u.kind) for u in units] == [(1, 0, "scaled"), (4, 3, "scaled")]
    assert units[0].scale == pytest.approx(2.0)
    assert units[1].scale == pytest.approx(-0.5)
    unchanged(model, dense, X, NEW)


def test_every_reader_has_a_relation_of_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            u = self.make(x)
            return self.a(torch.relu(u)) + self.b(u.abs())

    model = Two().double()
    follow(model.make, 2, 1)
    follow(model.make, 4, 0, -1.0)  # |u| is the same, relu(u) is not
    dense = copy.deepcopy(model)
    assert [(u.unit, u.twin) for u in fold_duplicates_(model, [X]).units] == [(2, 1)]
    unchanged(model, dense, X, NEW)


class Conv(nn.Module):
    """Two convolutions with a batch norm and a pooling between, and a linear layer that reads every position."""

    def __init__(self, padding: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.na = nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 5, 3, padding=padding, bias=bias), nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * (7 - 2 + 2 * padding) ** 2, 3)
        for norm in (self.na, self.nb):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.1, 0.5)
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.na(self.a(x)))
        return self.head(torch.relu(self.nb(self.b(x))).flatten(1))


def same_norm(norm: Any, unit: int, twin: int) -> None:
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[unit] = tensor[twin]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_with_norms_between(padding: int, bias: bool) -> None:
    model = Conv(padding, bias).double().eval()
    follow(model.a, 4, 2)
    same_norm(model.na, 4, 2)
    follow(model.b, 3, 0)
    same_norm(model.nb, 3, 0)
    with torch.no_grad():  # a constant of relu(0.4), of which the padding of the next layer knows nothing
        model.na.weight[1] = 0.0
        model.na.bias[1] = 0.4
        model.na.weight[5] = 0.0
        model.na.bias[5] = -0.4  # relu makes this zero, which any padding takes
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [IMAGES])
    got = {(u.group, u.unit, u.twin) for u in report.units}
    assert got == {("a", 4, 2), ("a", 5, None), ("b", 3, 0)} | ({("a", 1, None)} if not padding else set())
    if padding:
        assert "zero padding" in report.refused["b"]
    unchanged(model, dense, IMAGES, OTHERS)


def test_tolerance_takes_what_is_nearly_equal() -> None:
    model = mlp(nn.Tanh())
    follow(model[0], 3, 1)
    with torch.no_grad():
        model[0].weight[3, 0] += 1e-4
    dense = copy.deepcopy(model)
    assert fold_duplicates_(model, [X]).units == ()
    assert torch.equal(model[0].weight, dense[0].weight)
    report = fold_duplicates_(model, [X], tolerance=0.01)
    assert [(u.unit, u.twin) for u in report.units] == [(3, 1)]
    assert 1e-8 < report.difference < 1e-2
    assert (model(X) - dense(X)).abs().max().item() < 1e-3


def test_the_nearest_of_several_is_the_twin() -> None:
    model = mlp(nn.Tanh())
    follow(model[0], 3, 1)
    with torch.no_grad():
        model[0].weight[3, 0] += 1e-3
    follow(model[0], 5, 3)
    assert [(u.unit, u.twin) for u in fold_duplicates_(model, [X]).units] == [(5, 3)]


def test_one_unit_stays_where_all_are_constant() -> None:
    model = mlp(nn.Tanh())
    with torch.no_grad():
        model[0].weight.zero_()
    dense = copy.deepcopy(model)
    fold_duplicates_(model, [X])
    assert model[0].out_features == 1
    unchanged(model, dense, X, NEW)


def test_in_single_precision_and_with_an_optimizer() -> None:
    model = mlp(nn.Tanh()).float()
    follow(model[0], 3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(X.float()).sum().backward()
    optimizer.step()
    follow(model[0], 3, 1)
    dense = copy.deepcopy(model)
    assert [(u.unit, u.kind) for u in fold_duplicates_(model, [X.float()], optimizer=optimizer).units] == [
        (3, "duplicate")
    ]
    torch.testing.assert_close(model(NEW.float()), dense(NEW.float()), rtol=1e-4, atol=1e-5)
    optimizer.zero_grad()
    model(X.float()).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 5)


def test_what_looks_at_units_otherwise_is_left_alone_by_name() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.norm, self.read = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.norm(self.make(x)))

    model = Normed().double()
    follow(model.make, 2, 1)
    before = copy.deepcopy(model.state_dict())
    report = fold_duplicates_(model, [X])
    assert report.units == ()
    assert "norm (LayerNorm) takes statistics over the units" in report.refused["make"]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            u = torch.tanh(self.make(x))
            return self.a(u) + self.b(u)

    tied = Tied().double()
    follow(tied.make, 2, 1)
    assert "shares its weight with a.weight, b.weight" in str(fold_duplicates_(tied, [X]).refused)


class Seen(nn.Module):
    """A layer of which another function than a reader looks at the units, and one of which none does."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read, self.other, self.end = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(5, 8), nn.Linear(8, 2)
        self.look = look

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.tanh(self.make(x))
        return 1e8 * (self.end(torch.tanh(self.other(x))) + self.read(u)), self.read(self.look(u))


@pytest.mark.parametrize(
    "look",
    [
        lambda u: u - u.mean(1, keepdim=True),
        lambda u: torch.nn.functional.layer_norm(u, u.shape[1:]),  # no weight that would tell of it
    ],
    ids=["mean", "normalisation without weights"],
)
def test_a_group_without_which_the_outputs_move_is_left_alone(look: Callable[[Tensor], Tensor]) -> None:
    """What moves is a billionth of another output, and whole on its own scale."""
    model = Seen(look).double()
    follow(model.make, 2, 1)
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [X])
    assert report.units == ()
    assert "the outputs move by" in report.refused["make"]
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in model.state_dict().items())
    follow(model.other, 7, 3)
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [X])
    assert [(u.group, u.unit, u.twin) for u in report.units] == [("other", 7, 3)]
    assert "the outputs move by" in report.refused["make"]
    for got, want in zip(model(NEW), dense(NEW), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.ReLU()])
def test_narrow_dtypes_hide_no_difference_and_make_none(activation: nn.Module, dtype: torch.dtype) -> None:
    """Nothing is constant or equal for lack of digits, and the figure is that of the weights as they were rounded."""
    x = X.to(dtype)
    assert fold_duplicates_(mlp(activation).to(dtype), [x]).units == ()
    model = mlp(activation).to(dtype)
    follow(model[0], 3, 1)
    with torch.no_grad():
        model[0].weight[5] = 0.0
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [x])
    assert [(u.unit, u.twin) for u in report.units] == [(3, 1), (5, None)]
    want, got = dense.double()(x.double()), model.double()(x.double())
    assert report.difference == pytest.approx(((want - got).abs().max() / want.abs().max()).item(), rel=1e-6)
    assert 1e-10 < report.difference < 2 * torch.finfo(dtype).eps


def test_a_bias_that_would_overflow_is_no_place_for_a_constant() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).half()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 6e4
        model[2].weight[:, 2], model[2].bias[:] = 1.0, 7e3
        model[2].weight[0, 2] = -1.0
    report = fold_duplicates_(model, [X.half()])
    assert report.units == ()
    assert "2.bias would not be finite in torch.float16" in report.refused["0"]


def test_what_a_forward_counts_and_casts() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.make, self.read, self.calls = nn.Linear(5, 6), nn.Linear(6, 2), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.read(torch.tanh(self.make(x.float())).float())  # to a dtype that the proof is not in

    model = Counting()
    assert fold_duplicates_(model, [X.float()]).units == ()
    follow(model.make, 2, 1)
    assert [u.unit for u in fold_duplicates_(model, [((X.float(),), {})]).units] == [2]
    assert (model.calls, model.seen.item()) == (0, 0.0)


def test_a_bias_that_is_shared_takes_up_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[4].bias = model[2].bias
    follow(model[0], 4, 3)
    with torch.no_grad():
        model[0].weight[1] = 0.0
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [X])
    assert [(u.unit, u.twin) for u in report.units] == [(4, 3)]
    assert "2.bias and 4.bias are one tensor" in report.refused["2"]
    unchanged(model, dense, X, NEW)


def test_zero_padding_of_any_batch_counts() -> None:
    """A map of one position has no border, and the next batch has."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    ).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 0.5
    dense = copy.deepcopy(model)
    report = fold_duplicates_(model, [IMAGES[:, :, :1, :1], IMAGES])
    assert (report.units, list(report.refused)) == ((), ["2"])
    assert [u.kind for u in fold_duplicates_(model, [IMAGES[:, :, :1, :1]]).units] == ["constant"]
    unchanged(model, dense, OTHERS[:, :, :1, :1])


def test_bad_input() -> None:
    model = mlp(nn.Tanh())
    with pytest.raises(MissingStatsError, match="no batches"):
        fold_duplicates_(model, [])
    with pytest.raises(MissingStatsError, match=r"tolerance.*-1"):
        fold_duplicates_(model, [X], tolerance=-1)
    with pytest.raises(MissingStatsError, match="NaN or infinite"):
        fold_duplicates_(model, [X * torch.nan])
    with pytest.raises(MissingStatsError, match="all batches were empty"):
        fold_duplicates_(model, [X[:0]])
    with pytest.raises(MissingStatsError, match="got one Tensor"):
        fold_duplicates_(model, X)
    with pytest.raises(MissingStatsError, match="no batches"):
        fold_duplicates_(model, iter(()))
    with pytest.raises(MissingStatsError, match=r"tolerance.*True"):
        fold_duplicates_(model, [X], tolerance=True)
    with pytest.raises(GraphError, match=r"forward fails.*shape \(64, 4\)"):
        fold_duplicates_(model, [X, X[:, :4]])
    follow(model[0], 3, 1)
    with pytest.raises(PlanError, match="none of this model's parameters"):
        fold_duplicates_(model, [X], optimizer=torch.optim.SGD(mlp(nn.Tanh()).parameters(), lr=0.1))
    dense = mlp(nn.Tanh())
    follow(dense[0], 3, 1)
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in model.state_dict().items())
    assert [u.unit for u in fold_duplicates_(model, [X[:0], X]).units] == [3]


def test_a_failing_cut_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.structure import duplicates

    real, calls = duplicates.shrink_, []

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise GraphError("no")
        return real(*args, **kwargs)

    monkeypatch.setattr(duplicates, "shrink_", second_fails)
    model = mlp(nn.Tanh())
    follow(model[0], 3, 1)
    with torch.no_grad():
        model[0].weight[5] = 0.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match="no"):
        fold_duplicates_(model, [X])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
