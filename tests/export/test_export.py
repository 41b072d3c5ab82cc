"""The request, the comparison, and the safetensors export."""

from __future__ import annotations

import builtins
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.checkpoint import load_model
from secateur.errors import ExportError, MissingExtraError, UnknownNameError, WeightError
from secateur.export import Export, export_model
from secateur.export._cases import _other_values
from secateur.export._common import difference

from .models import Convolutional, TiedDict, mlp, prune_half


def test_safetensors_is_exact_and_loads_again(tmp_path: Path) -> None:
    model = TiedDict()
    masks = prune_half(model)
    (made,) = export_model(model, (), out_dir=tmp_path, formats=["safetensors"], name="w", masks=masks)
    assert made == Export("safetensors", tmp_path / "w.safetensors", made.path.stat().st_size, 0.0, made.checked)
    assert made.to_dict()["path"] == str(made.path)
    assert made.to_dict()["notes"] == []
    assert int((load_file(made.path)["embed.weight"][~masks["embed.weight"]] != 0).sum()) == 0
    other = TiedDict()
    load_model(other, made.path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_all_formats_and_the_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutional().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = torch.randn(2, 1, 6, 6, requires_grad=True)
    made = export_model(model, x, out_dir=str(tmp_path), masks=prune_half(model) and None)
    assert [item.format for item in made] == ["safetensors", "onnx", "pt2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.pt2", "model.safetensors"]
    assert [module.training for module in model.modules()] == modes
    assert before.keys() == model.state_dict().keys()
    assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert model.norm.num_batches_tracked == 0
    assert x.grad is None
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_the_modes_come_back_after_a_failure(tmp_path: Path) -> None:
    model = mlp().train()
    model[1].eval()
    with pytest.raises(ExportError, match="the model does not run on the inputs given: RuntimeError: mat1"):
        export_model(model, torch.randn(2, 5), out_dir=tmp_path / "x", formats=["pt2"])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"formats": ["safetensors", "onx"]}, UnknownNameError, "unknown export format 'onx'; did you mean 'onnx'"),
        ({"formats": "onnx"}, ExportError, r"expected a list of names, such as \['onnx'\]"),
        ({"formats": ["pt2", "pt2"]}, ExportError, "twice"),
        ({"name": "../up"}, ExportError, "name='../up': expected the name of a file"),
        ({"name": ""}, ExportError, "name=''"),
        ({"tolerance": math.nan}, ExportError, "tolerance=nan"),
        ({"tolerance": -1.0}, ExportError, "tolerance=-1.0"),
        ({"masks": {"0.wait": torch.ones(1)}}, WeightError, "did you mean '0.weight'"),
        (
            {"masks": {"0.weight": torch.zeros(8, 4, dtype=torch.bool)}},
            ExportError,
            r"not zero in '0.weight' \(32 elem",
        ),
        ({"out_dir": Path("/dev/null/x"), "formats": ["safetensors"]}, ExportError, "cannot make this folder"),
    ],
    ids=range(10),
)
def test_a_wrong_request_writes_nothing(
    options: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        export_model(mlp(), torch.randn(2, 4), **{"out_dir": tmp_path / "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_no_formats_are_no_work(tmp_path: Path) -> None:
    assert export_model(mlp(), torch.randn(2, 4), out_dir=tmp_path, formats=[]) == []


def test_models_without_tensor_outputs_are_refused(tmp_path: Path) -> None:
    class Mute(nn.Linear):
        def forward(self, x: Tensor) -> int:
            return 3

    with pytest.raises(ExportError, match="returned a int without a tensor"):
        export_model(Mute(4, 4), torch.randn(2, 4), out_dir=tmp_path, formats=["pt2"])


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime': pip install 'secateur\[onnx\]'"):
        export_model(mlp(), torch.randn(2, 4), out_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expected", "found", "gap"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.5], [0.25], 0.25),  # absolute below one
        ([100.0, 1.0], [100.0, 2.0], 0.01),  # relative to the largest above
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 0.0),
        ([math.nan], [0.0], math.inf),
        ([0.0], [math.nan], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([math.inf, 4.0], [math.inf, 3.0], 0.25),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], math.inf),
    ],
    ids=range(10),
)
def test_difference_by_hand(expected: list[float], found: list[float], gap: float) -> None:
    assert difference(torch.tensor(expected), torch.tensor(found)) == pytest.approx(gap)


def test_difference_of_other_dtypes() -> None:
    assert difference(torch.tensor([2**62, 5]), torch.tensor([2**62, 7])) == pytest.approx(2 / 2**62)
    assert difference(torch.tensor([True]), torch.tensor([False])) == 1.0
    assert difference(torch.tensor([1 + 1j]), torch.tensor([1 + 1.5j])) == pytest.approx(0.5 / math.sqrt(2))
    assert difference(torch.tensor([1]), torch.tensor([1.0])) == math.inf


def test_other_values_stay_in_the_range_of_the_given() -> None:
    generator = torch.Generator().manual_seed(0)
    floats = torch.tensor([[0.25, 0.5], [0.3, 0.75]], dtype=torch.float16)
    other = _other_values(floats, generator)
    assert (other.shape, other.dtype) == (floats.shape, floats.dtype)
    assert 0.25 <= float(other.min()) <= float(other.max()) <= 0.75
    assert not torch.equal(other, floats)
    ids = torch.tensor([[5, 1, 4], [9, 2, 6]])
    assert sorted(_other_values(ids, generator).flatten().tolist()) == [1, 2, 4, 5, 6, 9]
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert _other_values(mask, generator).sum(-1).tolist() == [1, 2]
    bias = torch.tensor([[0.0, -math.inf, 1.0]])
    assert sorted(_other_values(bias, generator).flatten().tolist()) == [-math.inf, 0.0, 1.0]
    assert not torch.equal(_other_values(torch.ones(50), generator), torch.ones(50))
    assert _other_values(torch.empty(0, 3), generator).shape == (0, 3)
    assert _other_values(torch.tensor(True), generator).item() is True
