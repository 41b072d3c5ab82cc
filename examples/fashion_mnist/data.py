"""Fashion-MNIST from its four IDX files: 60,000 training and 10,000 test images of 28x28 pixels in ten classes.

Han Xiao, Kashif Rasul, Roland Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, 2017. The data set is MIT licensed.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

VARIABLE = "FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CACHE_FOLDER = Path("~/.cache/secateur/fashion-mnist")
OFFICIAL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"

# SHA-256 of the uncompressed contents: Debian packs the same bytes into other gzip files than the authors did.
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

MEAN, STD = 0.2860, 0.3530  # of the training images' pixels, scaled to [0, 1]
CLASSES = 10
MOST = 1_000_000  # images in one file; a header that claims more is damaged, or meant to fill the memory
LARGEST_DOWNLOAD = 64 * 2**20


@dataclass(frozen=True)
class Data:
    """Images float32 ``[N, 1, 28, 28]``, normalised; labels int64 ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str = ""


def load(folder: str | Path | None = None, *, download: bool = False) -> Data:
    """Read the data set.

    Args:
        folder: Where the four files lie. Without one: the folder named by the environment variable ``FASHION_MNIST``,
            else that of Debian's package ``dataset-fashion-mnist``, else an earlier download.
        download: Fetch the official files into ``~/.cache/secateur/fashion-mnist`` when none of these has them.

    Returns:
        Training and test set.

    Raises:
        DataError: When the data set is nowhere, or a file is damaged; names the file and what to do.
    """
    found = _find(folder, download)
    parts: list[Tensor] = []
    for stem in ("train", "t10k"):
        images_file, labels_file = found / f"{stem}-images-idx3-ubyte.gz", found / f"{stem}-labels-idx1-ubyte.gz"
        images, labels = read_idx(images_file, (28, 28)), read_idx(labels_file, ())
        if len(images) != len(labels):
            raise _damaged(labels_file, f"{len(labels)} labels", f"{len(images)}, one for each image beside it")
        if int(labels.max()) >= CLASSES:
            raise _damaged(labels_file, f"the label {int(labels.max())}", f"labels 0 to {CLASSES - 1}")
        pixels = torch.from_numpy(images).to(torch.float32).unsqueeze(1)
        parts += [pixels.div_(255.0).sub_(MEAN).div_(STD), torch.from_numpy(labels).to(torch.int64)]
    train_images, train_labels, test_images, test_labels = parts
    return Data(train_images, train_labels, test_images, test_labels, str(found))


def hold_out(data: Data, count: int, *, seed: int = 0) -> Data:
    """Split the training set, to choose settings without looking at the test set.

    Args:
        data: The data set; its test set is dropped.
        count: Training images to set aside.
        seed: Which ones.

    Returns:
        The rest as training set, the ``count`` images as test set.

    Raises:
        DataError: When that leaves nothing to train on.
    """
    total = len(data.train_labels)
    if not 0 < count < total:
        raise DataError(f"cannot hold out {count} of {total} training images; take between 1 and {total - 1}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count], order[count:]
    images, labels = data.train_images, data.train_labels
    return Data(images[rest], labels[rest], images[held], labels[held], f"{data.source} (training set, split)")


def read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read one gzipped IDX file of unsigned bytes.

    The format: two zero bytes, the element type (8 = unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit number, the elements.

    Args:
        path: The file.
        item: Shape that every item must have.

    Returns:
        Array ``[N, *item]``.

    Raises:
        DataError: When the file is missing, no gzip, truncated, of another type or shape, or has bytes left over.
    """
    try:
        with gzip.open(path) as file:
            head = file.read(4)
            if head != bytes([0, 0, 8, 1 + len(item)]):
                raise _damaged(
                    path, f"the magic bytes {head.hex(' ') or 'of an empty file'}", f"00 00 08 0{len(item) + 1}"
                )
            sizes = np.frombuffer(_exactly(file, 4 * (1 + len(item)), path), dtype=">u4").tolist()
            if tuple(sizes[1:]) != item or not 0 < sizes[0] <= MOST:
                raise _damaged(path, f"dimensions {sizes}", f"[1 to {MOST}, {', '.join(map(str, item))}]")
            payload = _exactly(file, int(np.prod(sizes)), path)
            if file.read(1):
                raise _damaged(path, "bytes after the last element", f"{len(payload)} elements and nothing more")
    except FileNotFoundError:
        raise DataError(f"{path} is missing. {_ways()}") from None
    except EOFError as error:
        raise _damaged(path, "a truncated gzip stream", "a complete one") from error
    except (OSError, zlib.error) as error:
        raise _damaged(path, f"something unreadable ({error})", "a gzip file") from error
    return np.frombuffer(bytearray(payload), dtype=np.uint8).reshape(sizes)


def _exactly(file: gzip.GzipFile, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _damaged(path, f"{len(data)} bytes where the header promises {count}", "all of them")
    return data


def _damaged(path: Path, got: str, expected: str) -> DataError:
    return DataError(f"{path}: {got}; expected {expected}. Delete the file and get it again. {_ways()}")


def _ways() -> str:
    return (
        "Three ways to get Fashion-MNIST: `apt install dataset-fashion-mnist` (Debian, Ubuntu); put the four "
        f"*-ubyte.gz files into a folder and pass it, or name it in {VARIABLE}; or load(download=True), on the command "
        f"line --download, which fetches them into {CACHE_FOLDER}."
    )


def _find(folder: str | Path | None, download: bool) -> Path:
    """Return the folder to read. One that was named is taken at its word, never replaced by another."""
    named = folder if folder is not None else os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_dir():
            raise DataError(f"{path} is not a folder. {_ways()}")
        return path
    cache = CACHE_FOLDER.expanduser()
    for path in (DEBIAN_FOLDER, cache):
        if all((path / name).is_file() for name in SHA256):
            return path
    if not download:
        raise DataError(f"Fashion-MNIST is neither in {DEBIAN_FOLDER} nor in {cache}. {_ways()}")
    for name in SHA256:
        fetch(name, cache)
    return cache


def fetch(name: str, folder: Path, *, base: str = OFFICIAL) -> Path:
    """Download one of the files and keep it only if its contents are the published ones.

    Args:
        name: File name.
        folder: Where to.
        base: Address of the folder it lies in, ending with a slash.

    Returns:
        The file.

    Raises:
        DataError: When the download fails or its contents are not what they should be; nothing is kept then.
    """
    try:
        with urllib.request.urlopen(base + name, timeout=60) as answer:
            packed = answer.read(LARGEST_DOWNLOAD + 1)
        contents = gzip.decompress(packed) if len(packed) <= LARGEST_DOWNLOAD else b""
    except (urllib.error.URLError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"downloading {base + name} failed: {error}. {_ways()}") from error
    digest = hashlib.sha256(contents).hexdigest()
    if digest != SHA256[name]:
        raise DataError(f"{base + name}: contents have SHA-256 {digest}, expected {SHA256[name]}; not kept. {_ways()}")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.{os.getpid()}.part"
    part.write_bytes(packed)
    return part.replace(folder / name)  # complete or absent, never half
