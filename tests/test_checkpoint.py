"""Checkpoints: exact round trips, atomic writes, models into the user's own class, random states."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.checkpoint import (
    capture_rng,
    check_masks,
    load_masks,
    load_model,
    load_tree,
    load_weights,
    nonzero_pruned,
    read_metadata,
    read_model,
    remove_stale,
    restore_rng,
    save_masks,
    save_model,
    save_tree,
    write_atomic,
)
from secateur.errors import CheckpointError, WeightError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
]


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bit pattern that the dtype has: NaN payloads, infinities, subnormals."""
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (data % 2 if dtype == torch.bool else data).view(dtype).reshape(shape)


def bits(value: object) -> object:
    """A value that is equal exactly when the original is equal in type and in every bit."""
    if isinstance(value, Tensor):
        flat = value.detach().resolve_conj().resolve_neg().contiguous().flatten()
        return ("tensor", str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, dict):
        return ("dict", [(bits(k), bits(v)) for k, v in value.items()])
    if isinstance(value, list | tuple):
        return (type(value).__name__, [bits(item) for item in value])
    return (type(value).__name__, value)


def tensors() -> st.SearchStrategy[Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(random_tensor, st.sampled_from(DTYPES), shapes, st.integers(0, 99))


def trees() -> st.SearchStrategy[object]:
    keys = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=3) | st.floats()
    keys = keys | st.tuples(st.integers(), st.text(max_size=3))
    leaves = keys | st.integers(-(1 << 2000), 1 << 2000) | st.binary(max_size=40) | tensors()
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=12,
    )


@given(tree=trees())
@settings(max_examples=80, deadline=None)
def test_any_tree_comes_back_bit_for_bit(tree: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    save_tree(path, tree)
    assert bits(load_tree(path)) == bits(tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [[], [0], [3, 0, 2], [257], [4, 6]], ids=str)
def test_every_dtype_and_shape_is_exact(dtype: torch.dtype, shape: list[int], tmp_path: Path) -> None:
    tensor = random_tensor(dtype, shape, seed=5)
    save_tree(tmp_path / "t", {"x": tensor})
    assert bits(load_tree(tmp_path / "t")) == bits({"x": tensor})


def test_special_values_keep_their_kind(tmp_path: Path) -> None:
    tree = {
        "floats": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308, 0.1],
        "payload": struct.unpack(">d", bytes.fromhex("fff800000000beef"))[0],
        "ints": (2**63, -(2**63), 2**63 - 1, 10**5000, True, 1, False, 0),
        3: {(1, "a"): None, b"k": b"", 2.5: b"\x00\xff", None: "\ud800 lone", True: ()},
    }
    save_tree(tmp_path / "t", tree)
    assert bits(load_tree(tmp_path / "t")) == bits(tree)


def test_state_dicts_of_an_optimizer_resume(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 3)
    save_tree(tmp_path / "t", {"m": model.state_dict(), "o": optimizer.state_dict(), "rng": capture_rng()})
    train(model, optimizer, 3)
    resumed, fresh = build()
    saved = load_tree(tmp_path / "t")
    assert list(saved["o"]["state"]) == [0, 1, 2, 3, 4, 5]
    resumed.load_state_dict(saved["m"])
    fresh.load_state_dict(saved["o"])
    restore_rng(saved["rng"])
    train(resumed, fresh, 3)
    assert bits(resumed.state_dict()) == bits(model.state_dict())
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


def test_views_are_small_and_equal_views_are_one_object(tmp_path: Path) -> None:
    big = torch.arange(1_000_000.0)
    view, column = big[10:20], torch.arange(12.0).reshape(3, 4)[:, 1]
    conjugate = torch.tensor([1 + 2j]).conj()
    save_tree(tmp_path / "t", [view, big[10:20], column, view.view(2, 5), conjugate, view.expand(2, 10), view])
    assert (tmp_path / "t").stat().st_size < 4000
    a, b, c, d, e, f, g = load_tree(tmp_path / "t")
    assert a is b is g
    assert d is not a
    assert torch.equal(a, torch.arange(10.0, 20.0))
    assert c.tolist() == [1.0, 5.0, 9.0]
    assert d.shape == (2, 5)
    assert e.tolist() == [1 - 2j]
    assert f.tolist() == [list(range(10, 20))] * 2
    assert a.untyped_storage().nbytes() == 40
    a.add_(1)  # memory of its own: the file stays what it was
    assert load_tree(tmp_path / "t")[0][0] == 10.0


