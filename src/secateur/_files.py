"""Files that are either the old one or the new one, and safetensors that are checked before they are believed.

Everything that the library writes goes through :func:`write_atomic`; every safetensors file that it
writes carries a format name, a version and a checksum in its metadata, under keys that start with
``secateur.``. Nothing here can execute what it reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import CheckpointError

VERSION = 1
FORMAT_KEY = "secateur.format"
CHECKSUM_KEY = "secateur.checksum"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""The dtypes that a safetensors file of ours may hold, by their names in the format."""

_TMP_NAME = re.compile(r"\..+\.([1-9][0-9]*)\.tmp", re.DOTALL)
_active: set[Path] = set()  # temporary files that this process is writing now
_active_lock = threading.Lock()


def write_atomic(path: str | Path, content: bytes | Callable[[Path], object], *, size_bytes: int | None = None) -> None:
    """Write a file so that its name holds the complete old or the complete new content at every instant.

    The content goes to ``.<name>.<pid>.tmp`` in the same folder, is flushed to the disk, and takes the
    name in one step; then the folder is flushed too. Whatever happens before that step, the previous
    file is untouched and the temporary one is removed (a killed process leaves it: :func:`remove_stale`).

    Args:
        path: The file to write.
        content: The bytes, or a function that writes them to the path it is given. An exception of the
            function other than an input/output error passes through: it can check the file and refuse it.
        size_bytes: How much a function is going to write, for the error message.

    Raises:
        CheckpointError: The file could not be written; names the bytes needed and the bytes free.
    """
    target = Path(path)
    if not target.name:
        raise CheckpointError(f"{str(path)!r} is not the name of a file; give a file inside a folder")
    tmp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    needed = len(content) if isinstance(content, bytes) else size_bytes
    with _claimed(tmp):
        try:
            tmp.unlink(missing_ok=True)  # a dead run with our process id may have left one
            if isinstance(content, bytes):
                tmp.write_bytes(content)
            else:
                content(tmp)
            with tmp.open("rb+") as file:
                os.fsync(file.fileno())
            tmp.replace(target)
        except OSError as error:
            raise CheckpointError(_write_failed(target, tmp, needed, error)) from error
        finally:
            with suppress(OSError):  # such as a name too long to exist
                tmp.unlink(missing_ok=True)
    _sync_folder(target)


@contextmanager
def _claimed(tmp: Path) -> Iterator[None]:
    """Keep two threads off one temporary file, and :func:`remove_stale` off a file being written."""
    with _active_lock:
        if tmp in _active:
            raise CheckpointError(f"{tmp.parent}: another thread is writing this file; write it from one thread")
        _active.add(tmp)
    try:
        yield
    finally:
        with _active_lock:
            _active.discard(tmp)


def _write_failed(target: Path, tmp: Path, needed: int | None, error: OSError) -> str:
    """Say what could not be written and how much room there was."""
    reason = error.strerror or str(error)
    written = 0
    with suppress(OSError):
        written = tmp.lstat().st_size
        tmp.unlink()  # what was written so far counts as free again
    wanted = f"{needed} bytes" if needed is not None else f"more than {written} bytes"
    try:
        free = f"{shutil.disk_usage(target.parent).free} bytes are free"
    except OSError:
        return f"{target}: could not be written: {reason}. Does the folder {str(target.parent)!r} exist?"
    return (
        f"{target}: could not be written: {reason}; it needs {wanted} and {free} there ({written} were written). "
        "Any previous file of that name is untouched. Free some space, raise the limit or choose another folder."
    )


def _sync_folder(target: Path) -> None:
    """Flush the folder's entry, so that a power cut cannot bring the old name back."""
    if os.name != "posix":
        return  # other systems cannot open a folder for this
    try:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(
            f"{target}: written, but its folder could not be flushed to the disk: {error.strerror}; "
            "the file may be lost in a power cut. Choose a folder on a local file system."
        ) from error


