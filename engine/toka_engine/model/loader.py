"""Reads weights from a folder of safetensors, sharded or not, by memory map. Never runs code from the folder.

Every file, header and shape is checked before a tensor is used, and the error names what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from toka_engine.errors import ModelInvalidError, ModelNotFoundError, OutOfMemoryError
from toka_engine.model.kv_scales import KvScales, list_scale_names, round_up
from toka_engine.model.quantization import (
    E4M3,
    SCALE_SUFFIXES,
    QuantisedWeight,
    Quantization,
    StoredWeight,
    list_companions,
    quantise_weight,
)
from toka_engine.model.sharding import Shard

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_MAX_INDEX_BYTES = 64 * 1024 * 1024


class Weights(AbstractContextManager["Weights"]):
    """The tensors of one model folder; files stay mapped until the `with` block ends."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        available_bytes: int,
        quantization: Quantization | None = None,
        computes_fp8: bool = False,
        has_fp8_cache: bool = False,
    ) -> None:
        """`available_bytes`: what the device has left for them. `quantization`: the scheme of those of 8-bit floats.

        `computes_fp8`: linear layers compute with 8-bit floats; `has_fp8_cache`: the KV cache holds such.
        """
        self.device = device
        self.num_dequantised = 0
        """Weights that were stored as 8-bit floats, and are computed with in the model's dtype."""
        self.num_quantised = 0
        """Weights that are computed with as 8-bit floats."""
        self.num_rounded = 0
        """Those of them whose stored values were others: floats of more bits, or in blocks with a scale each."""
        self.num_unscaled = 0
        """Scales that a KV cache of 8-bit floats could have and the checkpoint does not."""
        self.dtype = dtype
        self._folder = folder
        self._quantization, self._computes_fp8 = quantization, computes_fp8
        self._has_fp8_cache = has_fp8_cache
        self._files = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._untaken: set[str] = set()
        self._available_bytes = available_bytes
        self._taken_bytes = 0

    def __enter__(self) -> Weights:
        """Open every file. Raises ModelNotFoundError, ModelInvalidError."""
        try:
            for path in _list_files(self._folder):
                self._open(path)
        except BaseException:
            self._files.close()
            raise
        self._untaken = set(self._file_of)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file_of.clear()
        self._files.close()

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> torch.Tensor:
        """Return tensor `name`, which has `shape` in the file, on the device in the model's dtype.

        A weight of 8-bit floats becomes the values that it stands for. With `shard`, only this part of it is read.
        Raises ModelInvalidError if the tensor, or the scale of a weight, is missing or misshapen, OutOfMemoryError
        before memory is taken that is not there.
        """
        tensor = self._read(name, shape, shard, self.dtype.itemsize)
        if tensor.dtype.itemsize == 1:
            stored = self._find_stored(name, shape, tensor.dtype)
            self.num_dequantised += 1
            return stored.dequantise(tensor.to(self.device), shard, self.dtype)
        # A copy, which reads the file: a view of the map would keep its pages, and would crash if it is cut later.
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def is_quantised(self, name: str) -> bool:
        """Whether the weight `name` of a linear layer is to be taken as 8-bit floats, by `take_quantised`.

        A quantised checkpoint decides itself which of its layers are; of another one all are.
        """
        if not self._computes_fp8 or name not in self._file_of:
            return False
        return self._quantization is None or self._file_of[name].get_slice(name).get_dtype() == "F8_E4M3"

    def take_quantised(self, name: str, shape: tuple[int, int], shard: Shard | None = None) -> QuantisedWeight:
        """Return the weight `name` of a linear layer as 8-bit floats with a scale for each output. As `take`."""
        tensor = self._read(name, shape, shard, E4M3.itemsize)
        self.num_quantised += 1
        if tensor.dtype.itemsize == 1:
            stored = self._find_stored(name, shape, tensor.dtype)
            self.num_rounded += stored.has_blocks
            return stored.keep(tensor.to(self.device, copy=True), shard)
        self.num_rounded += 1
        quantised = quantise_weight(tensor.to(self.device))
        if not bool(quantised.scale.isfinite().all()):
            raise ModelInvalidError(f"{self._folder}: tensor {name} has values that are not finite")
        return quantised

    def take_kv_scales(self, prefix: str) -> KvScales:
        """Return the scales of the KV cache of attention `prefix`; 1 where there are none, or the cache needs none.

        Raises ModelInvalidError where one cannot be a scale.
        """
        if not self._has_fp8_cache:
            return KvScales()
        return KvScales(*(self._take_kv_scale(list_scale_names(prefix, which)) for which in ("k", "v")))

    def _take_kv_scale(self, names: Sequence[str]) -> float:
        name = next((name for name in names if name in self._file_of), None)
        if name is None:
            self.num_unscaled += 1
            return 1.0
        self._untaken.discard(name)
        try:
            return round_up(self._file_of[name].get_tensor(name).float())
        except ValueError as error:
            raise ModelInvalidError(f"{self._folder}: tensor {name} {error}") from error

    def _read(self, name: str, shape: tuple[int, ...], shard: Shard | None, bytes_per_value: int) -> torch.Tensor:
        """Return the `shard` of a tensor, in the file's memory map, as a float of the file's dtype."""
        file = self._file_of.get(name)
        if file is None:
            raise ModelInvalidError(f"{self._folder}: the weights lack the tensor {name}")
        stored = file.get_slice(name)
        found = tuple(stored.get_shape())
        if found != shape:
            raise ModelInvalidError(
                f"{self._folder}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}"
            )
        taken = shape if shard is None else shard.cut(shape)
        self._taken_bytes += math.prod(taken) * bytes_per_value
        if self._taken_bytes > self._available_bytes:
            raise OutOfMemoryError(self._describe_shortage())
        tensor: torch.Tensor = stored[:] if shard is None else stored[shard.index]
        if not tensor.is_floating_point():
            raise ModelInvalidError(f"{self._folder}: tensor {name} has dtype {tensor.dtype}, not a float")
        self._untaken.discard(name)
        return tensor

    def _find_stored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredWeight:
        """Return the description of a weight of 8-bit floats, with its scale, both checked."""
        if self._quantization is None or dtype != E4M3 or len(shape) != 2:
            found = str(dtype).removeprefix("torch.")
            raise ModelInvalidError(
                f"{self._folder}: tensor {name} has dtype {found}; matrices of float8_e4m3fn are understood, "
                "where config.json has a quantization_config"
            )
        scale_name = next((name + end for end in SCALE_SUFFIXES if name + end in self._file_of), None)
        if scale_name is None:
            raise ModelInvalidError(f"{self._folder}: the weights lack the tensor {name}{SCALE_SUFFIXES[-1]}")
        scale = self._file_of[scale_name].get_tensor(scale_name)
        self._untaken.difference_update((scale_name, *list_companions(name)))
        stored = StoredWeight(scale_name, (shape[0], shape[1]), scale, self._quantization.block)
        stored.check(self._folder)
        return stored

    def list_untaken(self) -> Iterator[str]:
        """Names that no layer has asked for."""
        yield from sorted(self._untaken)

    def _describe_shortage(self) -> str:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name, file in self._file_of.items()]
        form, size = f"dtype={str(self.dtype).removeprefix('torch.')}", self.dtype.itemsize
        if self._computes_fp8:  # embedding and head take more
            form, size = "quantization=fp8", E4M3.itemsize
        needed_gb, available_gb = sum(sizes) * size / 1e9, self._available_bytes / 1e9
        return (
            f"model={self._folder}: the weights take {needed_gb:.1f} GB as {form}, "
            f"{available_gb:.1f} GB of {'GPU ' if self.device.type == 'cuda' else ''}memory are available"
        )

    def _open(self, path: Path) -> None:
        _check_header(path)
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelInvalidError(f"{path}: not a valid safetensors file: {error}") from error
        for name in names:
            self._file_of[name] = file


