"""MACs against hand counts, a loop that counts, and faults that must be refused."""

import itertools
import resource
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from secateur.errors import MetricsError
from secateur.metrics import count_macs


def one(layer, *shape):
    return count_macs(layer, (torch.empty(shape),))


def test_linear_by_hand():
    found = one(nn.Linear(8, 4), 3, 5, 8)
    assert (found.dense, found.density_weighted, found.unattributed) == (3 * 5 * 32, 3 * 5 * 32, 0)
    assert list(found.per_weight) == ["weight"]
    assert found.per_weight["weight"].positions == 15.0
    assert found.input == "float32[3, 5, 8]"


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3), (1, 3, 10, 12), 8 * 10 * 8 * 27),  # valid padding: 8 x 10 positions
        (nn.Conv2d(3, 8, 3, padding="valid"), (1, 3, 10, 12), 8 * 10 * 8 * 27),
        (nn.Conv2d(3, 8, 3, padding="same"), (1, 3, 10, 12), 10 * 12 * 8 * 27),
        (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (1, 3, 10, 12), 10 * 12 * 8 * 27),
        (nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2)), (2, 4, 9, 11), 2 * 5 * 6 * 6 * 4 * 15),
        (nn.Conv2d(4, 6, 3, dilation=2), (1, 4, 9, 9), 5 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 3 * 3 * 6 * 2 * 9),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1), (1, 4, 5, 5), 25 * 8 * 9),  # depthwise, multiplier 2
        (nn.Conv1d(2, 3, 4), (1, 2, 10), 7 * 3 * 2 * 4),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 2 * 3 * 4 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 7), 2 * 35 * 4 * 6 * 9),  # per input position
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 7), 35 * 4 * 3 * 9),
        (nn.Conv2d(3, 8, 3), (3, 10, 12), 8 * 10 * 8 * 27),  # without a batch dimension
    ],
)
def test_convolutions_by_hand(layer, shape, macs):
    found = one(layer, *shape)
    assert found.dense == macs
    assert found.per_weight["weight"].positions == macs / layer.weight.numel()


def loop_count(x, weight, stride, padding, dilation, groups, keep):
    """Convolve with loops; return the output, all multiplications, and those with a kept weight."""
    batch, _, height, width = x.shape
    outputs, inputs, kh, kw = weight.shape
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((height, kh), (width, kw))]
    padded = F.pad(x, (padding,) * 4)
    out, done, kept = torch.zeros(batch, outputs, *size), 0, 0
    for n, o, i, j in itertools.product(range(batch), range(outputs), *map(range, size)):
        group = o // (outputs // groups)
        for c, a, b in itertools.product(range(inputs), range(kh), range(kw)):
            value = padded[n, group * inputs + c, i * stride + a * dilation, j * stride + b * dilation]
            out[n, o, i, j] += value * weight[o, c, a, b]
            done += 1
            kept += bool(keep[o, c, a, b])
    return out, done, kept


def test_a_loop_that_counts_agrees_on_a_tiny_convolution():
    layer = nn.Conv2d(2, 4, (2, 3), stride=2, padding=1, dilation=1, groups=2, bias=False)
    x, keep = torch.randn(2, 2, 4, 5), torch.rand(layer.weight.shape) < 0.4
    out, done, kept = loop_count(x, layer.weight.detach(), 2, 1, 1, 2, keep)
    torch.testing.assert_close(out, layer(x))  # the loop does convolve
    found = count_macs(layer, (x,), masks={"weight": keep})
    assert (found.dense, found.density_weighted) == (done, kept)
    assert isinstance(found.density_weighted, int)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_by_hand(batch_first, need_weights, training):
    tokens, dim, batch = 5, 8, 3
    layer = nn.MultiheadAttention(dim, 2, batch_first=batch_first).train(training)
    x = torch.empty((batch, tokens, dim) if batch_first else (tokens, batch, dim))
    found = count_macs(layer, (x, x, x), {"need_weights": need_weights})
    projection = batch * tokens * dim * dim
    assert found.per_weight["in_proj_weight"].macs == 3 * projection
    assert found.per_weight["out_proj.weight"].macs == projection
    assert found.unattributed == 2 * batch * tokens * tokens * dim  # QK^T and AV, over all heads
    assert found.dense == 4 * projection + found.unattributed
    assert layer.training is training


