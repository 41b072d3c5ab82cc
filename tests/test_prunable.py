"""Which weights are found, which are skipped and why, and what is refused before anything changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, WeightError
from secateur.prunable import find_prunable


def holder(weight: Tensor) -> nn.Linear:
    """A linear layer around a tensor that nn.Linear would not make itself."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Tied(nn.Module):
    """Two layers and a third that shares the first one's weight: as one Parameter, or as two over one storage."""

    def __init__(self, *, same_object: bool) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight if same_object else nn.Parameter(self.first.weight.data)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_layers_and_their_layouts() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "bare": nn.Linear(3, 2, bias=False),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose1d(4, 6, 3, groups=2),
            "bilinear": nn.Bilinear(3, 4, 2),
            "norm": nn.BatchNorm2d(4),
            "table": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "rnn": nn.LSTM(3, 4, proj_size=2),
        }
    )
    weights = find_prunable(model).weights
    layouts = {name: (w.out_dim, w.in_dim, w.groups, w.transposed, w.bias, w.kind) for name, w in weights.items()}
    assert layouts == {
        "linear.weight": (0, 1, 1, False, "linear.bias", "Linear"),
        "bare.weight": (0, 1, 1, False, None, "Linear"),
        "conv.weight": (0, 1, 2, False, "conv.bias", "Conv2d"),
        "up.weight": (1, 0, 2, True, "up.bias", "ConvTranspose1d"),
        "bilinear.weight": (0, 2, 1, False, "bilinear.bias", "Bilinear"),
        "attention.in_proj_weight": (0, 1, 1, False, None, "MultiheadAttention"),
        "attention.out_proj.weight": (0, 1, 1, False, "attention.out_proj.bias", "NonDynamicallyQuantizableLinear"),
        "rnn.weight_ih_l0": (0, 1, 1, False, None, "LSTM"),
        "rnn.weight_hh_l0": (0, 1, 1, False, None, "LSTM"),
        "rnn.weight_hr_l0": (0, 1, 1, False, None, "LSTM"),
    }
    assert all(w.name == name and w.shape == tuple(model.get_parameter(name).shape) for name, w in weights.items())


def test_subclasses_count_and_the_order_is_the_models() -> None:
    class MyConv(nn.Conv2d):
        pass

    model = nn.Sequential(MyConv(1, 2, 3), nn.Linear(4, 4), nn.Conv1d(1, 1, 1))
    assert list(find_prunable(model).weights) == ["0.weight", "1.weight", "2.weight"]


def test_the_conv1d_of_transformers_is_input_first() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(6))

    weight = find_prunable(nn.Sequential(Conv1D())).weights["0.weight"]
    assert (weight.out_dim, weight.in_dim, weight.bias) == (1, 0, "0.bias")


def test_a_bare_layer_is_a_model() -> None:
    assert list(find_prunable(nn.Linear(2, 2)).weights) == ["weight"]
    assert list(find_prunable(nn.Linear(2, 2), include=["weight"]).weights) == ["weight"]


# --- filters ---------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 4)), "head": nn.Linear(4, 2), "emb": nn.Embedding(3, 4)}
    )


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"include": ["head"]}, ["head.weight"]),
        ({"include": ["head.weight"]}, ["head.weight"]),
        ({"include": ["body.*"]}, ["body.0.weight", "body.1.weight"]),
        ({"exclude": ["body.*"]}, ["head.weight"]),
        ({"include": ["body.*", "head"], "exclude": ["*.0"]}, ["body.1.weight", "head.weight"]),
        ({"include": ["b*.[01]"]}, ["body.0.weight", "body.1.weight"]),
        ({"types": ["Linear"]}, ["body.1.weight", "head.weight"]),
        ({"types": ["Conv2d", "Linear"]}, ["body.0.weight", "body.1.weight", "head.weight"]),
        ({"types": ["_ConvNd"]}, ["body.0.weight"]),
        ({"types": ["Embedding"]}, ["emb.weight"]),
        ({"types": ["Embedding", "Linear"], "exclude": ["body*"]}, ["head.weight", "emb.weight"]),
    ],
    ids=str,
)
def test_filters(filters: dict[str, list[str]], names: list[str]) -> None:
    found = find_prunable(network(), **filters)
    assert list(found.weights) == names
    assert not found.weights.keys() & found.skipped.keys()