def _list_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ModelNotFoundError(f"the model folder {folder} does not exist")
    if (folder / _INDEX).exists():
        return [_resolve(folder, name) for name in _read_index(folder)]
    if not (folder / _SINGLE).exists():
        raise ModelInvalidError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    return [_resolve(folder, _SINGLE)]


def _read_index(folder: Path) -> list[str]:
    path = _resolve(folder, _INDEX)
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelInvalidError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes")
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelInvalidError(f"{path}: not an index of safetensors files: {error}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelInvalidError(f"{path}: weight_map names no files")
    return names


def _resolve(folder: Path, name: str) -> Path:
    """The real path of file `name`, which must be inside the folder or a blob of the same hub cache entry."""
    path = folder / name
    if Path(name).name != name or name in (".", ".."):
        raise ModelInvalidError(f"{folder}: {name!r:.120} is not a file name")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelInvalidError(f"{path} is missing or cannot be read: {error}") from error
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub cache: snapshots/<revision>/file -> ../../blobs/<hash>
        allowed.append((folder.parent.parent / "blobs").resolve())
    if not any(real.parent == root for root in allowed):
        raise ModelInvalidError(f"{path} is a link out of the model folder")
    if not real.is_file():
        raise ModelInvalidError(f"{path} is not a regular file")
    return real


def _check_header(path: Path) -> None:
    """Refuse lengths that cannot be before anything is mapped or allocated by them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ModelInvalidError(f"{path}: {error.strerror}") from error
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ModelInvalidError(f"{path}: truncated or damaged: {size} bytes, but a header of {length} bytes")
