"""The Fashion-MNIST example and benchmark, on synthetic files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from secateur.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "fashion_mnist"
TRAIN, TEST = 256, 64


def module(path: Path) -> ModuleType:
    """Load a script under a name of its own: other examples have a `data.py` too."""
    name = f"example_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


data = module(EXAMPLE / "data.py")
models = module(EXAMPLE / "models.py")


def idx(values: np.ndarray) -> bytes:
    """Write the format by hand, as its description says."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(struct.pack(">I", n) for n in values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small files: the class is the brightness of the image, so that something can be learnt."""
    path = tmp_path_factory.mktemp("idx")
    random = np.random.default_rng(0)
    for stem, n in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(n) % 10
        images = np.clip(labels[:, None, None] * 25 + random.integers(0, 30, (n, 28, 28)), 0, 255)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            (path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(values), mtime=0))
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same files, to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_load_reads_shapes_types_and_values(folder: Path) -> None:
    loaded = data.load(folder)
    assert loaded.train_images.shape == (TRAIN, 1, 28, 28)
    assert loaded.test_images.dtype == torch.float32
    assert loaded.test_labels.dtype == torch.int64
    assert loaded.test_labels.tolist() == [i % 10 for i in range(TEST)]
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    pixel = raw[5 * 784 + 3 * 28 + 7]  # image 5, row 3, column 7
    assert float(loaded.train_images[5, 0, 3, 7]) == pytest.approx((pixel / 255 - 0.2860) / 0.3530, abs=1e-6)


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    assert data.load().source == str(folder)


def test_a_named_folder_is_never_replaced_by_another(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    with pytest.raises(DataError, match="is not a folder"):
        data.load(tmp_path / "absent")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is missing"):
        data.load(tmp_path)


def test_nowhere_names_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "a")
    monkeypatch.setattr(data, "CACHE_FOLDER", tmp_path / "b")
    with pytest.raises(DataError) as refused:
        data.load()
    for way in ("apt install dataset-fashion-mnist", "FASHION_MNIST", "download=True"):
        assert way in str(refused.value)


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        pytest.param("train-images-idx3-ubyte.gz", b"no gzip at all", "expected a gzip file", id="not gzip"),
        pytest.param("train-images-idx3-ubyte.gz", b"", "an empty file", id="empty"),
        pytest.param("t10k-labels-idx1-ubyte.gz", gzip.compress(b""), "an empty file", id="empty gzip"),
        pytest.param(
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(b"\0\0\x0d\x01" + bytes(8)),
            "00 00 0d 01",
            id="floats, not bytes",
        ),
        pytest.param(
            "t10k-labels-idx1-ubyte.gz", gzip.compress(b"\0\0\x08\x01\0\0"), "2 bytes where", id="half a header"
        ),
        pytest.param(
            "train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((4, 14, 14)))), "[4, 14, 14]", id="other size"
        ),
        pytest.param(
            "train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros(4))), "00 00 08 01", id="labels as images"
        ),
        pytest.param(
            "train-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((0, 28, 28)))), "[0, 28, 28]", id="no images"
        ),
        pytest.param(
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 2**32 - 1, 28, 28)),
            "4294967295",
            id="a header that would fill the memory",
        ),
        pytest.param("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.full(TEST, 10))), "the label 10", id="class 10"),
        pytest.param("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(3))), "3 labels", id="too few labels"),
        pytest.param(
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(idx(np.zeros(TEST)) + b"x"),
            "after the last",
            id="bytes left over",
        ),
        pytest.param(
            "t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(TEST))[:-1]), "63 bytes", id="one byte short"
        ),
    ],
)
def test_hostile_files_are_refused_by_name(copy: Path, name: str, contents: bytes, said: str) -> None:
    (copy / name).write_bytes(contents)
    with pytest.raises(DataError) as refused:
        data.load(copy)
    assert name in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("cut", [5, 20, 200, -9, -1])
def test_truncated_gzip_is_refused_wherever_it_ends(copy: Path, cut: int) -> None:
    file = copy / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        data.load(copy)


