"""ONNX files, read again by onnx and onnxruntime on their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from secateur.export import export_model

from .models import Convolutional, TiedDict, prune_half, transformer


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_convolutions_with_batch_norm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Convolutional()
    masks = prune_half(model)
    (made,) = export_model(
        model, torch.randn(1, 1, 6, 6), out_dir=tmp_path / "new" / "dir", formats=["onnx"], masks=masks
    )
    assert made.path == tmp_path / "new" / "dir" / "model.onnx"
    assert made.size_bytes == made.path.stat().st_size
    assert made.notes == ()
    assert 0 <= made.max_difference < 1e-5
    assert "onnxruntime" in made.checked
    assert "4 inputs" in made.checked
    x = torch.randn(5, 1, 6, 6)
    (y,) = session(made.path).run(None, {"x": x.numpy()})
    assert y == pytest.approx(model.eval()(x).detach().numpy(), abs=1e-5)
    stored = onnx.load(made.path)
    assert [d.dim_param or d.dim_value for d in stored.graph.input[0].type.tensor_type.shape.dim] == ["batch", 1, 6, 6]
    assert [v.name for v in stored.graph.output] == ["output"]
    weights = {t.name: numpy_helper.to_array(t) for t in stored.graph.initializer}
    for name in ("conv.weight", "depth.weight", "fc.weight"):
        assert np.count_nonzero(weights[name][~masks[name].numpy()]) == 0
        assert np.count_nonzero(weights[name]) > 0
    assert [p.name for p in made.path.parent.iterdir()] == ["model.onnx"]  # no external data
    assert str(Path(__file__).parent).encode() not in made.path.read_bytes()  # nothing of this machine
    assert capfd.readouterr() == ("", "")


def test_tied_weights_keywords_and_a_dict_of_outputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = TiedDict()
    masks = prune_half(model)
    inputs = {"shift": torch.randn(2, 5), "times": 3, "scale": torch.randn(2, 5)}
    (made,) = export_model(
        model, [torch.randint(0, 10, (2, 5))], inputs, out_dir=tmp_path, formats=["onnx"], masks=masks
    )
    assert made.notes == ()
    ids = torch.randint(0, 10, (7, 5))
    other = {"shift": torch.randn(7, 5), "scale": torch.randn(7, 5)}
    run = session(made.path)
    assert [value.name for value in run.get_inputs()] == ["ids", "shift", "scale"]
    names = [value.name for value in run.get_outputs()]
    assert names == ["logits", "stats_0", "stats_1", "output_shift"]
    found = run.run(None, {"ids": ids.numpy(), **{k: v.numpy() for k, v in other.items()}})
    expected = model(ids, times=3, **other)
    assert found[0] == pytest.approx(expected["logits"].detach().numpy(), abs=1e-5)
    assert found[1] == pytest.approx(expected["stats"][0].detach().numpy(), abs=1e-4)


def test_a_transformer_with_padding(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = transformer()
    masks = prune_half(model)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 8)
    (made,) = export_model(model, x, {"src_key_padding_mask": padding}, out_dir=tmp_path, formats=["onnx"], masks=masks)
    assert made.max_difference < 1e-5
    (note,) = made.notes  # the fast path writes zeros where the input is padded, and no graph does
    assert "fast path" in note
    assert torch.backends.mha.get_fastpath_enabled()
    run = session(made.path)
    names = [value.name for value in run.get_inputs()]
    (y,) = run.run(None, dict(zip(names, (x.numpy(), padding.numpy()), strict=True)))
    expected = model.eval()(x, src_key_padding_mask=padding).detach()
    assert y[~padding.numpy()] == pytest.approx(expected[~padding].numpy(), abs=1e-5)
