"""Hard-concrete gates against Monte Carlo and hand-made formulas, and networks that really become smaller."""

import math

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import PatternError, RecipeError, SecateurWarning, UnknownNameError
from secateur.prunable import find_prunable
from secateur.training import L0, Reparametrised
from secateur.training.l0 import chance_open, final_gate, hard_concrete
from secateur.types import Moment, Weight

LOG_ALPHAS = (-2.0, -0.5, 0.0, 1.0, 3.0)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_frequencies_of_gates_are_the_closed_forms(log_alpha: float) -> None:
    u = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = hard_concrete(torch.tensor(log_alpha, dtype=torch.float64), u)
    positive, one = float((z > 0).double().mean()), float((z == 1).double().mean())
    # By hand: s-bar > 0 where sigmoid(.) > 1/12, and s-bar > 1 where it is > 11/12.
    assert positive == pytest.approx(logistic(log_alpha + 2 / 3 * math.log(11)), abs=1e-3)
    assert one == pytest.approx(1 - logistic(2 / 3 * math.log(11) - log_alpha), abs=1e-3)
    assert float(chance_open(torch.tensor(log_alpha))) == pytest.approx(positive, abs=1e-3)
    if log_alpha == 0.0:
        assert float(z.mean()) == pytest.approx(0.5, abs=1e-3)
        assert 1 - positive == pytest.approx(one, abs=2e-3)


def test_what_training_draws_has_the_same_frequencies() -> None:
    """The whole way: weights of one behind 500,000 gates of their own, in float32, through the module."""
    layer = nn.Linear(1000, 500, bias=False)
    nn.init.ones_(layer.weight)
    wrapped = Reparametrised(layer, L0(group="weight"), seed=3)
    wrapped.latents["weight"].data.fill_(-0.5)
    made = wrapped.parametrisation.weights(wrapped._moment(), torch.Generator().manual_seed(0))["weight"]
    assert float((made > 0).double().mean()) == pytest.approx(logistic(-0.5 + 2 / 3 * math.log(11)), abs=2e-3)