def test_a_flipped_bit_is_refused(copy: Path) -> None:
    file = copy / "train-images-idx3-ubyte.gz"
    packed = bytearray(file.read_bytes())
    packed[len(packed) // 2] ^= 1
    file.write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        data.load(copy)


def test_a_download_with_other_contents_is_not_kept(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SHA-256"):
        data.fetch("t10k-labels-idx1-ubyte.gz", tmp_path / "cache", base=folder.as_uri() + "/")
    with pytest.raises(DataError, match="failed"):
        data.fetch("t10k-labels-idx1-ubyte.gz", tmp_path / "cache", base=(tmp_path / "absent").as_uri() + "/")
    assert not list(tmp_path.rglob("*.gz*"))


def test_a_download_with_the_right_contents_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    name = "t10k-labels-idx1-ubyte.gz"
    contents = gzip.decompress((folder / name).read_bytes())
    monkeypatch.setitem(data.SHA256, name, hashlib.sha256(contents).hexdigest())
    kept = data.fetch(name, tmp_path / "cache", base=folder.as_uri() + "/")
    assert kept.read_bytes() == (folder / name).read_bytes()
    assert [p.name for p in kept.parent.iterdir()] == [name]


def test_hold_out_splits_the_training_set(folder: Path) -> None:
    loaded = data.load(folder)
    split = data.hold_out(loaded, 56, seed=3)
    assert (len(split.train_labels), len(split.test_labels)) == (200, 56)
    both = torch.cat([split.train_images, split.test_images]).flatten(1).sum(1).sort().values
    assert torch.equal(both, loaded.train_images.flatten(1).sum(1).sort().values)
    with pytest.raises(DataError, match="between 1 and 255"):
        data.hold_out(loaded, 256)


@pytest.mark.parametrize(
    ("name", "parameters", "weights"), [("lenet_300_100", 266_610, 266_200), ("lenet_5_caffe", 431_080, 430_500)]
)
def test_the_networks_have_their_published_sizes(name: str, parameters: int, weights: int) -> None:
    model = models.NETS[name]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == weights
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def run(script: Path, *words: str, cwd: Path) -> str:
    """Run a script as a user does."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_reaches_its_ratio(folder: Path, tmp_path: Path) -> None:
    words = ["--data", str(folder), "--epochs", "1", "--retrain-epochs", "1", "--rounds", "2", "--ratio", "4"]
    out = run(EXAMPLE / "train.py", *words, cwd=tmp_path)
    assert "dense:" in out
    assert "  4.0 x: accuracy" in out


def test_the_example_refuses_a_missing_data_set_in_one_line(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLE / "train.py"), "--data", str(tmp_path / "absent")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_benchmark_runs_stops_and_goes_on(folder: Path, tmp_path: Path) -> None:
    words = ["--quick", "--jobs", "1", "--data", str(folder), "--out", "out", "--cache", "cache"]
    script = ROOT / "benchmarks" / "fashion_mnist.py"
    run(script, *words, cwd=tmp_path)
    first = json.loads((tmp_path / "out" / "fashion_mnist_quick.json").read_text())
    assert len(first["cells"]) == 2 * (1 + 4 + 2 * 6)
    for cell in first["cells"]:
        if cell["key"].startswith("table/"):
            assert cell["achieved_ratio"] == pytest.approx(cell["ratio"], rel=1e-2)
            assert cell["achieved_ratio"] >= cell["ratio"]
        if cell["key"] == "dense":
            by_hand = {"lenet_300_100": 266_200, "lenet_5_caffe": 24**2 * 500 + 8**2 * 25_000 + 400_000 + 5_000}
            assert cell["macs"]["dense"] == by_hand[cell["net"]]

    # A crash in the middle of a line: that cell is computed again, with the same result, and no other.
    log = next((tmp_path / "cache").glob("lenet_300_100-*/0.jsonl"))
    log.write_text(log.read_text()[:-20])
    run(script, *words, cwd=tmp_path)
    again = json.loads((tmp_path / "out" / "fashion_mnist_quick.json").read_text())
    assert again["cells_from_cache"] == len(first["cells"]) - 1
    assert [c["accuracy"] for c in again["cells"]] == [c["accuracy"] for c in first["cells"]]

    page = (tmp_path / "out" / "fashion_mnist_quick.md").read_text()
    assert "its figures mean nothing" in page
    for plot in ("fashion_mnist_quick_compression.svg", "fashion_mnist_quick_layers.svg"):
        assert f"({plot})" in page
        assert (tmp_path / "out" / plot).read_text().startswith("<?xml")