def test_slices_of_a_packed_weight_count_what_is_used():
    dim, q, k = 8, 3, 7
    layer = nn.MultiheadAttention(dim, 2, batch_first=True)
    queries, memory = torch.empty(1, q, dim), torch.empty(1, k, dim)
    keep = torch.ones(3 * dim, dim, dtype=torch.bool)
    keep[:dim, : dim // 2] = False  # half of the query rows, which see only q tokens
    found = count_macs(layer, (queries, memory, memory), masks={"in_proj_weight": keep})
    macs = q * dim * dim + 2 * k * dim * dim
    packed = found.per_weight["in_proj_weight"]
    assert (packed.macs, packed.density_weighted) == (macs, macs - q * dim * dim // 2)
    assert packed.positions == macs / (3 * dim * dim)


def test_lstm_and_gru_by_hand():
    steps, batch, inputs, hidden = 6, 2, 5, 4
    for layer, gates in ((nn.LSTM(inputs, hidden), 4), (nn.GRU(inputs, hidden), 3)):
        found = one(layer, steps, batch, inputs)
        assert found.per_weight["weight_ih_l0"].macs == steps * batch * gates * hidden * inputs
        assert found.per_weight["weight_hh_l0"].macs == steps * batch * gates * hidden * hidden
        assert found.unattributed == 0
    deep = one(nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True), steps, batch, inputs)
    per_step = 2 * 4 * hidden * (inputs + hidden) + 2 * 4 * hidden * (2 * hidden + hidden)
    assert deep.dense == steps * batch * per_step


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(F.relu(self.fc(x)))


class Tied(nn.Module):
    def __init__(self, rewrap=False):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.data) if rewrap else self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


class Functional(nn.Module):
    """Bare parameters, used by functions, einsum, broadcasting products and vectors."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(4, 2, 3))
        self.mix = nn.Parameter(torch.randn(5, 7))
        self.vector = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(9, 9))

    def forward(self, x):  # x: [2, 7, 4]
        return torch.einsum("btd,dhk->bhtk", x, self.heads), self.mix @ x, x @ self.vector


def test_a_module_called_twice_counts_twice():
    found = one(Twice(), 3, 4)
    assert found.per_weight["fc.weight"].macs == 2 * 3 * 16
    assert found.per_weight["fc.weight"].positions == 6.0


@pytest.mark.parametrize("rewrap", [False, True])
def test_tied_weights_are_one_weight(rewrap):
    keep = torch.zeros(10, 4, dtype=torch.bool)
    keep[:5] = True
    tokens = torch.zeros(2, 3, dtype=torch.long)
    for name in ("embed.weight", "head.weight"):  # either name will do
        found = count_macs(Tied(rewrap), (tokens,), masks={name: keep})
        assert {n: w.macs for n, w in found.per_weight.items()} == {"embed.weight": 6 * 40}
        assert found.density_weighted == 6 * 20
    assert found.input == "int64[2, 3]"
    assert found.uncounted == {"aten.embedding": 1}


def test_functional_use_is_traced_through_storage():
    found = one(Functional(), 2, 7, 4)
    assert {n: w.macs for n, w in found.per_weight.items()} == {
        "heads": 2 * 7 * 4 * 6,
        "mix": 2 * 5 * 7 * 4,
        "vector": 2 * 7 * 4,
    }
    assert found.unattributed == 0


def test_density_is_weighted_per_weight_and_products_of_activations_stay_dense():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.empty(2, 5, 8)
    gone = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in layer.named_parameters()}
    found = count_macs(layer, (x,), masks=gone)
    assert found.density_weighted == found.unattributed == 2 * 2 * 5 * 5 * 8
    assert found.dense == found.unattributed + 2 * 5 * (4 * 64 + 2 * 8 * 16)
    layer_norms = found.uncounted["aten.native_layer_norm"]
    assert layer_norms == 2
    assert not {"aten.view", "aten.t", "aten.transpose", "aten._unsafe_view"} & set(found.uncounted)


def test_channels_last_weights_and_masks_agree():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    keep = torch.rand(4, 3, 3, 3) < 0.5
    found = count_macs(layer, (torch.empty(1, 3, 5, 5),), masks={"weight": keep})
    assert found.density_weighted == 9 * int(keep.sum())


def test_reparametrised_weights_count_for_their_parameter():
    normed = count_macs(parametrizations.weight_norm(nn.Linear(8, 4)), (torch.empty(2, 8),))
    assert {n: w.macs for n, w in normed.per_weight.items()} == {"parametrizations.weight.original1": 64}
    pruned = prune.random_unstructured(nn.Linear(8, 4), "weight", 0.5)
    keep = pruned.weight_mask.bool()
    found = count_macs(pruned, (torch.empty(2, 8),), masks={"weight_orig": keep})
    assert found.density_weighted == 32
    spectral = count_macs(parametrizations.spectral_norm(nn.Linear(8, 4)), (torch.empty(2, 8),))
    assert spectral.per_weight["parametrizations.weight.original"].macs == 64 + 32  # and one W v per forward
    assert spectral.unattributed == 4  # u^T (W v)


class Recast(nn.Linear):
    def forward(self, x):
        scaled = F.linear(x, self.weight[:2].to(torch.float64) * 0.5)
        return scaled, F.linear(x, self.weight + 1.0)  # a sum has no zeros left


def test_copies_of_a_weight_count_for_it_and_sums_do_not():
    keep = torch.zeros(4, 8, dtype=torch.bool)
    found = count_macs(Recast(8, 4), (torch.empty(3, 8, dtype=torch.float64),), masks={"weight": keep})
    assert (found.per_weight["weight"].macs, found.per_weight["weight"].density_weighted) == (3 * 16, 0)
    assert found.density_weighted == found.unattributed == 3 * 32


def test_inputs_may_be_nested_and_named():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, pair, *, extra):
            return self.fc(pair[0]) + self.fc(pair[1]["b"]) + extra

    args, kwargs = ((torch.empty(3, 4), {"b": torch.empty(3, 4)}),), {"extra": torch.empty(3, 2)}
    found = count_macs(Nested(), args, kwargs)
    assert found.dense == 2 * 3 * 8
    assert found.input == "float32[3, 4], float32[3, 4], extra=float32[3, 2]"


class Noisy(nn.Module):
    """Everything a careless forward does: statistics, random numbers, state, constants, an explicit device."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.scale, self.calls = torch.ones(4), []

    def forward(self, x):
        self.calls.append(1)
        torch.manual_seed(7)
        noise = torch.randn(4) + torch.zeros(4, device="cpu") + torch.tensor([0.0])
        return self.fc(self.drop(self.norm(x))) * self.scale + noise


