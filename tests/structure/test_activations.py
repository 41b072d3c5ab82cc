"""What layers read, and the scores of it: against gates, Jacobians and counts by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from secateur.errors import MissingStatsError, SecateurError
from secateur.graph.coupling import Coupling
from secateur.graph.examples import Example
from secateur.graph.trace import trace
from secateur.scores import ActivationStatistic, ActivationTaylor, Coupled, Lamp, Magnitude, Sensitivity
from secateur.stats.activations import INPUT_STATISTICS, collect_inputs
from secateur.structure.collect import unit_costs
from secateur.structure.readers import readers_of
from secateur.structure.scoring import unit_scores
from secateur.types import GroupScore


class Gated(nn.Module):
    """Units that a padded convolution and a linear layer read; gates on them, for numeric derivatives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make = nn.Conv2d(2, 5, 3, padding=1)
        self.conv, self.fc, self.head = nn.Conv2d(5, 4, 3, padding=1, stride=2), nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("gate", torch.ones(5))

    def units(self, x: Tensor) -> Tensor:
        return torch.relu(self.make(x)) * self.gate[:, None, None]

    def rest(self, a: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(a)).mean((2, 3)) + self.fc(a.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.units(x))


X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def coupling_of(model: nn.Module, x: Any) -> Coupling:
    return Coupling(trace(model, [Example(x if isinstance(x, tuple) else (x,), {})]))


def scores_of(
    model: nn.Module, score: GroupScore, batches: Any, example: Any = X, loss: Any = None
) -> dict[str, Tensor]:
    coupling = coupling_of(model, example)
    scores, silent = unit_scores(model, coupling, score, loss_fn=loss, batches=batches)
    return {g.name: torch.from_numpy(scores[g.ids]) for g in coupling.groups if g.name not in silent}


@pytest.fixture
def gated() -> Gated:
    return Gated().double().eval()


# Readers