def test_a_bool_tensor_with_odd_bytes_can_be_read_again(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", torch.tensor([0, 7, 1], dtype=torch.uint8).view(torch.bool))
    assert load_tree(tmp_path / "t").tolist() == [False, True, True]


def test_two_empty_tensors_stay_two(tmp_path: Path) -> None:
    one, two = torch.empty(0, 3), torch.empty(2, 0, dtype=torch.int8)
    save_tree(tmp_path / "t", [one, two, one])
    a, b, c = load_tree(tmp_path / "t")
    assert a is c
    assert (a.shape, b.shape, b.dtype) == ((0, 3), (2, 0), torch.int8)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"x": torch.arange(3), "y": 1}, metadata={"note": "hällo"})
    assert torch.equal(load_file(tmp_path / "t")["t0"], torch.arange(3))
    assert read_metadata(tmp_path / "t") == {"note": "hällo"}
    with safe_open(tmp_path / "t", framework="np") as file:
        assert file.metadata()["secateur.format"] == "tree 1"


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": [1, {2, 3}]}, r"tree\['a'\]\[1\].*set"),
        ([np.float64(1.0)], r"tree\[0\].*numpy.float64.*item\(\)"),
        ({"a": np.zeros(2)}, r"tree\['a'\].*ndarray.*from_numpy"),
        ({frozenset(): 1}, "frozenset cannot be saved as a key"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (OrderedDict(f=len), "builtin_function_or_method"),
    ],
    ids=range(7),
)
def test_values_that_cannot_be_saved_are_named(tree: object, place: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=place):
        save_tree(tmp_path / "t", tree)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dequantize"):
        save_tree(tmp_path / "t", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


def test_a_tree_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested deeper than 100"):
        save_tree(tmp_path / "t", loop)


@pytest.mark.parametrize("metadata", [{"secateur.x": "1"}, {"a": 1}, {"a": "\ud800"}], ids=["ours", "int", "surrogate"])
def test_bad_metadata_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="metadata"):
        save_tree(tmp_path / "t", 1, metadata=metadata)


# --- atomic writes


class _Bug(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, _Bug], ids=["interrupt", "bug"])
def test_a_writer_that_fails_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        assert path.name == f".f.{os.getpid()}.tmp"
        assert remove_stale(tmp_path) == []  # a file being written is not stale
        raise error

    write_atomic(tmp_path / "f", b"old")
    with pytest.raises(error):
        write_atomic(tmp_path / "f", fails)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


def test_a_folder_that_is_missing_or_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    for path in (tmp_path / "no" / "f", tmp_path / "dir", Path("/"), tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError):
            write_atomic(path, b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]


def test_remove_stale_takes_only_the_leftovers_of_dead_processes(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [".a.tmp", "a.5.tmp", f".a.{os.getppid()}.tmp", f".b.{dead.pid}.tmp", ".c.99999999999999999999.tmp"]
    names.append(f".mine.{os.getpid()}.tmp")  # a dead run had our number: in a container it is often the same
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".dir.{dead.pid}.tmp").mkdir()
    (tmp_path / f".link.{dead.pid}.tmp").symlink_to(tmp_path / ".a.tmp")
    assert {p.name for p in remove_stale(tmp_path)} == set(names[3:])
    assert len(list(tmp_path.iterdir())) == 5
    assert remove_stale(tmp_path / "nowhere") == []


KILLER = """
import json, os, random, signal, sys, time
import torch
from secateur.checkpoint import load_tree, remove_stale, save_tree
folder, rounds = sys.argv[1], int(sys.argv[2])
path = os.path.join(folder, "c.safetensors")
random.seed(7)
torch.set_num_threads(1)
last, rows = 0, []
for i in range(rounds):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        version = last
        while True:
            version += 1
            data = torch.full((20000 + version * 500,), version, dtype=torch.int32)
            save_tree(path, {"version": version, "data": data, "list": [version] * (version % 50)})
            os.write(writer, b"%d\\n" % version)
    os.close(writer)
    os.read(reader, 1) if i % 3 == 0 else None
    time.sleep(random.choice([0.0, random.random() * 0.004, random.random() * 0.05]))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    done = [int(line) for line in os.fdopen(reader, "rb").read().split()]
    stale = len([n for n in os.listdir(folder) if n.endswith(".tmp")])
    removed = len(remove_stale(folder))
    left = sorted(os.listdir(folder))
    if left:
        tree = load_tree(path)
        v = tree["version"]
        whole = tree["data"].tolist() == [v] * (20000 + v * 500) and tree["list"] == [v] * (v % 50)
    else:
        v, whole = 0, True
    # The first digit was taken from the pipe, so the first number may be cut: look at the last one.
    known = done[-1] if len(done) > 1 else last
    rows.append({"version": v, "known": known, "whole": whole, "stale": stale, "removed": removed, "left": left})
    last = v
print(json.dumps(rows))
"""


