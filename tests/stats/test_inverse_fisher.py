"""The inverse Fisher matrix against numpy's own inverse of the matrix that the definition gives."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import MissingStatsError
from secateur.stats.inverse_fisher import FisherInverse, InverseFisher
from secateur.stats.per_sample import per_sample_gradients
from secateur.stats.quadratic import SingularMatrix, downdate, eliminate, group_losses, invert, remove, woodbury
from secateur.types import Source, Statistic


def make() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    return model, [(x[:24], torch.arange(24) % 3), (x[24:], torch.arange(16) % 3)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def outputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


NAMES = ("0.weight", "3.weight")


def source(model: nn.Module, batches: Any, run: Any = loss, masks: Mapping[str, Tensor] | None = None) -> Source:
    return Source(model, {n: model.get_parameter(n) for n in NAMES}, run, lambda: batches, masks=masks or {})


def rows_of(model: nn.Module, batches: Any, run: Any = loss) -> np.ndarray:
    """The gradients of single samples (and outputs), one backward pass after the other, as a plain loop."""
    model.eval()
    rows = []
    for x, y in batches:
        for i in range(len(x)):
            out = run(model, (x[i : i + 1], y[i : i + 1]))
            for value in out.flatten():
                grads = torch.autograd.grad(value, [model.get_parameter(n) for n in NAMES], retain_graph=True)
                rows.append(torch.cat([g.flatten() for g in grads]).numpy())
    return np.stack(rows)


def full(inverse: FisherInverse) -> np.ndarray:
    return inverse["*"][0].numpy()


def test_one_matrix_over_all_weights() -> None:
    model, batches = make()
    statistic = InverseFisher(None, damping=1e-3, relative=False)
    assert isinstance(statistic, Statistic)
    got = statistic.collect(source(model, batches))
    g = rows_of(model, batches)
    wanted = np.linalg.inv(g.T @ g / len(g) + 1e-3 * np.eye(g.shape[1]))
    np.testing.assert_allclose(full(got), wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())
    assert got.gradients == 40
    assert model.training or not any(m.training for m in model.modules())  # modes are the loop's own
    v = {n: torch.randn(model.get_parameter(n).shape, dtype=torch.float64) for n in NAMES}
    flat = torch.cat([v[n].flatten() for n in NAMES]).numpy()
    solved = torch.cat([t.flatten() for t in got.solve(v).values()]).numpy()
    np.testing.assert_allclose(solved, wanted @ flat, rtol=1e-8)
    diagonal = torch.cat([t.flatten() for t in got.diagonal().values()]).numpy()
    np.testing.assert_allclose(diagonal, wanted.diagonal(), rtol=1e-9)
    curvature = torch.cat([t.flatten() for t in got.curvature().values()]).numpy()
    np.testing.assert_allclose(curvature, (g**2).mean(0) + 1e-3, rtol=1e-9)


def test_gradients_of_outputs_give_gauss_newton() -> None:
    model, batches = make()
    got = InverseFisher(None, damping=1e-2, relative=False, gradients="output").collect(source(model, batches, outputs))
    g = rows_of(model, batches, outputs)  # 40 samples of 3 outputs
    wanted = np.linalg.inv(g.T @ g / 40 + 1e-2 * np.eye(g.shape[1]))
    np.testing.assert_allclose(full(got), wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())


@pytest.mark.parametrize("block", [1, 5, 7, 64])
def test_blocks_along_each_weight(block: int) -> None:
    """Also where the block does not divide a weight, and where a weight is smaller than one."""
    model, batches = make()
    got = InverseFisher(block, damping=0.01).collect(source(model, batches))
    g = rows_of(model, batches)
    fisher = g.T @ g / len(g)
    damping = 0.01 * fisher.diagonal().mean()
    assert got.damping == pytest.approx(damping)
    low = 0
    for name in NAMES:
        size, blocks = model.get_parameter(name).numel(), got[name]
        for z, start in enumerate(range(0, size, blocks.shape[-1])):
            stop = min(start + blocks.shape[-1], size)
            own = fisher[low + start : low + stop, low + start : low + stop] + damping * np.eye(stop - start)
            n = stop - start
            np.testing.assert_allclose(blocks[z, :n, :n].numpy(), np.linalg.inv(own), rtol=1e-9, atol=1e-9)
            assert torch.equal(blocks[z, n:, :n], torch.zeros_like(blocks[z, n:, :n])), "the filling touches nothing"
        low += size


def test_what_has_gone_before_is_left_out() -> None:
    model, batches = make()
    torch.manual_seed(1)
    masks = {n: torch.rand(model.get_parameter(n).shape) < 0.6 for n in NAMES}
    got = InverseFisher(None, damping=1e-3, relative=False).collect(source(model, batches, masks=masks))
    keep = torch.cat([masks[n].flatten() for n in NAMES]).numpy()
    g = rows_of(model, batches)[:, keep]
    wanted = np.linalg.inv(g.T @ g / len(g) + 1e-3 * np.eye(keep.sum()))
    np.testing.assert_allclose(full(got)[np.ix_(keep, keep)], wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())
    np.testing.assert_array_equal(full(got)[np.ix_(~keep, keep)], 0.0)


@pytest.mark.parametrize("shape", [(30, 6), (30, 4, 6)])
def test_woodbury_is_the_direct_inverse(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fisher = torch.einsum("n...i,n...j->...ij", g, g) / 30 + 1e-3 * torch.eye(6, dtype=torch.float64)
    wanted = torch.from_numpy(np.linalg.inv(fisher.numpy()))
    torch.testing.assert_close(woodbury(g, 1e-3), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(invert(fisher), wanted, rtol=1e-10, atol=1e-10)


def test_fewer_gradients_than_weights() -> None:
    """The rank is 3: both ways still agree, and a weight outside the span has the inverse of the damping."""
    g = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[:, 5] = 0.0
    fisher = g.T @ g / 3 + 1e-6 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(woodbury(g, 1e-6), invert(fisher), rtol=1e-6, atol=1e-3)  # entries of 1e6
    assert float(invert(fisher)[5, 5]) == pytest.approx(1e6)
    with pytest.raises(SingularMatrix):
        invert(fisher - 1e-6 * torch.eye(8, dtype=torch.float64))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_singular_matrix_is_refused_not_replaced() -> None:
    model, batches = make()
    with pytest.raises(MissingStatsError, match=r"singular in the matrix over all weights.*Raise damping") as refusal:
        InverseFisher(None, damping=0.0).collect(source(model, batches[1:]))
    assert "16 gradients, 32 weights" in str(refusal.value)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()  # the second layer's inputs are zero: so are the gradients of its weights
    with pytest.raises(MissingStatsError, match=r"singular in block \d of 3.weight.*Raise damping"):
        InverseFisher(2, damping=0.0).collect(source(model, batches))
    InverseFisher(4, damping=1e-8).collect(source(model, batches))


def test_gradients_of_nothing_are_refused() -> None:
    model, batches = make()
    with pytest.raises(MissingStatsError, match="every gradient is zero"):
        InverseFisher(4, damping=0.1).collect(source(model, batches, lambda m, b: (m(b[0]) * 0.0).mean()))
    with pytest.raises(MissingStatsError, match="no batches"):
        InverseFisher(4).collect(source(model, []))
    with pytest.raises(MissingStatsError, match="one number per batch"):
        InverseFisher(4).collect(source(model, batches, outputs))
    with pytest.raises(MissingStatsError, match="one row for each of the 24 samples"):
        InverseFisher(4, gradients="output").collect(source(model, batches, loss))
    with pytest.raises(MissingStatsError, match="has no gradient"):
        InverseFisher(4).collect(source(model, batches, lambda m, b: loss(m, b).detach()))
    with pytest.raises(MissingStatsError, match="loss is nan"):
        InverseFisher(4).collect(source(model, batches, lambda m, b: loss(m, b) * torch.nan))
    with pytest.raises(MissingStatsError, match=r"tensors of \[3, 4\] rows"):
        InverseFisher(4).collect(source(model, [(torch.zeros(4, 5).double(), torch.zeros(3).long())]))


def test_too_many_weights_for_one_matrix() -> None:
    model = nn.Linear(100, 100)
    with pytest.raises(MissingStatsError, match=r"0.8 GB.*block=64"):
        InverseFisher(None).collect(Source(model, {"weight": model.weight}, loss, lambda: []))


@pytest.mark.parametrize("bad", [{"block": 0}, {"block": -3}, {"damping": -1.0}, {"damping": float("nan")}])
def test_options_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(MissingStatsError, match=next(iter(bad))):
        InverseFisher(**bad)


def test_layers_that_couple_samples_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 3))
    _, batches = make()
    batches = [(x.float(), y) for x, y in batches]
    with pytest.raises(MissingStatsError, match="couples the samples of a batch"):
        InverseFisher(4).collect(source(model, batches))
    running = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    InverseFisher(4).collect(source(running, batches))
    assert running[1].num_batches_tracked == 0

    def contrastive(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        out = m(batch[0])
        return (out @ out.T).square().mean()

    with pytest.raises(MissingStatsError, match="not the mean over its samples"):
        InverseFisher(4).collect(source(running, batches, contrastive))
    with pytest.raises(MissingStatsError, match=r"not the mean over its samples.*it is a sum"):
        InverseFisher(4).collect(source(running, batches, lambda m, b: len(b[0]) * loss(m, b)))


def test_outputs_that_look_at_other_samples_are_refused() -> None:
    model, batches = make()
    with pytest.raises(MissingStatsError, match="outputs of a batch of 24 are not those of its samples"):
        InverseFisher(4, gradients="output").collect(source(model, batches, lambda m, b: m(b[0]) - m(b[0]).mean(0)))


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_later_batches_are_checked_too(way: Any) -> None:
    """The second batch alone has a loss that is no mean."""
    model, batches = make()
    odd = lambda m, b: loss(m, b) * (2.0 if len(b[0]) == 16 else 1.0)  # noqa: E731
    with pytest.raises(MissingStatsError, match=r"batch of 16 .* not the mean"):
        InverseFisher(4, per_sample=way).collect(source(model, batches, odd))


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_gradients_that_are_no_numbers_are_refused(way: Any) -> None:
    """The loss is finite, its derivative is not: that is no matrix of zeros, and more damping does not help."""
    model, batches = make()
    rooted = lambda m, b: loss(m, b) + (m(b[0]) * 0.0).square().sum(1).sqrt().mean()  # noqa: E731
    with pytest.raises(MissingStatsError, match=r"gradient of 0.weight is NaN or infinite"):
        InverseFisher(4, per_sample=way).collect(source(model, batches, rooted))


# --- sample by sample ------------------------------------------------------------------------------------------------


class Picky(nn.Module):
    """A forward that decides on values: it cannot run on many samples at once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.detach().abs().sum()) >= 0 else x