class Zoo(nn.Module):
    """Every kind of reader: grouped, transposed, depthwise on the way, one-dimensional, flattened, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.twice, self.flat, self.line = nn.Conv2d(6, 6, 1), nn.Linear(6 * 4, 10), nn.Conv1d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.a(x))))))
        x = self.twice(torch.relu(self.twice(torch.relu(self.up(x)))))
        x = torch.relu(self.flat(nn.functional.adaptive_avg_pool2d(torch.relu(x), 2).flatten(1)))
        return self.line(x[:, :, None])


def test_readers_of_every_kind() -> None:
    model = Zoo().eval()
    coupling = coupling_of(model, torch.randn(2, 3, 4, 4))
    readers, unread = readers_of(model, coupling)
    assert not unread
    found = {name: {r.module: r.unit.tolist() for r in own} for name, own in readers.items()}
    assert found["a"] == {"grouped": [0, 1, 2, 3] * 2}, "the same places of both groups are one unit"
    assert found["grouped"] == {"up": [*range(6), *range(6)]}
    assert found["twice"] == {"twice": [*range(6)], "flat": [i // 4 for i in range(24)]}
    assert found["flat"] == {"line": [*range(10)]}


@pytest.mark.parametrize("kind", ["recurrent", "attention", "product"])
def test_other_readers_are_named_and_their_groups_left_whole(kind: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.head = nn.Linear(4, 16), nn.Linear(16, 2)
            self.inner: nn.Module = nn.Identity()
            if kind == "recurrent":
                self.inner = nn.LSTM(16, 16, batch_first=True)
            if kind == "attention":
                self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.make(x))
            if kind == "product":
                return self.head(x) + (x @ x.transpose(1, 2)).sum((1, 2))[:, None, None]
            return self.head(self.inner(x, *([x, x] if kind == "attention" else []))[0])

    model = Other().eval()
    readers, unread = readers_of(model, coupling_of(model, torch.randn(2, 3, 4)))
    assert "make" not in readers
    assert {"recurrent": "inner reads it", "attention": "inner reads it", "product": "the model itself reads it"}[
        kind
    ] in unread["make"]


# Statistics


def test_streamed_statistics_are_those_of_everything_at_once(gated: Gated) -> None:
    """Batches of unequal size, a large offset, and a reader of two dimensions beside one of four."""
    with torch.no_grad():
        gated.make.bias += 1000.0
    a = gated.units(X)
    got = collect_inputs(gated, ["conv", "fc"], lambda m, b, _: m(b), [X[:1], X[1:4], X[4:]], needs=INPUT_STATISTICS)
    for layer, x in {"conv": a.transpose(0, 1).flatten(1), "fc": a.mean((2, 3)).T}.items():
        want = {
            "input_mean": x.mean(1),
            "input_absolute": x.abs().mean(1),
            "input_square": x.square().mean(1),
            "input_variance": x.var(1, correction=0),
            "input_nonzero": (x != 0).double().mean(1),
            "input_lowest": x.amin(1),
            "input_highest": x.amax(1),
        }
        for need, value in want.items():
            torch.testing.assert_close(got[need][layer], value, rtol=1e-9, atol=1e-12)


def test_average_percentage_of_zeros_by_hand(gated: Gated) -> None:
    got = scores_of(gated, ActivationStatistic("nonzero"), [X[:2], X[2:]])["make"]
    a = gated.units(X)
    pooled = a.mean((2, 3))
    for u in range(5):
        zeros = [float((v == 0).double().mean()) for v in (a[:, u], pooled[:, u])]  # one reader each
        assert float(got[u]) == pytest.approx(1 - sum(zeros) / 2)


@pytest.mark.parametrize("statistic", ["absolute", "rms", "deviation"])
def test_statistics_of_units_of_many_channels(statistic: Any) -> None:
    """A unit that a linear layer reads at four places after a flatten: moments are averaged, roots taken last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    got = scores_of(model, ActivationStatistic(statistic), [x], example=x)["0"]
    a = torch.tanh(model[0](x)).flatten(2)  # (N, units, places)
    want = {
        "absolute": a.abs().mean((0, 2)),
        "rms": a.square().mean((0, 2)).sqrt(),
        "deviation": a.var(0, correction=0).mean(1).sqrt(),
    }[statistic]
    torch.testing.assert_close(got, want.detach())


def test_a_labelled_batch_is_run_by_the_loss(gated: Gated) -> None:
    plain = scores_of(gated, ActivationStatistic(), [X])
    labelled = scores_of(gated, ActivationStatistic(), [(X, Y)], loss=loss_fn)
    assert torch.equal(plain["make"], labelled["make"])


# Taylor on activations


def gate_derivatives(model: Gated, x: Tensor, y: Tensor) -> Tensor:
    """Return central differences of every sample's loss by a gate on each unit, (samples, units)."""
    out = torch.zeros(len(x), 5, dtype=torch.float64)
    for n in range(len(x)):
        for u in range(5):
            losses = []
            for step in (1e-5, -1e-5):
                gate = torch.ones(5, dtype=torch.float64)
                gate[u] += step
                model.gate.copy_(gate)
                losses.append(float(loss_fn(model, (x[n : n + 1], y[n : n + 1])).detach()))
            out[n, u] = (losses[0] - losses[1]) / 2e-5
    model.gate.fill_(1.0)
    return out


@pytest.mark.parametrize("form", ["absolute", "square", "signed", "descent"])
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (1,) * 6])
def test_taylor_is_the_numeric_derivative_by_a_gate(gated: Gated, form: Any, sizes: tuple[int, ...]) -> None:
    batches = list(zip(X.split(sizes), Y.split(sizes), strict=True))
    got = scores_of(gated, ActivationTaylor(form, "none"), batches, loss=loss_fn)["make"]
    d = gate_derivatives(gated, X, Y)
    want = {"absolute": d.abs().mean(0), "square": d.square().mean(0), "signed": d.mean(0).abs(), "descent": -d.mean(0)}
    torch.testing.assert_close(got, want[form], rtol=1e-6, atol=1e-9)