def test_skipped_weights_say_why() -> None:
    found = find_prunable(network(), include=["body.*", "head"], exclude=["*.0"])
    assert found.skipped == {"body.0.weight": "excluded by name"}
    assert find_prunable(network(), include=["head"]).skipped.keys() == {"body.0.weight", "body.1.weight"}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"include": ["haed"]}, r"'haed' matches no prunable weight; did you mean 'head'"),
        ({"exclude": ["boddy.1"]}, r"'boddy.1' matches no prunable weight; did you mean 'body.1'"),
        ({"exclude": ["zzz"]}, r"'zzz'.*valid: 'body.0', 'body.1', 'head'"),
        ({"types": ["Linaer"]}, r"'Linaer'.*did you mean 'Linear'"),
        ({"include": ["head"], "exclude": ["head"]}, r"nothing to prune.*excluded by name"),
    ],
    ids=str,
)
def test_filters_that_match_nothing(filters: dict[str, list[str]], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        find_prunable(network(), **filters)


def test_a_model_without_prunable_layers() -> None:
    with pytest.raises(WeightError, match=r"nothing to prune in Sequential .*no prunable layer"):
        find_prunable(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_tied_weights_are_listed_once() -> None:
    found = find_prunable(Tied(same_object=True))
    assert list(found.weights) == ["first.weight", "other.weight"]
    assert found.ties == {"last.weight": "first.weight"}


def test_excluding_any_name_of_a_tied_weight_excludes_it() -> None:
    """Whoever says "leave the head alone" means the head's weight, whatever else it is called."""
    for name in ("first", "last", "last.weight"):
        assert list(find_prunable(Tied(same_object=True), exclude=[name]).weights) == ["other.weight"]


def test_including_any_name_of_a_tied_weight_includes_it() -> None:
    for name in ("first", "last"):
        found = find_prunable(Tied(same_object=True), include=[name])
        assert len(found.weights) == 1, f"include={name!r} named one weight"
        assert not found.weights.keys() & {"other.weight"}


def test_a_module_used_twice_is_one_weight() -> None:
    shared = nn.Linear(3, 3)
    found = find_prunable(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)}))
    assert list(found.weights) == ["a.weight", "c.weight"]


def test_overlapping_storage_is_refused() -> None:
    store = torch.randn(24)
    model = nn.Sequential(holder(store[:16].view(4, 4)), holder(store[8:].view(4, 4)))
    with pytest.raises(WeightError, match=r"0\.weight and 1\.weight share memory"):
        find_prunable(model)


def test_overlap_with_a_parameter_that_is_not_prunable() -> None:
    store = torch.randn(24)
    model = nn.Sequential(holder(store[:16].view(4, 4)), nn.LayerNorm(16))
    model[1].weight = nn.Parameter(store[8:])
    with pytest.raises(WeightError, match="share memory"):
        find_prunable(model)


def test_overlap_behind_a_third_parameter() -> None:
    """A flat parameter with views into it, as flattening wrappers make: neighbours in memory are not all the pairs."""
    layer = nn.Linear(4, 4)
    layer.register_parameter("flat", nn.Parameter(torch.randn(100)))
    layer.bias = nn.Parameter(layer.flat.data[1:5])
    layer.weight = nn.Parameter(layer.flat.data[10:26].view(4, 4))
    with pytest.raises(WeightError, match="share memory"):
        find_prunable(layer)


def test_a_weight_that_overlaps_itself_is_refused() -> None:
    with pytest.raises(WeightError, match="weight"):
        find_prunable(holder(torch.randn(1, 4).expand(3, 4)))


def test_neighbours_in_one_storage_are_fine() -> None:
    store = torch.randn(32)
    found = find_prunable(nn.Sequential(holder(store[:16].view(4, 4)), holder(store[16:].view(4, 4))))
    assert len(found.weights) == 2


# --- what is refused or skipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: torch.ones(4, 4, dtype=torch.int8), "int8"),
        (lambda: torch.ones(4, 4, dtype=torch.uint8), "uint8"),
        (lambda: torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.randn(4, 4, dtype=torch.complex64), "complex64"),
        (lambda: torch.randn(4, 4, device="meta"), "meta"),
        (lambda: torch.randn(4, 4).to_sparse(), "sparse_coo"),
        (lambda: torch.randn(4, 4).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.randn(4, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=lambda v: v if isinstance(v, str) else "make",
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantize_per_tensor")
def test_weights_that_cannot_be_masked_are_refused(make: Callable[[], Tensor], word: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), holder(make()))
    with pytest.raises(WeightError, match=rf"1\.weight: .*{word}"):
        find_prunable(model)
    assert list(find_prunable(model, exclude=["1"]).weights) == ["0.weight"], "leaving it out is the way out"


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    with pytest.raises(SecateurError, match="0"):
        find_prunable(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(WeightError, match="wrapped in DataParallel; prune the inner module"):
        find_prunable(nn.DataParallel(nn.Linear(4, 4)))


def test_distributed_wrappers_are_refused_by_name() -> None:
    for name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        wrapper = type(name, (nn.Sequential,), {})(nn.Linear(4, 4))
        with pytest.raises(WeightError, match=name):
            find_prunable(wrapper)


def test_parametrised_weights_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    found = find_prunable(model)
    assert list(found.weights) == ["1.weight"]
    assert "remove_parametrizations" in found.skipped["0.weight"]


def test_a_model_of_parametrised_weights_only_says_so() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(WeightError, match="parametri"):
        find_prunable(model)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_recomputed_by_a_hook_are_reported(how: str) -> None:
    """The older mechanisms rename the parameter; the layer must not drop out of the report without a word."""
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if how == "prune":
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    else:
        getattr(nn.utils, how)(model[0])
    found = find_prunable(model)
    assert list(found.weights) == ["1.weight"]
    assert any(name.startswith("0.weight") for name in found.skipped)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_layers_are_skipped_and_one_unit_layers_are_not() -> None:
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    found = find_prunable(model)
    assert list(found.weights) == ["1.weight", "2.weight"]
    assert found.skipped == {"0.weight": "empty"}


def test_finding_changes_nothing() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_prunable(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_parameters_over_one_storage_are_refused() -> None:
    with pytest.raises(WeightError, match="share memory"):
        find_prunable(Tied(same_object=False))