@pytest.mark.parametrize("run", [loss, outputs])
def test_together_and_one_by_one_agree(run: Any) -> None:
    model, batches = make()
    named = {n: model.get_parameter(n) for n in NAMES}
    named["0.weight"].requires_grad_(False)  # frozen layers have gradients too
    how = run is outputs
    fast = Source(model, named)
    found = [dict(g) for _, g in per_sample_gradients("it", fast, run, batches, way="vmap", outputs=how)]
    flat = torch.cat([torch.cat([g[n].flatten(1) for n in NAMES], 1) for g in found])
    assert not named["0.weight"].requires_grad
    named["0.weight"].requires_grad_(True)
    np.testing.assert_allclose(flat.numpy(), rows_of(model, batches, run), rtol=1e-12, atol=1e-14)
    picky = Picky(model)
    renamed = {f"inner.{n}": p for n, p in named.items()}
    with pytest.raises(MissingStatsError, match=r'it: torch.func cannot vectorise .* per_sample = "loop"'):
        list(per_sample_gradients("it", Source(picky, renamed), run, batches, way="vmap", outputs=how))
    ways = per_sample_gradients("it", Source(picky, renamed), run, batches, way="loop", outputs=how, chunk=7)
    counts, slow = zip(*ways, strict=True)
    assert counts == (7, 7, 7, 3, 7, 7, 2)
    again = torch.cat([torch.cat([g[f"inner.{n}"].flatten(1) for n in NAMES], 1) for g in slow])
    torch.testing.assert_close(flat, again, rtol=1e-12, atol=1e-14)