def test_killed_at_any_instant_the_last_checkpoint_survives(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "24"], capture_output=True, text=True, timeout=60, check=True
    )
    rows = json.loads(out.stdout)
    assert len(rows) == 24
    for row in rows:
        assert row["whole"]
        assert row["known"] <= row["version"]  # what was reported as saved is still there
        assert row["removed"] == row["stale"]
        assert row["left"] in ([], ["c.safetensors"])
    assert rows[-1]["version"] > 10
    assert any(row["stale"] for row in rows), "no kill hit a write: the test proves nothing"


def test_a_file_size_limit_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"x": torch.arange(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"t: could not be written.*needs 4000\d\d\d bytes and \d+ bytes are fr"
        ):
            save_tree(tmp_path / "t", {"x": torch.zeros(1_000_000)})
        with pytest.raises(CheckpointError, match=r"needs 100000 bytes.*65536 were written.*previous file"):
            write_atomic(tmp_path / "t", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert torch.equal(load_tree(tmp_path / "t")["x"], torch.arange(10))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.decode().strip()}")
    try:
        save_tree(tmp_path / "t", {"x": torch.arange(10_000)})
        with pytest.raises(CheckpointError, match=r"No space left.*needs 80\d\d\d bytes and \d{5} bytes are free"):
            save_tree(tmp_path / "t", {"x": torch.zeros(10_000, dtype=torch.int64)})
        assert [p.name for p in tmp_path.iterdir()] == ["t"]
        assert torch.equal(load_tree(tmp_path / "t")["x"], torch.arange(10_000))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- models and masks