def test_paper_form_is_absolute_per_sample_and_normalised_per_layer(gated: Gated) -> None:
    got = scores_of(gated, ActivationTaylor(), [(X, Y)], loss=loss_fn)
    d = gate_derivatives(gated, X, Y).abs().mean(0)
    torch.testing.assert_close(got["make"], d / d.square().sum().sqrt(), rtol=1e-6, atol=1e-9)
    for scores in got.values():
        assert float(scores.square().sum()) == pytest.approx(1.0)


def test_frozen_parameters_and_training_mode_are_left_alone(gated: Gated) -> None:
    free = scores_of(gated, ActivationTaylor(), [(X, Y)], loss=loss_fn)
    frozen = copy.deepcopy(gated).train().requires_grad_(False)
    again = scores_of(frozen, ActivationTaylor(), [(X, Y)], loss=loss_fn)
    assert all(torch.equal(free[n], again[n]) for n in free)
    assert frozen.training
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert not any(m._forward_pre_hooks for m in frozen.modules())


class Windows(nn.Module):
    """Reads windows of a sequence as samples of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read, self.head = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.make(x)).unflatten(1, (2, 2)).flatten(0, 1)  # (N * 2 windows, 2, 8)
        return self.head(torch.tanh(self.read(h)).unflatten(0, (-1, 2)).mean((1, 2)))


def test_samples_that_cannot_be_told_apart_are_reported_and_single_ones_are_exact() -> None:
    torch.manual_seed(0)
    model = Windows().double()
    x, y = torch.randn(3, 4, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    coupling = coupling_of(model, x)
    _, silent = unit_scores(model, coupling, ActivationTaylor(), loss_fn=loss_fn, batches=[(x, y)])
    assert "give batches of one sample" in silent["make"]
    assert "head" not in silent
    single = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    got = scores_of(model, ActivationTaylor("square", "none"), single, example=x, loss=loss_fn)["make"]
    want = torch.zeros(8, dtype=torch.float64)
    for one, label in single:

        def by_gate(gate: Tensor, one: Tensor = one, label: Tensor = label) -> Tensor:
            h = (torch.tanh(model.make(one)) * gate).unflatten(1, (2, 2)).flatten(0, 1)
            out = model.head(torch.tanh(model.read(h)).unflatten(0, (-1, 2)).mean((1, 2)))
            return nn.functional.cross_entropy(out, label)

        want += jacrev(by_gate)(torch.ones(8, dtype=torch.float64)).square() / 3
    torch.testing.assert_close(got, want.detach())


class Routed(nn.Module):
    """Sends whole batches past its second reader when they are positive: an expert that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.often, self.seldom = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.make(x))
        return self.often(h) if x.mean() > 0 else self.seldom(h)


def test_batches_that_do_not_reach_a_reader_count_as_nothing_there() -> None:
    torch.manual_seed(0)
    model = Routed().double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    up, down = (x.abs(), y), (-x.abs(), y)
    both = scores_of(model, ActivationTaylor("absolute", "none"), [up, down], example=up[0], loss=loss_fn)["make"]
    single = [
        scores_of(model, ActivationTaylor("absolute", "none"), [b], example=b[0], loss=loss_fn)["make"]
        for b in (up, down)
    ]
    torch.testing.assert_close(both, (single[0] + single[1]) / 2)
    assert not torch.allclose(single[0], single[1])
    seen = scores_of(model, ActivationStatistic(), [up[0]], example=up[0])["make"]
    torch.testing.assert_close(seen, torch.tanh(model.make(up[0])).abs().mean(0).detach())