def test_recurrent_layers_and_tied_weights() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 3, batch_first=True)
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(self.rnn(x)[0][:, -1]))).sum(1)

    model = Tied().double()
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    named = {"a.weight": model.a.weight, "rnn.weight_hh_l0": model.rnn.weight_hh_l0}
    given = (Source(model, named), lambda m, b: m(b).mean(), [x])
    with pytest.raises(MissingStatsError, match='per_sample = "loop"'):
        list(per_sample_gradients("it", *given, way="vmap"))
    (count, found), *rest = per_sample_gradients("it", *given, way="loop")
    assert (count, rest) == (6, [])
    for i in range(6):
        wanted = torch.autograd.grad(model(x[i : i + 1]).sum(), list(named.values()))
        for (name, _), g in zip(named.items(), wanted, strict=True):
            torch.testing.assert_close(found[name][i], g)


# --- functions of the quadratic model --------------------------------------------------------------------------------


def quadratic(size: int, seed: int = 0, blocks: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A random curvature, its inverse by numpy, and weights."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*(() if blocks is None else (blocks,)), size, size + 3, generator=generator, dtype=torch.float64)
    h = a @ a.mT + 0.3 * torch.eye(size, dtype=torch.float64)
    w = torch.randn(h.shape[:-1], generator=generator, dtype=torch.float64)
    return h, torch.from_numpy(np.linalg.inv(h.numpy())), w


def constrained(h: Tensor, w: Tensor, gone: list[int]) -> tuple[Tensor, float]:
    """Minimise the quadratic over the weights that stay, by the normal equations of these alone."""
    free = [i for i in range(len(w)) if i not in gone]
    d = torch.zeros_like(w)
    d[gone] = -w[gone]
    if free:
        d[free] = -torch.linalg.solve(h[free][:, free], h[free][:, gone] @ d[gone])
    return w + d, float(0.5 * d @ h @ d)


@pytest.mark.parametrize("gone", [[0], [4], [1, 3, 4], [0, 1, 2, 3, 4, 5]])
def test_removal_is_the_constrained_optimum(gone: list[int]) -> None:
    h, inverse, w = quadratic(6)
    moved, lost = remove(inverse, w, torch.tensor(gone))
    wanted, wanted_loss = constrained(h, w, gone)
    torch.testing.assert_close(moved, wanted, rtol=1e-12, atol=1e-12)
    assert float(lost) == pytest.approx(wanted_loss, rel=1e-12)
    assert not moved[gone].count_nonzero()


def test_removal_of_other_weights_in_each_block() -> None:
    h, inverse, w = quadratic(6, blocks=5)
    gone = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    moved, lost = remove(inverse, w, gone)
    for z in range(5):
        wanted, wanted_loss = constrained(h[z], w[z], gone[z].nonzero().flatten().tolist())
        torch.testing.assert_close(moved[z], wanted, rtol=1e-12, atol=1e-12)
        assert float(lost[z]) == pytest.approx(wanted_loss, rel=1e-12)


def test_one_after_the_other_in_any_order() -> None:
    """Ends where the group ends, and the losses add up to that of the group."""
    from itertools import permutations

    h, inverse, w = quadratic(6)
    wanted, wanted_loss = constrained(h, w, [1, 3, 4])
    for order in permutations([1, 3, 4]):
        now, left, total = inverse, w, 0.0
        for q in order:
            total += float(left[q] ** 2 / (2 * now[q, q]))
            left = left - left[q] / now[q, q] * now[:, q]
            now = downdate(now, q)
        torch.testing.assert_close(left, wanted, rtol=1e-12, atol=1e-12)
        assert total == pytest.approx(wanted_loss, rel=1e-12)
        stay = [0, 2, 5]
        reduced = torch.from_numpy(np.linalg.inv(h[stay][:, stay].numpy()))
        torch.testing.assert_close(now[stay][:, stay], reduced, rtol=1e-12, atol=1e-12)
        assert not now[[1, 3, 4]].count_nonzero()
        assert not now[:, [1, 3, 4]].count_nonzero()


def test_downdate_of_other_weights_in_each_block() -> None:
    h, inverse, _ = quadratic(4, blocks=3)
    now = downdate(inverse, torch.tensor([2, 0, 3]))
    for z, q in enumerate([2, 0, 3]):
        stay = [i for i in range(4) if i != q]
        reduced = torch.from_numpy(np.linalg.inv(h[z][stay][:, stay].numpy()))
        torch.testing.assert_close(now[z][stay][:, stay], reduced, rtol=1e-12, atol=1e-12)


def test_elimination_takes_the_cheapest_each_time() -> None:
    """Against a loop that solves the constrained problem anew for every candidate."""
    h, inverse, w = quadratic(6, blocks=4)
    trace = eliminate(inverse, w, h.diagonal(dim1=-2, dim2=-1))
    for z in range(4):
        gone: list[int] = []
        before = 0.0
        for step in range(6):
            costs = {q: constrained(h[z], w[z], [*gone, q])[1] for q in range(6) if q not in gone}
            cheapest = min(costs, key=lambda q: costs[q])
            assert int(trace.order[z, step]) == cheapest
            assert float(trace.losses[z, step]) == pytest.approx(costs[cheapest] - before, rel=1e-9)
            before = costs[cheapest]
            gone.append(cheapest)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_losses_of_runs(size: int) -> None:
    h, inverse, w = quadratic(6, blocks=2)
    got = group_losses(inverse, w, size)
    for z in range(2):
        for r in range(6 // size):
            wanted = constrained(h[z], w[z], list(range(r * size, (r + 1) * size)))[1]
            assert float(got[z, r]) == pytest.approx(wanted, rel=1e-12)
            if size == 1:  # never below what the weight costs with nothing to make up for it being impossible
                assert float(inverse[z, r, r]) >= 1 / float(h[z, r, r])


def test_weights_that_nothing_depends_on_cost_nothing() -> None:
    """In the null space of the gradients, the loss goes to zero with the damping."""
    g = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g[:, 2] = 0.0
    w = torch.ones(5, dtype=torch.float64)
    costs = [float(group_losses(woodbury(g, damping), w, 1)[2]) for damping in (1e-2, 1e-4, 1e-8)]
    assert costs == pytest.approx([0.5e-2, 0.5e-4, 0.5e-8])


def test_blocks_of_a_block_diagonal_matrix_are_the_whole() -> None:
    h, inverse, w = quadratic(4, blocks=3)
    whole = torch.block_diag(*h)
    gone = torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) < 0.5
    in_blocks, lost = remove(inverse, w, gone)
    at_once, total = remove(torch.from_numpy(np.linalg.inv(whole.numpy())), w.flatten(), gone.flatten())
    torch.testing.assert_close(in_blocks.flatten(), at_once, rtol=1e-12, atol=1e-12)
    assert float(lost.sum()) == pytest.approx(float(total), rel=1e-12)


def test_the_recursion_refuses_what_it_cannot_start_from() -> None:
    with pytest.raises(MissingStatsError, match="damping is 0"):
        woodbury(torch.ones(2, 2), 0.0)
    with pytest.raises(MissingStatsError, match="no gradients"):
        woodbury(torch.ones(0, 2), 1.0)


@pytest.mark.parametrize("size", [1, 2])
def test_weights_that_were_taken_out_before_are_refused(size: int) -> None:
    """Of what the inverse no longer holds there is no loss: not torch's own error, nor 0 / 0."""
    _, inverse, w = quadratic(4)
    with pytest.raises(MissingStatsError, match="taken out of it before"):
        remove(downdate(inverse, 1), w, torch.tensor([1, 2][:size]))
    with pytest.raises(MissingStatsError, match="taken out of it before"):
        group_losses(downdate(inverse, 1), w, size)
