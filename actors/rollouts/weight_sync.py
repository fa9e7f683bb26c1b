"""Weights travel from the learner to the generators by `publish` and `load`.

    learner: parameters ─▶ publish ─▶ buckets in the object store ─▶ load ─▶ read-only views ─▶ the engine copies them

The carrier here is Ray's object store. Parameters travel as bytes in buckets, one `put` each. A node fetches a bucket
once, and every process on it maps the bucket without a copy. Torch tensors would travel 17-26 times slower.
Parameters that lie together in memory (`rayrlhf.models.layout`) are put as one array, at the speed of a memory copy.
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

from actors.pools.remote import fetch, put
from rayrlhf.errors import UserError
from rayrlhf.models.layout import ALIGNMENT, BUCKET_BYTES

_LINE_BYTES, _SAMPLED_LINES = 64, 16384
"""The checksum reads this many lines of a large array, spread evenly: 1 MiB in all."""


class WeightSyncError(RuntimeError):
    """Weights that must not be used: corrupt, incomplete, stale or half-loaded."""


class PublishedWeights(Protocol):
    """All that a generator knows of published weights. Another carrier (NCCL, CUDA IPC) is another class with this."""

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
    array: int
    """Index of the bucket's array that holds the tensor."""
    offset: int
    """Bytes from the start of that array."""


Bucket = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Publication:
    """One complete set of weights in the object store (or in this process).

    The publisher must keep it until every generator has loaded it: Ray drops the buckets with their last reference.
    """

    version: int
    buckets: tuple[Any, ...]
    """ObjectRefs of lists of uint8 arrays, or the lists themselves when local."""
    manifest: tuple[tuple[Entry, ...], ...]
    """The tensors in each bucket."""
    checksum: str
    """Covers version, manifest, order and lengths of the arrays, and their bytes. Of an array above 1 MiB it covers a
    sample of 1 MiB: to read every byte would cost as much as the copy itself."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return load(self)


def publish(
    tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, local: bool, bucket_bytes: int = BUCKET_BYTES
) -> Publication:
    """Copy tensors into the object store. The learner may change its parameters as soon as this returns.

    There is one copy, and it needs the store's memory only (for tensors of a GPU also one bucket's). Neighbours in
    memory travel as one array.

    Args:
        tensors: the items of `dict(model.named_parameters())`, and persistent buffers.
        bucket_bytes: the largest bucket; a larger tensor gets a bucket of its own.
    """
    buckets: list[Any] = []
    manifest: list[tuple[Entry, ...]] = []
    digests: list[list[tuple[int, int]]] = []

    def close(entries: list[Entry], runs: list[_Run]) -> None:
        bucket = [run.bytes() for run in runs]
        digests.append([_digest(array) for array in bucket])
        buckets.append([array.copy() for array in bucket] if local else put(bucket, local))
        manifest.append(tuple(entries))

    entries: list[Entry] = []
    runs: list[_Run] = []
    for name, tensor in tensors:
        tensor = tensor.detach().contiguous()
        if entries and sum(run.size for run in runs) + tensor.nbytes > bucket_bytes:
            close(entries, runs)
            entries, runs = [], []
        offset = runs[-1].offset_of(tensor) if runs else None
        if offset is None:
            runs.append(_Run(tensor))
            offset = 0
        runs[-1].size = offset + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), len(runs) - 1, offset))
    if entries:
        close(entries, runs)
    return Publication(version, tuple(buckets), tuple(manifest), _checksum(version, manifest, digests))


class _Run:
    """Tensors that follow one another in memory, with no more between them than alignment leaves."""

    def __init__(self, first: torch.Tensor) -> None:
        self.first, self.size = first, first.nbytes

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Bytes from the run's start to `tensor`, if it is the next one."""
        if tensor.untyped_storage().data_ptr() != self.first.untyped_storage().data_ptr():
            return None
        offset = tensor.data_ptr() - self.first.data_ptr()
        return offset if self.size <= offset < self.size + ALIGNMENT else None

    def bytes(self) -> NDArray[np.uint8]:
        """The run's memory itself, or a copy of it if that is a GPU's."""
        if not self.size:
            return np.zeros(1, np.uint8)  # nothing can be viewed in an empty array
        first = self.first
        whole = torch.empty(0, dtype=torch.uint8, device=first.device)  # by way of bytes: bfloat16 has no numpy dtype
        whole.set_(first.untyped_storage(), first.storage_offset() * first.itemsize, (self.size,), (1,))
        array: NDArray[np.uint8] = whole.cpu().numpy()
        return array


def publish_directory(path: str | Path, version: int, *, local: bool, bucket_bytes: int = BUCKET_BYTES) -> Publication:
    """Publish the safetensors (one file or shards) of a Hugging Face model directory.

    Raises:
        UserError: the directory has no safetensors, or not all the shards that its index names.
    """
    return publish(_read_directory(Path(path)), version, local=local, bucket_bytes=bucket_bytes)


def load(publication: Publication) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as they were published, as read-only views of the buckets: copy before you write.

    Raises:
        WeightSyncError: before the first tensor, when the buckets are not those that the checksum was made of.
    """
    buckets: list[Bucket] = [fetch(bucket) for bucket in publication.buckets]
    digests = [[_digest(array) for array in bucket] for bucket in buckets]
    if _checksum(publication.version, publication.manifest, digests) != publication.checksum:
        raise WeightSyncError(
            f"weights of version {publication.version}: the {len(buckets)} buckets that arrived do not match their "
            "checksum (swapped, truncated or changed on the way); publish them again"
        )
    for bucket, entries in zip(buckets, publication.manifest, strict=True):
        for entry in entries:
            yield entry.name, _view(bucket[entry.array], entry)


def _view(array: NDArray[np.uint8], entry: Entry) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    size = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
    with warnings.catch_warnings():
        # The object store's arrays are read-only, which torch cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(array[entry.offset : entry.offset + size])
    return flat.view(dtype).reshape(entry.shape)


def _digest(array: NDArray[np.uint8]) -> tuple[int, int]:
    """Size of an array and CRC-32 of its lines, or of about `_SAMPLED_LINES` of them."""
    lines = array[: array.size // _LINE_BYTES * _LINE_BYTES].reshape(-1, _LINE_BYTES)
    every = max(1, len(lines) // _SAMPLED_LINES)
    sample = np.ascontiguousarray(lines[::every])
    return array.size, zlib.crc32(array[lines.size :].tobytes(), zlib.crc32(sample.data))


def _checksum(version: int, manifest: Sequence[Sequence[Entry]], digests: Sequence[Sequence[tuple[int, int]]]) -> str:
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
