"""Reading of flax's checkpoints (`flax.serialization`): msgpack maps of maps, with arrays as extension types.

Nothing in such a file is code. What a hostile one can do is to declare more than it holds, so every size is held
against the bytes that are left before anything is made of it. Specification: https://github.com/msgpack/msgpack.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlaxFormatError", "flatten", "is_flax", "load"]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"  # a map in place of an array larger than msgpack's limit
_DEEPEST = 64  # maps within maps; flax's are about ten deep
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16",
        "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip


class FlaxFormatError(ValueError):
    """A file is no checkpoint of flax, or a damaged one; the message completes "<path> ..."."""


def is_flax(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a msgpack map whose first key is text."""
    if head[:1] in (b"\xde", b"\xdf"):
        head = head[2 if head[0] == 0xDE else 4 :]
    elif not 0x81 <= head[0] <= 0x8F:
        return False
    return len(head) > 5 and (0xA1 <= head[1] <= 0xBF or head[1] == 0xD9) and head[2:6].isascii() and 0 not in head[2:6]


def load(path: str | Path) -> dict[str, Any]:
    """The maps of a file, with its arrays as tensors.

    Raises:
        FlaxFormatError: What is wrong with it, as the end of a sentence that begins with its name.
    """
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with the last view of it
    reader = _Reader(memoryview(mapped))
    tree = reader.value()
    if reader.left or not isinstance(tree, dict):
        raise FlaxFormatError("is no checkpoint of flax: it is not one map from beginning to end")
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of maps within maps, by their paths joined by "/"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


class _Reader:
    """One pass over msgpack bytes; what is returned shares no memory with them."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise FlaxFormatError(f"is cut off: {size} bytes should follow byte {self.at}, and {self.left} do")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(">" + code, self.take(struct.calcsize(code)))[0]

    def value(self, depth: int = 0) -> Any:
        """The next value; `depth` is the number of maps and lists that it lies in."""
        if depth > _DEEPEST:
            raise FlaxFormatError(f"is no checkpoint of flax: it nests more than {_DEEPEST} maps")
        tag = self.number("B")
        if tag < 0x80 or tag >= 0xE0:
            return tag if tag < 0x80 else tag - 0x100
        if tag < 0xC0:
            short = self._text if tag >= 0xA0 else self._list if tag >= 0x90 else self._map
            return short(tag & (31 if tag >= 0xA0 else 15), depth)
        if tag not in _TAGS:
            raise FlaxFormatError(f"is no msgpack: byte {self.at - 1} is {tag:#x}, which begins nothing")
        kind, code = _TAGS[tag]
        if kind == "constant":
            return code
        if kind == "number":
            return self.number(code)
        size = code if isinstance(code, int) else self.number(code)
        readers: dict[str, Callable[[int, int], Any]] = {
            "map": self._map, "list": self._list, "text": self._text, "bytes": self._bytes,
            "extension": self._extension,
        }  # fmt: skip
        return readers[kind](size, depth)

    def _map(self, count: int, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(self._plausible(2 * count) // 2):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise FlaxFormatError(f"is no checkpoint of flax: the key before byte {self.at} is no text")
            found[key] = self.value(depth + 1)
        return _joined(found) if _CHUNKED in found else found

    def _list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(self._plausible(count))]

    def _plausible(self, count: int) -> int:
        if count > self.left:  # a value takes a byte at least
            raise FlaxFormatError(f"is cut off: {count} values should follow byte {self.at}, and {self.left} bytes do")
        return count

    def _text(self, size: int, _: int) -> str:
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise FlaxFormatError(f"is no checkpoint of flax: the text before byte {self.at} is no UTF-8") from None

    def _bytes(self, size: int, _: int) -> bytes:
        return bytes(self.take(size))

    def _extension(self, size: int, depth: int) -> Any:
        kind, content = self.number("b"), _Reader(self.take(size))
        if kind not in (_ARRAY, _COMPLEX, _SCALAR):
            raise FlaxFormatError(f"holds an extension of type {kind}, which is none of flax's")
        fields = content.value(depth + 1)
        if content.left or not isinstance(fields, list):
            raise FlaxFormatError(f"holds an extension of type {kind} that is no list")
        return complex(*_pair(fields)) if kind == _COMPLEX else _tensor(fields)


# First byte → what it begins; and the constant, the code of the number, or the size or the code of the size.
_TAGS: dict[int, tuple[str, Any]] = {
    0xC0: ("constant", None), 0xC2: ("constant", False), 0xC3: ("constant", True),
    **{0xC4 + i: ("bytes", code) for i, code in enumerate("BHI")},
    **{0xC7 + i: ("extension", code) for i, code in enumerate("BHI")},
    **{0xCA + i: ("number", code) for i, code in enumerate("fdBHIQbhiq")},
    **{0xD4 + i: ("extension", 1 << i) for i in range(5)},
    **{0xD9 + i: ("text", code) for i, code in enumerate("BHI")},
    **{0xDC + i: ("list", code) for i, code in enumerate("HI")},
    **{0xDE + i: ("map", code) for i, code in enumerate("HI")},
}  # fmt: skip


def _pair(fields: list[Any]) -> list[float]:
    if len(fields) != 2 or not all(isinstance(x, (int, float)) for x in fields):
        raise FlaxFormatError("holds a complex number that is no pair of numbers")
    return fields


def _tensor(fields: list[Any]) -> Tensor:
    """An array from its shape, the name of its type, and its bytes in row-major order."""
    if len(fields) != 3 or not isinstance(fields[2], bytes):
        raise FlaxFormatError("holds an array that is not its shape, type and bytes")
    shape, name, data = fields
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise FlaxFormatError(f"holds an array of type {name!r}, which is not read")
    if not _is_shape(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise FlaxFormatError(f"holds an array of shape {shape!r} and type {name} in {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _joined(parts: dict[str, Any]) -> Tensor:
    """An array that was written in pieces; its shape and they are maps from "0", "1", ..."""
    shape, chunks = _listed(parts.get("shape")), _listed(parts.get("chunks"))
    if not _is_shape(shape) or not chunks or not all(isinstance(x, Tensor) and x.dim() == 1 for x in chunks):
        raise FlaxFormatError("holds an array in pieces without its shape or its pieces")
    if len({chunk.dtype for chunk in chunks}) > 1 or sum(map(len, chunks)) != math.prod(shape):
        raise FlaxFormatError(f"holds an array of shape {shape} in pieces that do not make it up")
    return torch.cat(chunks).view(shape)


def _listed(parts: Any) -> list[Any]:
    named = isinstance(parts, dict) and all(name.isdecimal() for name in parts)
    return [parts[name] for name in sorted(parts, key=int)] if named else []


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