def test_expected_l0_and_its_gradient_are_the_closed_form() -> None:
    log_alpha = torch.tensor(LOG_ALPHAS, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(5, 7, dtype=torch.float64)
    layouts = {"w": Weight("w", (5, 7), bias="b")}
    at = Moment({"w": weight, "b": torch.zeros(5).double()}, {"w": log_alpha}, layouts)
    penalty = L0(0.3, group="output").penalty(at)
    penalty.backward()
    chances = [logistic(a + 2 / 3 * math.log(11)) for a in LOG_ALPHAS]
    assert float(penalty.detach()) == pytest.approx(0.3 * 8 * sum(chances), rel=1e-12)  # a row and its bias
    assert log_alpha.grad is not None
    assert log_alpha.grad.tolist() == pytest.approx([0.3 * 8 * p * (1 - p) for p in chances], rel=1e-12)


@pytest.mark.parametrize(
    ("group", "shape", "groups", "size"),
    [
        ("weight", (4, 6), 1, 1),
        ("input", (4, 6), 1, 4),
        ("output", (4, 6), 1, 7),
        ("unit", (4, 6), 1, 4),
        ("unit", (4, 6, 3, 3), 1, 55),
        ("input", (4, 6, 3, 3), 1, 36),
        ("output", (4, 3, 3, 3), 2, 28),
    ],
)
def test_group_sizes(group: str, shape: tuple[int, ...], groups: int, size: int) -> None:
    """At log alpha = inf every gate is open: the penalty per gate is the group's size, and the L2 norm is whole."""
    layouts = {"w": Weight("w", shape, groups=groups, bias="b")}
    weights = {"w": torch.randn(shape), "b": torch.randn(shape[0])}
    part = L0(1.0, group=group)  # type: ignore[arg-type]
    part.check(layouts["w"])
    latents = part.start(weights, layouts, torch.Generator().manual_seed(0))
    open_ = {"w": torch.full_like(latents["w"], 50.0)}
    assert float(part.penalty(Moment(weights, open_, layouts))) / open_["w"].numel() == pytest.approx(size)
    squared = L0(0.0, group=group, l2=2.0).penalty(Moment(weights, open_, layouts))  # type: ignore[arg-type]
    own = weights["w"].square().sum() + (weights["b"].square().sum() if size in (7, 55, 28) else 0.0)
    assert float(squared) == pytest.approx(float(own), rel=1e-5)
    assert float(latents["w"].std()) < 0.05
    assert float(latents["w"].mean()) == pytest.approx(0.0, abs=0.05)


def test_start_follows_the_dropped_share() -> None:
    layouts = {"w": Weight("w", (300, 300))}
    started = L0(group="weight", dropped=0.2).start({"w": torch.zeros(300, 300)}, layouts, torch.Generator())["w"]
    assert float(started.mean()) == pytest.approx(math.log(4), abs=1e-3)
    assert float(started.std()) == pytest.approx(0.01, rel=0.05)


def test_gates_of_the_finished_network() -> None:
    edge = math.log(1 / 11)
    at = torch.tensor([edge - 1e-9, edge + 1e-9, 0.0, -edge - 1e-9, -edge + 1e-9], dtype=torch.float64)
    gates = final_gate(at)
    assert gates[0] == 0.0 < gates[1] < 1e-8
    assert float(gates[2]) == pytest.approx(0.5)
    assert 1 - 1e-8 < gates[3] < 1.0 == gates[4]


def test_log_alpha_is_held_after_each_step() -> None:
    wrapped = Reparametrised(nn.Linear(3, 2), L0())
    wrapped.latents["weight"].data.copy_(torch.tensor([-9.0, 0.5, 9.0]))
    wrapped.step()
    limit = math.log(100)
    assert wrapped.latents["weight"].tolist() == pytest.approx([-limit, 0.5, limit])
    assert chance_open(wrapped.latents["weight"]).tolist() == pytest.approx([0.047, 0.8916, 0.998], abs=1e-3)


def test_gates_act_on_columns_and_on_rows_with_their_bias() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    inputs = Reparametrised(layer, L0(group="input")).eval()
    inputs.latents["weight"].data.copy_(torch.tensor([-3.0, 0.0, 3.0]))
    torch.testing.assert_close(inputs(x), layer(x * torch.tensor([0.0, 0.5, 1.0])))
    outputs = Reparametrised(layer, L0(group="output")).eval()
    outputs.latents["weight"].data.copy_(torch.tensor([-3.0, 0.0]))
    torch.testing.assert_close(outputs(x), layer(x) * torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("transposed", [False, True])
def test_gates_of_convolutions_in_groups(transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, x = kind(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)
    wrapped = Reparametrised(layer, L0()).eval()
    gates = torch.tensor([-3.0, 0.0, 3.0, 0.0, -3.0, 3.0])
    wrapped.latents["weight"].data.copy_(gates)
    want = layer(x) * torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0, 1.0])[:, None, None]
    torch.testing.assert_close(wrapped(x), want)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )


def test_a_gate_on_a_norm_silences_the_unit_and_leaves_the_statistics_alone() -> None:
    x = torch.randn(16, 1, 8, 8)
    plain = convolutions()
    nn.init.uniform_(plain[1].bias, 0.5, 1.0)
    plain.train()
    wrapped = Reparametrised(convolutions(), L0(group="output"), exclude=["6"], example_inputs=x)
    wrapped.model.load_state_dict(plain.state_dict())
    wrapped.train()
    wrapped(x)
    plain(x)
    assert torch.equal(wrapped.model[1].running_mean, plain[1].running_mean)
    assert torch.equal(wrapped.model[1].running_var, plain[1].running_var)
    wrapped.latents["0/weight"].data[:4] = -3.0
    wrapped.eval()
    silenced = wrapped(x)
    finished = wrapped.finish_()
    assert not finished.masks["1.bias"][:4].any()
    assert torch.equal(wrapped.model[:2](x)[:, :4], torch.zeros(16, 4, 6, 6))
    torch.testing.assert_close(wrapped.model(x), silenced)
    report = secateur.shrink_(wrapped.model, finished.masks, x)
    assert report.proof.equal
    assert wrapped.model[0].out_channels == 4
    torch.testing.assert_close(wrapped.model(x), silenced)


