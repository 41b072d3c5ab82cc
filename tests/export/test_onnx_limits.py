"""Where ONNX differs from the model in form, in values, or in what it can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ExportError
from secateur.export import export_model

from .models import Noise, OneBatch, prune_half


def test_moved_weights_are_found_by_their_values(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.LSTM(4, 3, batch_first=True)
    (made,) = export_model(model, torch.randn(2, 5, 4), out_dir=tmp_path, formats=["onnx"], masks=prune_half(model))
    assert made.notes == ()  # the gates are in another order there


def test_a_wrong_file_is_not_kept_and_the_old_one_is(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(
        ExportError, match=r"onnx: output 'output' differs from the model's by 0\.\d+ on the given inputs"
    ):
        export_model(Noise(), (torch.randn(3, 4), torch.tensor(1.0)), out_dir=tmp_path, formats=["onnx"])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_a_dtype_that_the_runtime_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"onnx: .*(NOT_IMPLEMENTED|bfloat16|BFloat16)"):
        export_model(OneBatch().bfloat16(), torch.randn(3, 4).bfloat16(), out_dir=tmp_path, formats=["onnx"])
    assert list(tmp_path.iterdir()) == []