class Tied(nn.Module):
    def __init__(self, *, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = Tied()
    save_model(tmp_path / "m.safetensors", model, metadata={"a": "b"})
    stored = load_file(tmp_path / "m.safetensors")
    assert "embed.weight" in stored
    assert "head.weight" not in stored
    for other in (Tied(), Tied(tie=False)):
        load_model(other, tmp_path / "m.safetensors")
        assert other.head.weight is other.embed.weight
        assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
        assert isinstance(other.head.weight, nn.Parameter)
    loaded = read_model(tmp_path / "m.safetensors")
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert read_metadata(tmp_path / "m.safetensors") == {"a": "b"}


def test_a_model_that_does_not_fit_is_told_why_and_untouched(tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", nn.Sequential(OrderedDict(fc=nn.Linear(3, 2), out=nn.Linear(2, 2))))
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 2), out1=nn.Linear(2, 2).half()))
    before = bits(dict(model.state_dict()))
    with pytest.raises(CheckpointError) as caught:
        load_model(model, tmp_path / "m.safetensors")
    text = str(caught.value)
    assert "missing: 'out1.weight', 'out1.bias'" in text
    assert "did you mean 'out.weight'?" in text
    assert "unexpected: 'out." in text
    assert "'fc.weight' is (2, 3) and the model has (2, 4)" in text
    assert bits(dict(model.state_dict())) == before
    other = nn.Sequential(OrderedDict(fc=nn.Linear(3, 2).half(), out=nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"'fc.weight' is torch.float32 and the model has torch.float16"):
        load_model(other, tmp_path / "m.safetensors")


def test_a_model_that_ties_what_the_file_has_apart_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", Tied(tie=False))
    with pytest.raises(CheckpointError, match=r"ties 'head.weight' to 'embed.weight', and the file has different"):
        load_model(Tied(), tmp_path / "m.safetensors")


def test_a_buffer_tied_to_a_parameter_is_not_lost_quietly(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, *, tie: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("copy", self.weight.data if tie else torch.zeros(2))

    save_model(tmp_path / "m.safetensors", Odd(tie=True))
    load_model(Odd(tie=True), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"'copy' and 'weight' were tied.*buffer"):
        load_model(Odd(tie=False), tmp_path / "m.safetensors")


def test_saving_a_model_checks_the_masks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    masks = {"0.weight": torch.tensor([[True, False, True], [True, True, False]])}
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match=r"not zero: 0.weight: 2; apply the masks"):
        save_model(path, model, masks=masks)
    assert not path.exists()
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = torch.tensor([-0.0, 0.0])
    save_model(path, model, masks=masks)
    assert nonzero_pruned(load_file(path), masks) == {}
    assert nonzero_pruned({"0.weight": torch.full((2, 3), math.nan)}, masks) == {"0.weight": 2}


def test_a_view_saves_its_elements_only(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.randn(1000, 3)[::500])
    save_model(tmp_path / "m.safetensors", model)
    assert (tmp_path / "m.safetensors").stat().st_size < 1000
    assert torch.equal(load_file(tmp_path / "m.safetensors")["weight"], model.weight)


def test_models_that_hold_more_than_tensors_are_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(CheckpointError, match=r"_extra_state: the state dict holds a dict"):
        save_model(tmp_path / "m.safetensors", Extra(2, 2))
    with pytest.raises(CheckpointError, match="meta device"):
        save_model(tmp_path / "m.safetensors", nn.Linear(2, 2, device="meta"))
    save_model(tmp_path / "m.safetensors", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="meta device"):
        load_model(nn.Linear(2, 2, device="meta"), tmp_path / "m.safetensors")


def test_masks_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    masks = {"0.weight": torch.rand(2, 3) > 0.5, "0.bias": torch.tensor([True, False])}
    save_masks(tmp_path / "k", masks, metadata={"density": "0.5"})
    loaded = load_masks(tmp_path / "k")
    assert bits(loaded) == bits(dict(sorted(masks.items())))
    check_masks(nn.Sequential(nn.Linear(3, 2)), loaded)
    with pytest.raises(WeightError, match="mask of shape"):
        check_masks(nn.Sequential(nn.Linear(4, 2)), loaded)
    with pytest.raises(CheckpointError, match=r"0.weight: a mask of torch.float32"):
        save_masks(tmp_path / "k", {"0.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="this is a masks file; expected a model file"):
        load_model(nn.Linear(2, 2), tmp_path / "k")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "old.pt"])
def test_weights_of_any_origin(name: str, tmp_path: Path) -> None:
    source, path = Tied(), tmp_path / name
    state = {k: v.clone() for k, v in source.state_dict().items()}
    if name == "w.safetensors":
        del state["head.weight"]  # as other programs write ties: the model knows better
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=name != "old.pt")
    model = Tied()
    load_weights(model, path)
    assert bits(dict(model.state_dict())) == bits(dict(source.state_dict()))
    assert model.head.weight is model.embed.weight


def test_weights_of_our_own_file(tmp_path: Path) -> None:
    source, model = Tied(), Tied(tie=False)
    save_model(tmp_path / "m.safetensors", source)
    load_weights(model, tmp_path / "m.safetensors")
    assert model.head.weight is model.embed.weight
    with pytest.raises(CheckpointError, match=r"unknown suffix '.bin'; expected '.safetensors'"):
        load_weights(model, tmp_path / "m.bin")


# --- random generators


def test_random_states_travel_through_a_file(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.normal()  # leaves a cached second value behind
    save_tree(tmp_path / "t", capture_rng())
    expected = [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()]
    restore_rng(load_tree(tmp_path / "t"))
    again = [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()]
    assert again == expected


@pytest.mark.parametrize("part", ["torch", "numpy", "python", "cuda"])
def test_a_wrong_random_state_changes_nothing(part: str) -> None:
    state = capture_rng()
    torch.rand(1), np.random.rand(), random.random()
    before = bits(capture_rng())
    wrong = {**state, part: [torch.zeros(3)] * 9 if part == "cuda" else "?"}
    with pytest.raises(CheckpointError, match="random"):
        restore_rng(wrong)
    with pytest.raises(CheckpointError, match="not a state"):
        restore_rng({k: v for k, v in state.items() if k != part})
    assert bits(capture_rng()) == before


class Versioned(nn.Module):
    """Refuses a state of another version than its own, as some published networks do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be 2, got {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_ask_for_the_version_of_their_state(tmp_path: Path) -> None:
    one, other = nn.Sequential(Versioned()), nn.Sequential(Versioned())
    save_model(tmp_path / "model.safetensors", one)
    load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(one[0].layer.weight, other[0].layer.weight)
    load_weights(other, tmp_path / "model.safetensors")
