"""``secateur export``: files, their checks, and refusals."""

from __future__ import annotations

import pytest
import torch


def test_a_run_to_onnx_is_run_by_onnx_runtime(call, finished):
    import onnxruntime

    shown = call("export", finished, "--format", "onnx", "--format", "safetensors", "--json")
    assert shown.code == 0, shown.err
    by_format = {item["format"]: item for item in shown.json()}
    assert by_format["onnx"]["max_difference"] < 1e-4
    assert "onnxruntime" in by_format["onnx"]["checked"]
    path = finished / "exports" / "model.onnx"
    assert path.stat().st_size == by_format["onnx"]["size_bytes"]
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: torch.zeros(1, 4, 4, 4).numpy()})
    assert out.shape == (1, 3)


def test_a_model_with_an_input_shape(call, workspace):
    shown = call("export", "net.py:make", "-f", "pt2", "-f", "safetensors", "--input", "2,4,4,4", "--out", "x")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert {p.name for p in (workspace / "x").iterdir()} == {"model.pt2", "model.safetensors"}
    assert "max difference" in shown.out


def test_weights_alone_need_no_input(call, workspace):
    assert call("export", "net.py:make", "-f", "safetensors").code == 0
    assert (workspace / "exports" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["net.py:make"], "say --format"),
        (["net.py:make", "-f", "onnx"], "--input"),
        (["net.py:make", "-f", "onxx", "--input", "1,4,4,4"], "did you mean 'onnx'?"),
        (["net.py:make", "-f", "onnx", "--input", "x"], "--input x"),
        (["nowhere", "-f", "onnx"], "expected package.module:factory"),
    ],
)
def test_refusals(call, workspace, argv, said):
    shown = call("export", *argv)
    assert (shown.code, shown.out) == (2, "")
    assert said in shown.err
    assert not (workspace / "exports").exists()


def test_weights_that_are_not_zero_where_the_mask_says_so(call, finished):
    shown = call("export", finished, "--weights", finished / "dense.safetensors", "-f", "safetensors")
    assert shown.code == 2
    assert "zero" in shown.err