def remove_stale(directory: str | Path) -> list[Path]:
    """Remove the temporary files that killed runs left in a folder.

    Those of processes that still live stay, and so does everything that is not a plain file.

    Args:
        directory: The folder; one that does not exist holds nothing.

    Returns:
        The files removed.
    """
    removed = []
    for path in sorted(Path(directory).glob(".*.tmp")):
        match = _TMP_NAME.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink() and not _in_use(path, int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _in_use(path: Path, pid: int) -> bool:
    """Whether the process that writes ``path`` may still live."""
    if pid == os.getpid():
        return path in _active
    if os.name != "posix":
        return True  # signal 0 is not harmless elsewhere; rather leave a file than end a process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with format, version and checksum, atomically.

    Args:
        path: The file to write.
        tensors: The tensors, of dtypes in :data:`DTYPES`; views are written as their elements alone.
        kind: ``"tree"``, ``"model"``, ``"masks"`` or ``"sparse"``.
        metadata: More text for the file's header.

    Raises:
        CheckpointError: A tensor or an entry that the format cannot hold, or the file cannot be written.
    """
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {name}: {tensor.dtype} cannot be written; convert the tensor first")
        owned[name] = _own(tensor, storages)
    text = {**metadata, FORMAT_KEY: f"{kind} {VERSION}"}
    text[CHECKSUM_KEY] = checksum(owned, text)
    header = _header(owned, text)
    if len(header) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the structure takes {len(header)} bytes and the format allows {MAX_HEADER_BYTES}; "
            "keep long lists of numbers as tensors"
        )

    def write(tmp: Path) -> None:
        # Not by the library's save_file: it has a temporary file of its own, which a kill would leave for ever.
        with tmp.open("xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in _in_order(owned):
                file.write(raw_bytes(owned[name]).numpy().data)

    write_atomic(path, write, size_bytes=8 + len(header) + sum(t.nbytes for t in owned.values()))


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Order names so that every tensor starts at a multiple of its element's size."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _header(tensors: Mapping[str, Tensor], text: Mapping[str, str]) -> bytes:
    """Build the JSON header of a safetensors file, padded with spaces to a multiple of eight bytes."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": dict(text)}
    end = 0
    for name in _in_order(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _own(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return the tensor on the CPU, contiguous, alone in a storage of its own size; a copy only where needed."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.dtype == torch.bool:
        plain = raw_bytes(plain).ne(0).reshape(plain.shape)  # a reinterpreted tensor may hold other bytes than 0 and 1
    storage = plain.untyped_storage()
    if storage.nbytes() != plain.nbytes or storage.data_ptr() in storages:
        plain = plain.clone()
    storages.add(plain.untyped_storage().data_ptr())
    return plain


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's elements, 1-D uint8: a view when the tensor is contiguous."""
    return tensor.detach().flatten().view(torch.uint8)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash names, dtypes, shapes, bytes and metadata with BLAKE2b (Aumasson et al., BLAKE2, 2013), 256 bits."""
    digest = hashlib.blake2b(digest_size=32)
    text = {key: value for key, value in metadata.items() if key != CHECKSUM_KEY}
    digest.update(json.dumps(text, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(raw_bytes(tensor).numpy().data)
    return digest.hexdigest()


def read_tensors(
    path: str | Path, kind: str | None, *, mapped: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file completely into memory of its own, checking before believing.

    Args:
        path: The file.
        kind: The kind that it must be, or ``None`` to accept a file of another program as well.
        mapped: Leave the tensors in the file, mapped into memory, each page read when it is used and shared with other
            processes; the file must not be changed in place as long as they live.

    Returns:
        The tensors and the metadata.

    Raises:
        CheckpointError: The file is missing, not safetensors, damaged, or of another kind or version.
    """
    metadata = read_header(path)
    _check_kind(path, metadata, kind)
    try:
        with safe_open(Path(path), framework="pt") as file:
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors = read if mapped else {name: _copied(tensor) for name, tensor in read.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(raw_bytes(tensor).max()) > 1:
            raise CheckpointError(f"{path}: {name}: a bool tensor holds bytes other than 0 and 1; the file is damaged")
    if CHECKSUM_KEY in metadata and checksum(tensors, metadata) != metadata[CHECKSUM_KEY]:
        raise CheckpointError(f"{path}: the checksum does not match the content: the file is damaged; use another copy")
    return tensors, metadata


def _copied(mapped: Tensor) -> Tensor:
    """Copy a tensor off the mapped file, which may change later, byte by byte: copies of bool repair bad bytes."""
    return raw_bytes(mapped).clone().view(mapped.dtype).reshape(mapped.shape)


def _check_kind(path: str | Path, metadata: Mapping[str, str], kind: str | None) -> None:
    """Refuse a file of the wrong kind or version; format and checksum come together or not at all."""
    found = metadata.get(FORMAT_KEY)
    if found is None and CHECKSUM_KEY not in metadata:
        if kind is None:
            return
        raise CheckpointError(f"{path}: expected a {kind} file of secateur; its header has no {FORMAT_KEY!r}")
    match = re.fullmatch(r"(tree|model|masks|sparse) ([0-9]{1,9})", found or "")
    if match is None or CHECKSUM_KEY not in metadata:
        raise CheckpointError(f"{path}: damaged header: format {found!r}, checksum {metadata.get(CHECKSUM_KEY)!r}")
    if int(match[2]) != VERSION:
        raise CheckpointError(f"{path}: version {match[2]}, and this secateur reads version {VERSION}; upgrade it")
    if match[1] != (kind or "model"):
        raise CheckpointError(f"{path}: this is a {match[1]} file; expected a {kind or 'model'} file")


def read_header(path: str | Path) -> dict[str, str]:
    """Check the header of a safetensors file before anything is allocated, and return its metadata.

    Args:
        path: The file.

    Returns:
        The metadata, keys and values as text.

    Raises:
        CheckpointError: The file is missing or not a well-formed safetensors file.
    """
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: not a file; expected the path of a safetensors file")
        with Path(path).open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, info.st_size - 8):
                raise CheckpointError(f"{path}: not a safetensors file: {_wrong_start(start, length, info.st_size)}")
            header = file.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: could not be read: {error}") from error
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        return _checked_entries(entries)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error


def _wrong_start(start: bytes, length: int, size: int) -> str:
    """Say what a file that does not start like safetensors may be."""
    if not start:
        return "the file is empty"
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        return "it looks like a pickle or a torch.save archive, which can run code and is refused here"
    return f"its header should take {length} bytes and the file has {size}: truncated or of another format"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse a key that comes twice: readers would disagree about its meaning."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key comes twice")
    return result


def _no_constant(text: str) -> Any:
    """Refuse the NaN and Infinity that are not JSON."""
    raise ValueError(f"{text} is not JSON")


def _checked_entries(entries: Any) -> dict[str, str]:
    """Check the shape of the header's JSON; the library checks lengths and offsets after us."""
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a table of text")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} needs exactly dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} has the unreadable dtype {entry['dtype']!r}")
        numbers = entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, list) and all(type(i) is int and 0 <= i < 1 << 48 for i in n) for n in numbers):
            raise ValueError(f"{name!r} has a shape or offsets that are not lists of sizes")
    return metadata