def test_a_layer_whose_input_has_other_channels_than_its_weight_is_reported() -> None:
    class Unshuffling(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pixel_unshuffle(x, 2))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), Unshuffling(32, 3, 1), nn.Flatten(), nn.Linear(27, 3)).double()
    coupling = coupling_of(model, X)
    for score in (ActivationStatistic(), Sensitivity()):
        _, silent = unit_scores(model, coupling, score, loss_fn=None, batches=[X])
        assert "2 gets 8 channels for 32 columns" in silent["0"]


# Sensitivity


def exact_form(model: Gated, score: Sensitivity) -> Tensor:
    """Mean over samples of delta' Cov delta, from Jacobians of the outputs by what each reader gets."""
    with torch.no_grad():
        a = model.units(X)
    pooled = a.mean((2, 3))
    means = (a.mean((0, 2, 3)), pooled.mean(0)) if score.centred else (torch.zeros(5), torch.zeros(5))
    total = torch.zeros(5, dtype=torch.float64)
    for n in range(len(X)):

        def rest(by_conv: Tensor, by_fc: Tensor) -> Tensor:
            return model.head(torch.tanh(model.conv(by_conv[None])).mean((2, 3)) + model.fc(by_fc[None]))[0]

        j_conv, j_fc = jacrev(rest, argnums=(0, 1))(a[n], pooled[n])
        delta = (j_conv * (a[n] - means[0][:, None, None])).sum((2, 3)) + j_fc * (pooled[n] - means[1])  # (3, units)
        p = (rest(a[n], pooled[n]) / score.temperature).softmax(0)
        covariance = torch.diag(p) - torch.outer(p, p) if score.outputs == "logits" else torch.eye(3).double()
        total += torch.einsum("ku,kl,lu->u", delta, covariance, delta) / len(X)
    return total.detach()


@pytest.mark.parametrize(
    "score",
    [
        Sensitivity(),
        Sensitivity(temperature=3.0),
        Sensitivity(centred=False),
        Sensitivity("values"),
        Sensitivity("values", centred=False, seed=5),
    ],
    ids=str,
)
def test_sensitivity_is_the_quadratic_form_in_expectation(gated: Gated, score: Sensitivity) -> None:
    """4,000 directions per sample: a squared normal spreads by root 2, so the mean of all by root (2 / 24,000)."""
    got = scores_of(gated, score, [X.repeat(400, 1, 1, 1)] * 10)["make"]
    want = exact_form(gated, score)
    assert (got / want - 1).abs().max() < 5 * math.sqrt(2 / 4000)


