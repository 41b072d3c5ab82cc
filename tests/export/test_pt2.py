"""torch.export files, loaded again by torch alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export import export_model
from secateur.export import pt2 as pt2_module

from .models import Branch, Convolutional, Noise, OneBatch, Peek, Structured, TiedDict, mlp, prune_half, transformer


def load(path: Path) -> nn.Module:
    return torch.export.load(path).module()


@pytest.mark.parametrize(
    ("build", "shape"),
    [(mlp, (2, 4)), (mlp, (1, 3, 4)), (Convolutional, (3, 1, 6, 6)), (transformer, (2, 5, 8))],
    ids=["mlp", "mlp with time", "convolutions", "transformer"],
)
def test_a_model_with_one_input(build: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    masks = prune_half(model)
    (made,) = export_model(model, torch.randn(shape), out_dir=tmp_path, formats=["pt2"], masks=masks)
    assert made.notes == ()
    assert made.max_difference < 1e-5
    x = torch.randn(9, *shape[1:])
    assert torch.allclose(load(made.path)(x), model.eval()(x), atol=1e-5)
    stored = torch.export.load(made.path).state_dict
    for name, mask in masks.items():
        assert int((stored[name][~mask] != 0).sum()) == 0


def test_a_dict_of_outputs_and_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TiedDict()
    given = {"shift": torch.randn(2, 5), "times": 3, "scale": torch.randn(2, 5)}
    ids = torch.randint(0, 10, (2, 5))
    (made,) = export_model(model, (ids,), given, out_dir=tmp_path, formats=["pt2"], masks=prune_half(model))
    found, expected = load(made.path)(ids, **given), model(ids, **given)
    assert torch.allclose(found["logits"], expected["logits"], atol=1e-6)
    assert torch.equal(found["stats"][1], expected["stats"][1])
    assert found["none"] is None
    assert found["count"] == 3


def test_one_tensor_given_twice_stays_two_inputs(tmp_path: Path) -> None:
    model, x, y = Structured(), torch.randn(3, 4), torch.randn(2, 4)
    (made,) = export_model(model, (x, x), out_dir=tmp_path, formats=["pt2"])
    found = load(made.path)(y, -y)
    expected = model(y, -y)
    assert found["count"] == 3  # a dataclass that PyTorch does not know becomes a dict
    assert torch.allclose(found["first"], expected.first)
    assert torch.equal(found["rest"][1], expected.rest[1])
    assert "forward" not in vars(model)


def test_a_batch_size_that_must_be_fixed_is_told(tmp_path: Path) -> None:
    (one,) = export_model(OneBatch(), torch.randn(3, 4), out_dir=tmp_path, formats=["pt2"])
    assert one.notes[0].startswith("pt2: the batch size is fixed, because the model itself does not run with batch")
    (two,) = export_model(Branch(), torch.randn(3, 4), out_dir=tmp_path, formats=["pt2"])
    assert "an open batch size failed: output 'output' differs from the model's by" in two.notes[0]
    assert "2 inputs" in two.checked

    class Shared(nn.Linear):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return super().forward(x) + table[0]

    (three,) = export_model(Shared(4, 4), (torch.randn(3, 4), torch.randn(5, 4)), out_dir=tmp_path, formats=["pt2"])
    assert "share no first dimension (shapes: (3, 4), (5, 4))" in three.notes[0]


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (Peek(), [torch.rand(3, 4)], "torch.export cannot capture the model"),
        (Noise(), [torch.rand(3, 4), torch.tensor(1.0)], r"pt2: output 'output' differs.*random numbers"),
    ],
    ids=["peek", "noise"],
)
def test_what_cannot_be_exported_leaves_nothing(
    model: nn.Module, args: list[Tensor], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        export_model(model, args, out_dir=tmp_path, formats=["pt2"])
    assert list(tmp_path.iterdir()) == []
    assert "forward" not in vars(model)


def test_the_file_holds_neither_paths_nor_inputs(tmp_path: Path) -> None:
    secret = torch.full((2, 4), 1234.5678)
    (made,) = export_model(mlp(), secret, out_dir=tmp_path, formats=["pt2"])
    with zipfile.ZipFile(made.path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert b".py" not in content
    assert secret[0, :2].numpy().tobytes() not in content


def test_a_file_with_a_changed_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    masks = prune_half(model)
    real = torch.export.load

    def damaged(file: object) -> torch.export.ExportedProgram:
        program = real(file)
        name = next(iter(masks))
        with torch.no_grad():
            program.state_dict[name][~masks[name]] = 1e-9  # too small to be seen in the outputs
        return program

    monkeypatch.setattr(pt2_module.torch.export, "load", damaged)
    with pytest.raises(ExportError, match=r"pt2: pruned weights are not zero in '0.weight'"):
        export_model(model, torch.randn(2, 4), out_dir=tmp_path, formats=["pt2"], masks=masks)
    assert list(tmp_path.iterdir()) == []