def test_without_example_inputs_closed_gates_in_front_of_a_norm_still_cut_out() -> None:
    x = torch.randn(16, 1, 8, 8)
    wrapped = Reparametrised(convolutions(), L0(group="output"), exclude=["6"])
    wrapped.latents["0/weight"].data[:4] = -3.0
    wrapped.eval()
    finished = wrapped.finish_()
    assert finished.masks.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert secateur.shrink_(wrapped.model, finished.masks, x).proof.equal
    assert wrapped.model[0].out_channels == 4


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sets = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(sets.images, dtype=torch.float32) / 16, torch.tensor(sets.target, dtype=torch.int64)
    return x[:1347], y[:1347], x[1347:], y[1347:]


def learn(wrapped: Reparametrised, x: Tensor, y: Tensor, epochs: int) -> None:
    latents, own = list(wrapped.latents.parameters()), list(wrapped.model.parameters())
    optimizer = torch.optim.Adam([{"params": own, "lr": 2e-3}, {"params": latents, "lr": 2e-2}])
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(wrapped(x[rows]), y[rows]) + wrapped.penalty()).backward()
            optimizer.step()
            wrapped.step()
    wrapped.eval()


@pytest.mark.slow
def test_a_perceptron_on_digits_gets_smaller_and_stays_right() -> None:
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    wrapped = Reparametrised(model, L0(3e-5))
    learn(wrapped, x, y, 50)
    right = float((wrapped(test_x).argmax(1) == test_y).float().mean())
    gated = wrapped(test_x)
    finished = wrapped.finish_()
    assert torch.equal(model(test_x), gated)
    report = secateur.shrink_(model, finished.masks, test_x[:2])
    assert report.proof.equal
    torch.testing.assert_close(model(test_x), gated, rtol=1e-4, atol=1e-4)
    assert model[1].out_features < 100
    assert model[3].out_features < 62
    assert right > 0.88


@pytest.mark.slow
def test_a_convolutional_network_on_digits_gets_smaller_behind_its_batch_norm() -> None:
    x, y, test_x, test_y = (t.unsqueeze(1) if t.dim() == 3 else t for t in digits())
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    wrapped = Reparametrised(model, L0(8e-4, group="output"), exclude=["6"], example_inputs=x[:2])
    learn(wrapped, x, y, 20)
    right = float((wrapped(test_x).argmax(1) == test_y).float().mean())
    gated = wrapped(test_x)
    finished = wrapped.finish_()
    assert torch.equal(model(test_x), gated)
    report = secateur.shrink_(model, finished.masks, test_x[:2])
    assert report.proof.equal
    torch.testing.assert_close(model(test_x), gated, rtol=1e-4, atol=1e-4)
    assert model[2].out_channels == model[3].num_features < 13
    assert model[6].in_features == 16 * model[2].out_channels
    assert right > 0.88


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="strength must be a number of at least 0, got -1"):
        L0(-1)
    with pytest.raises(RecipeError, match="dropped must be a number above 0 and below 1"):
        L0(dropped=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'output'"):
        L0(group="outputs")  # type: ignore[arg-type]
    with pytest.raises(PatternError, match="in 2 groups"):
        Reparametrised(nn.Conv2d(4, 4, 3, groups=2), L0(group="input"))
    wrapped = Reparametrised(nn.Linear(3, 2), L0())
    wrapped.latents["weight"].data.fill_(-4.0)
    with pytest.warns(SecateurWarning, match="nothing is left of weight"):
        wrapped.finish_()


def test_prunable_layouts_are_what_the_gates_see() -> None:
    assert find_prunable(convolutions()).weights["0.weight"].bias == "0.bias"