def test_the_model_is_not_touched():
    model, seen = Noisy().train(), []
    model.fc.eval()
    model.fc.register_forward_hook(lambda *_: seen.append(1))
    model.fc.register_forward_pre_hook(lambda *_: seen.append(1))
    model(torch.randn(3, 4)).sum().backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    seen.clear()
    x, fast = torch.randn(3, 4), torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    found = count_macs(model, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.dense == 48
    assert seen == []
    assert model.calls == [1]
    assert len(model.fc._forward_hooks) == len(model.fc._forward_pre_hooks) == 1
    assert [m.training for m in (model, model.norm, model.drop, model.fc)] == [True, True, True, False]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.grad is not None and p.device.type == "cpu" for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_a_model_on_meta_works_and_stays_there():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))
    assert one(model, 1, 1000).dense == 1_010_000
    assert all(p.is_meta for p in model.parameters())


def test_a_large_encoder_costs_no_memory():
    layers, dim, tokens = 24, 1024, 128
    with torch.device("meta"):  # on the CPU these 302 M weights would be 1.2 GB
        layer = nn.TransformerEncoderLayer(dim, 16, 4 * dim, batch_first=True)
        big = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = one(big, 1, tokens, dim)
    assert found.dense == layers * (tokens * 12 * dim * dim + 2 * tokens * tokens * dim)
    assert len(found.per_weight) == 4 * layers
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_copying_real_weights_costs_no_memory():
    model = nn.Linear(4096, 8192)  # 128 MiB
    model(torch.zeros(1, 4096)).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert one(model, 1, 4096).dense == 4096 * 8192
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x)
        return x if x.sum().item() > 0 else -x


class Picks(nn.Module):
    def forward(self, x):
        return x[x.nonzero()[:, 0]]


@pytest.mark.parametrize(("model", "op"), [(Peeks(), "aten._local_scalar_dense"), (Picks(), "aten.nonzero")])
def test_code_that_depends_on_values_is_refused_by_operator(model, op):
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(MetricsError, match=op):
        one(model, 2, 4)
    assert torch.backends.mha.get_fastpath_enabled() is fast


class Locked(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.lock = threading.Lock()


def test_wrong_arguments_are_refused():
    layer, x = nn.Linear(4, 2), torch.empty(1, 4)
    with pytest.raises(MetricsError, match=r"pass \(x,\)"):
        count_macs(layer, x)
    with pytest.raises(MetricsError, match="did you mean 'weight'"):
        count_macs(layer, (x,), masks={"weigth": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(MetricsError, match=r"shape \(2, 4\)"):
        count_macs(layer, (x,), masks={"weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(MetricsError, match=r"torch\.bool"):
        count_macs(layer, (x,), masks={"weight": torch.ones(2, 4)})
    with pytest.raises(MetricsError, match="lazy"):
        count_macs(nn.LazyLinear(2), (x,))
    with pytest.raises(MetricsError, match="deep-copied"):
        count_macs(Locked(), (x,))
    with pytest.raises(MetricsError, match="Module"):
        count_macs(torch.relu, (x,))
    with pytest.raises(MetricsError, match="addmm"):
        one(layer, 1, 5)
    shared = Tied()
    masks = {"embed.weight": torch.ones(10, 4, dtype=torch.bool), "head.weight": torch.zeros(10, 4, dtype=torch.bool)}
    with pytest.raises(MetricsError, match="share one tensor"):
        count_macs(shared, (torch.zeros(1, 1, dtype=torch.long),), masks=masks)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_and_productless_models():
    assert one(nn.ReLU(), 3).dense == 0
    assert one(nn.ReLU(), 3).uncounted == {"aten.relu": 1}
    nothing = count_macs(nn.Linear(0, 3), (torch.empty(2, 0),), masks={"weight": torch.ones(3, 0, dtype=torch.bool)})
    assert (nothing.dense, nothing.density_weighted) == (0, 0)