def test_direction_has_the_covariance_of_the_softmax() -> None:
    z = torch.tensor([2.0, 0.0, -1.0]).double()
    drawn = Sensitivity(temperature=2.0).directions(z.repeat(200_000, 1), torch.Generator().manual_seed(0))
    p = (z / 2).softmax(0)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), torch.diag(p) - torch.outer(p, p), rtol=0, atol=3e-3)
    classes_first = Sensitivity(class_dim=1).directions(torch.randn(2, 3, 4, 4), torch.Generator())
    torch.testing.assert_close(classes_first.sum(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)


def test_centred_removal_of_a_constant_unit_is_free(gated: Gated) -> None:
    with torch.no_grad():
        gated.make.weight[3] = 0.0
        gated.make.bias[3] = 2.0
    centred = scores_of(gated, Sensitivity(), [X])["make"]
    assert float(centred[3]) < 1e-20 < float(centred.max()) * 1e-10
    assert float(scores_of(gated, Sensitivity(centred=False), [X])["make"][3]) > 1e-4


def test_same_seed_same_scores_and_another_seed_others(gated: Gated) -> None:
    one, two = (scores_of(gated, Sensitivity(seed=s), [X])["make"] for s in (0, 1))
    assert torch.equal(one, scores_of(gated, Sensitivity(seed=0), [X])["make"])
    assert not torch.equal(one, two)


def test_cost_of_a_unit_is_what_its_removal_saves(gated: Gated) -> None:
    """Counted by hand: 36 places, 2 x 9 weights make a unit; 9 places, 9 x 4 weights and a linear column read it."""
    costs = unit_costs(coupling_of(gated, X[:1]))
    assert costs["make"].tolist() == [36 * 18 + 9 * 36 + 4] * 5
    plain = scores_of(gated, Sensitivity(), [X])["make"]
    torch.testing.assert_close(scores_of(gated, Sensitivity(per_mac=True), [X])["make"], plain / costs["make"])


# LAMP


def test_lamp_by_brute_force_with_ties(gated: Gated) -> None:
    inner = Coupled(Magnitude(), "sum", "out")
    with torch.no_grad():
        gated.make.weight[4] = gated.make.weight[1]
    got = scores_of(gated, Lamp(inner), None)["make"]
    s = scores_of(gated, inner, None)["make"]
    order = sorted(range(5), key=lambda u: (float(s[u]), u))
    for rank, u in enumerate(order):
        assert float(got[u]) == pytest.approx(float(s[u] ** 2 / sum(s[v] ** 2 for v in order[rank:])))
    assert float(got.max()) == 1.0


# Refusals


def test_what_is_missing_or_wrong_is_said(gated: Gated) -> None:
    coupling = coupling_of(gated, X)

    def refused(score: GroupScore, match: str, model: nn.Module = gated, **given: Any) -> None:
        with pytest.raises(MissingStatsError, match=match):
            unit_scores(model, coupling, score, **{"loss_fn": None, "batches": None, **given})

    refused(ActivationStatistic(), "needs data")
    refused(ActivationStatistic(), "no batches", batches=[])
    refused(ActivationStatistic(), "iterator", batches=iter([X]))
    refused(ActivationStatistic(), "NaN or infinite", batches=[X * math.nan])
    refused(ActivationTaylor(), "pass loss_fn", batches=[X])
    refused(ActivationTaylor(), "no batches", batches=[], loss_fn=loss_fn)
    refused(Sensitivity(), "protects one tensor", batches=[X], loss_fn=lambda m, x: (m(x), m(x)))
    refused(Sensitivity(), "protects one tensor", batches=[X], loss_fn=lambda m, x: m(x).sum())
    refused(Sensitivity(), "batch 1 has no samples", batches=[X, X[:0]])
    refused(Sensitivity(), r"fails on batch 0 \(a Tensor: .*RuntimeError", batches=[X[:, :1]])
    refused(ActivationTaylor(), r"fails on batch 0 .*TypeError", batches=[X], loss_fn=lambda model: model)
    refused(ActivationStatistic(), r"fails on batch 0 .*RuntimeError", batches=[X[:, :1]])
    refused(ActivationStatistic(), "got Tensor", batches=X)
    refused(Sensitivity(), "one class", batches=[X], loss_fn=lambda m, x: m(x)[:, :1])
    with pytest.raises(SecateurError, match="temperature"):
        Sensitivity(temperature=0.0)
    with pytest.raises(SecateurError, match="'deviation'"):
        ActivationStatistic("deviaton")


def test_an_input_changed_after_it_was_read_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.make(x)) * 2.0
            out = self.read(h)
            h.mul_(0.0)
            return out

    model = Changing().requires_grad_(False)
    x = torch.randn(3, 4)
    coupling = coupling_of(model, x)
    with pytest.raises(MissingStatsError, match="in place after"):
        unit_scores(model, coupling, ActivationTaylor(), loss_fn=lambda m, b: m(b).sum(), batches=[x])
    _, silent = unit_scores(model, coupling, ActivationStatistic(), loss_fn=None, batches=[x])
    assert not silent, "statistics are taken before the change"


def test_logits_of_a_named_output(gated: Gated) -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = self.inner(x)
            return {"logits": out, "other": out * 2}

    named = scores_of(Named(gated), Sensitivity(), [X])
    assert torch.equal(named["inner.make"], scores_of(gated, Sensitivity(), [X])["make"])
