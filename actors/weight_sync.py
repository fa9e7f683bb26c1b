"""Weights on their way from the learner to the generators: the two ends, publish and load.

The carrier here is Ray's object store: parameters are packed into buckets of bytes, one `put` a bucket, which every
node fetches once and every process on it maps without a copy. As torch tensors they would travel 17-26x slower.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from actors.remote import fetch, put
from rayrlhf.errors import UserError

BUCKET_BYTES = 64 * 2**20
_ALIGNMENT = 64
"""Tensors start at multiples of this many bytes, so that a view of any dtype is aligned."""


class WeightSyncError(RuntimeError):
    """Weights that must not be used: corrupt, incomplete, stale or half-loaded."""


class PublishedWeights(Protocol):
    """All that a generator knows of a publication: the seam for other carriers (NCCL, CUDA IPC), one file each."""

    @property
    def version(self) -> int: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, by its Hugging Face name; `WeightSyncError` before the first one if any is corrupt."""
        ...


class Entry(NamedTuple):
    """Where one tensor lies inside its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the bucket."""


@dataclass(frozen=True)
class Publication:
    """One complete set of weights in the object store (or in this process).

    The publisher must keep it alive until every generator has loaded it: the buckets go with their last reference.
    """

    version: int
    buckets: tuple[Any, ...]
    """ObjectRefs of uint8 arrays, or the arrays themselves when local."""
    manifest: tuple[tuple[Entry, ...], ...]
    """Per bucket, what it holds."""
    checksum: str
    """Covers version, manifest, the order and length of the buckets, and every byte in them (CRC-32 of each)."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return load(self)


def publish(
    tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, local: bool, bucket_bytes: int = BUCKET_BYTES
) -> Publication:
    """Copy `tensors` (the items of `dict(model.named_parameters())`, plus persistent buffers) into the object store.

    The copy is complete on return: the learner may go on changing its parameters. A tensor larger than `bucket_bytes`
    gets a bucket of its own. At most one bucket of extra memory is held on top of the store's.
    """
    buckets: list[Any] = []
    manifest: list[tuple[Entry, ...]] = []
    digests: list[tuple[int, int]] = []

    def close(entries: list[Entry], pieces: list[NDArray[np.uint8]], size: int) -> None:
        bucket = np.zeros(max(size, 1), dtype=np.uint8)  # not 0: nothing can be viewed in an empty array
        for entry, piece in zip(entries, pieces, strict=True):
            bucket[entry.offset : entry.offset + piece.size] = piece
        digests.append(_digest(bucket))
        buckets.append(put(bucket, local))
        manifest.append(tuple(entries))

    entries: list[Entry] = []
    pieces: list[NDArray[np.uint8]] = []
    end = 0
    for name, tensor in tensors:
        # By way of bytes, because bfloat16 has no numpy dtype.
        piece: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        if entries and offset + piece.size > bucket_bytes:
            close(entries, pieces, end)
            entries, pieces, offset = [], [], 0
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        pieces.append(piece)
        end = offset + piece.size
    if entries:
        close(entries, pieces, end)
    return Publication(version, tuple(buckets), tuple(manifest), _checksum(version, manifest, digests))


def publish_directory(path: str | Path, version: int, *, local: bool, bucket_bytes: int = BUCKET_BYTES) -> Publication:
    """Publish the safetensors (one file or shards) of a Hugging Face model directory.

    Raises:
        UserError: the directory has no safetensors, or not all the shards that its index names.
    """
    return publish(_read_directory(Path(path)), version, local=local, bucket_bytes=bucket_bytes)


def load(publication: Publication) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as they were published: read-only views of the buckets, without a copy. Copy before you write.

    Raises:
        WeightSyncError: before the first tensor, when the buckets are not those that the checksum was made of.
    """
    buckets: list[NDArray[np.uint8]] = [fetch(bucket) for bucket in publication.buckets]
    digests = [_digest(bucket) for bucket in buckets]
    if _checksum(publication.version, publication.manifest, digests) != publication.checksum:
        raise WeightSyncError(
            f"weights of version {publication.version}: the {len(buckets)} buckets that arrived do not match their "
            "checksum (swapped, truncated or changed on the way); publish them again"
        )
    for bucket, entries in zip(buckets, publication.manifest, strict=True):
        for entry in entries:
            yield entry.name, _view(bucket, entry)


def _view(bucket: NDArray[np.uint8], entry: Entry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    size = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
    with warnings.catch_warnings():
        # The object store's arrays are read-only, which torch cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(bucket[entry.offset : entry.offset + size])
    return flat.view(dtype).reshape(entry.shape)


def _digest(bucket: NDArray[np.uint8]) -> tuple[int, int]:
    return bucket.size, zlib.crc32(bucket.data)


def _checksum(version: int, manifest: Sequence[Sequence[Entry]], digests: Sequence[tuple[int, int]]) -> str:
    return hashlib.blake2b(json.dumps([version, manifest, digests]).encode(), digest_size=16).hexdigest()


def _read_directory(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = sorted(path / name for name in names)
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: no *.safetensors; save the model with save_pretrained")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: named in {index.name} but missing; copy the model directory again, completely")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, tensors.get_tensor(name)
