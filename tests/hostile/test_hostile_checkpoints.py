"""Files made to mislead: each is refused with its path and the reason, and none of them runs anything."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur._files import checksum
from secateur.checkpoint import (
    load_masks,
    load_model,
    load_tree,
    load_weights,
    read_metadata,
    read_model,
    save_masks,
    save_model,
    save_tree,
)
from secateur.errors import CheckpointError

READERS = [load_tree, load_masks, read_model, lambda path: load_model(nn.Linear(2, 2), path)]


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def container(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str = "U8", shape: tuple[Any, ...] = (2,), offsets: tuple[Any, ...] = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def table(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length only": struct.pack("<Q", 0),
    "huge length": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "length beyond the file": container(b"{}", length=1000),
    "length beyond the limit, sparse": container(b"{}", length=200_000_000),
    "wrong magic": b"\x7fELF" + bytes(100),
    "text": b"<html>not found</html>" * 20,
    "not JSON": container(b"{nonsense"),
    "not Unicode": container(b'{"\xff\xfe":1}'),
    "a list": container(b"[]"),
    "NaN": container(b'{"a":NaN}'),
    "digits": container(b'{"a":' + b"9" * 10_000 + b"}"),
    "nested lists": container(b'{"a":' + b"[" * 500_000),
    "nested objects": container(b'{"a":' * 200_000),
    "metadata nested": container(table(__metadata__={"a": {"b": "c"}})),
    "metadata list": container(table(__metadata__=["a"])),
    "same name twice": container(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"ab"),
    "no offsets": container(table(a={"dtype": "U8", "shape": [2]}), b"ab"),
    "an entry more": container(table(a={**entry(), "x": 1}), b"ab"),
    "unknown dtype": container(table(a=entry("F3")), b"ab"),
    "dtype of no text": container(table(a=entry(["U8"])), b"ab"),  # type: ignore[arg-type]
    "negative shape": container(table(a=entry(shape=(-2,))), b"ab"),
    "huge shape": container(table(a=entry(shape=(1 << 62, 1 << 62))), b"ab"),
    "huge empty shape": container(table(a=entry(shape=(0, 1 << 63), offsets=(0, 0)))),
    "large shape": container(table(a=entry(shape=(1 << 47,))), b"ab"),
    "true as a size": container(table(a=entry(shape=(True, 2))), b"ab"),
    "offsets backwards": container(table(a=entry(offsets=(2, 0))), b"ab"),
    "offsets beyond the file": container(table(a=entry(offsets=(0, 1 << 40), shape=(1 << 40,))), b"ab"),
    "three offsets": container(table(a=entry(offsets=(0, 1, 2))), b"ab"),
    "overlap": container(table(a=entry(), b=entry(offsets=(1, 3))), b"abc"),
    "hole": container(table(a=entry(), b=entry(offsets=(3, 5))), b"abcde"),
    "bytes left over": container(table(a=entry()), b"abc"),
    "bool of 7": container(table(a=entry("BOOL")), b"\x07\x01"),
    "format without checksum": container(table(__metadata__={"secateur.format": "tree 1"})),
    "checksum without format": container(table(__metadata__={"secateur.checksum": "00"})),
    "wrong checksum": container(table(__metadata__={"secateur.format": "model 1", "secateur.checksum": "00"})),
}


@contextmanager
def little_memory() -> Iterator[None]:
    """Let a reader that believes a length fail at once: 1 GiB more than now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_reader_refuses(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[name])
    if "sparse" in name:
        os.truncate(path, 300_000_000)
    with little_memory():
        for read in READERS:
            with pytest.raises(CheckpointError, match=r"bad\.safetensors: .{10,}"):
                read(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "fifo", tmp_path / "loop", Path("/dev/null"), "a\0b"):
        for read in (*READERS, read_metadata):
            with pytest.raises(CheckpointError):
                read(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"a": torch.tensor([1.5, -2.0]), "b": [1, True, None]})
    save_model(tmp_path / "m", nn.Linear(1, 1))
    save_masks(tmp_path / "k", {"w": torch.tensor([True, False])})
    for name, read in (("t", load_tree), ("m", read_model), ("k", load_masks)):
        good = (tmp_path / name).read_bytes()
        missed = []
        for place in range(0, len(good) * 8, 1 if name == "k" else 5):
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            (tmp_path / "bad").write_bytes(bad)
            try:
                read(tmp_path / "bad")
            except CheckpointError:
                continue
            missed.append((place, bytes(bad[place // 8 - 3 : place // 8 + 3])))
        assert missed == []


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"a": torch.arange(8), "b": (1, 2)})
    good = (tmp_path / "t").read_bytes()
    for size in range(len(good)):
        (tmp_path / "bad").write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            load_tree(tmp_path / "bad")


def forged(path: Path, structure: object, tensors: dict[str, Tensor], kind: str = "tree 1") -> Path:
    """A file with a right checksum: nothing but the structure is wrong."""
    text = {"secateur.format": kind}
    if structure is not None:
        text["secateur.tree"] = structure if isinstance(structure, str) else json.dumps(structure)
    text["secateur.checksum"] = checksum(tensors, text)
    save_file(tensors, path, metadata=text)
    return path


T0 = {"t0": torch.zeros(3, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("structure", "tensors", "reason"),
    [
        (None, T0, "structure"),
        ("[", {}, "damaged"),
        ([], {}, "damaged"),
        ({"tree": 1, "raw": {}}, {}, "count"),
        ({"tree": 1, "count": 2, "raw": {}}, T0, r"missing: \['t1'\]"),
        ({"tree": 1, "count": 0, "raw": {}}, T0, r"unexpected: \['t0'\]"),
        ({"tree": 1, "count": 1 << 70, "raw": {}}, T0, "tensors expected"),
        ({"tree": 1, "count": "1", "raw": {}}, T0, "damaged"),
        ({"tree": {"t": 1}, "count": 1, "raw": {}}, T0, "t1"),
        ({"tree": {"t": [0]}, "count": 1, "raw": {}}, T0, "damaged"),
        ({"tree": {"x": 1}, "count": 0, "raw": {}}, {}, "unknown tag 'x'"),
        ({"tree": {"t": 0, "u": []}, "count": 1, "raw": {}}, T0, "one key"),
        ({"tree": {"u": 5}, "count": 0, "raw": {}}, {}, "damaged"),
        ({"tree": {"d": [[1]]}, "count": 0, "raw": {}}, {}, "damaged"),
        ({"tree": {"d": [[[], 1]]}, "count": 0, "raw": {}}, {}, "unhashable"),
        ({"tree": {"d": [["a", 1], ["a", 2]]}, "count": 0, "raw": {}}, {}, "twice"),
        ({"tree": {"i": "os.system"}, "count": 0, "raw": {}}, {}, "damaged"),
        ({"tree": {"f": "00"}, "count": 0, "raw": {}}, {}, "8 bytes"),
        ({"tree": {"f": 1}, "count": 0, "raw": {}}, {}, "damaged"),
        ({"tree": {"t": 0}, "count": 1, "raw": {"t0": ["complex128", [1]]}}, T0, "damaged"),
        ({"tree": {"t": 0}, "count": 1, "raw": {"t0": ["load", [3]]}}, T0, "load"),
        ({"tree": {"t": 0}, "count": 1, "raw": {"t7": ["complex32", [3]]}}, T0, "t7"),
        ({"tree": {"t": 0}, "count": 1, "raw": [1]}, T0, "damaged"),
        ('{"count":0,"raw":{},"tree":' + "[" * 300 + "]" * 300 + "}", {}, "deeper than 100"),
        ('{"count":0,"raw":{},"tree":' + '{"u":[' * 300 + "]}" * 300 + "}", {}, "deeper than 100"),
        ('{"count":0,"raw":{},"tree":' + '{"d":[[1,' * 300 + "1" + "]]}" * 300 + "}", {}, "deeper than 100|recursion"),
        ("[" * 200_000, {}, "recursion"),
    ],
    ids=range(27),
)
def test_a_structure_that_lies_is_refused(
    structure: object, tensors: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)f: .*{reason}"):
        load_tree(forged(tmp_path / "f", structure, tensors))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tree 2", "version 2.*upgrade"),
        ("tree 0", "version 0"),
        ("masks 1", "masks file; expected a tree"),
        ("x", "damaged"),
    ],
)
def test_another_version_or_kind_is_refused(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_tree(forged(tmp_path / "f", {"tree": 1, "count": 0, "raw": {}}, {}, kind))
    with pytest.raises(CheckpointError):
        read_model(forged(tmp_path / "f", {"tree": 1, "count": 0, "raw": {}}, {}, kind))


@pytest.mark.parametrize(
    "aliases", ["[]", "5", '{"b": "c"}', '{"a": "a"}', '{"b": ["a"]}', "[" * 200_000], ids=range(6)
)
def test_ties_that_lie_are_refused(aliases: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    text = {"secateur.format": "model 1", "secateur.aliases": aliases}
    save_file(tensors, tmp_path / "f", metadata={**text, "secateur.checksum": checksum(tensors, text)})
    with pytest.raises(CheckpointError, match="tied names"):
        read_model(tmp_path / "f")


def test_masks_of_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"t0: a mask of torch\.uint8"):
        load_masks(forged(tmp_path / "f", None, T0, "masks 1"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("p.safetensors", "p.pt"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
        with pytest.raises(CheckpointError, match=r"refused|not a safetensors file"):
            load_weights(nn.Linear(2, 2), path)
    for name, zipped in (("z.pt", True), ("z.pth", False), ("z.safetensors", True)):
        torch.save({"weight": Bomb(mark)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="refused"):
            load_weights(nn.Linear(2, 2), tmp_path / name)
    assert not mark.exists()
    with (tmp_path / "p.pt").open("rb") as file:
        pickle.load(file)  # noqa: S301 - the bomb does work
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, r"state_dict: dict, epoch: int.*by itself"),
        ({1: torch.ones(2)}, "not a state dict"),
        ({"weight": torch.eye(2).to_sparse(), "bias": torch.ones(2)}, "to_dense"),
        ({"weight": torch.ones(2, 2)}, "missing: 'bias'"),
    ],
)
def test_torch_files_that_are_no_state_dict(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=reason):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files_give_one_error(zipped: bool, tmp_path: Path) -> None:
    path, rng = tmp_path / "w.pt", random.Random(5)
    torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    refused = 0
    for i in range(300):
        bad = bytearray(good[: rng.randrange(len(good))] if i % 3 == 0 else good)
        for _ in range(rng.choice([0, 1, 4, 30]) if bad else 0):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            load_weights(nn.Linear(2, 2), path)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_an_archive_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("../../evil", "x")
    (tmp_path / "e.pt").write_bytes(b"")
    for name in ("w.pt", "e.pt", "none.pt"):
        with pytest.raises(CheckpointError):
            load_weights(nn.Linear(2, 2), tmp_path / name)
