"""Checkpoints of flax: written here byte by byte as flax writes them, and read without flax or msgpack."""

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import ssmvision
from ssmvision.hub import CheckpointError, flax_msgpack, load_state_dict, read_checkpoint
from ssmvision_tools import convert_checkpoint

OFFICIAL = Path(__file__).parents[1] / "parity" / "ssm_convs5_novq" / "ckpt.safetensors"
ARRAY, COMPLEX, SCALAR = 1, 2, 3


def sized(size: int, codes: tuple[int, ...], short: int = 0, limit: int = 0) -> bytes:
    """The head of a value: with its size in the first byte, or in one, two or four more."""
    if size < limit:
        return bytes([short | size])
    for code, width in zip(codes, "BHI", strict=True):
        if code and size < 1 << 8 * struct.calcsize(width):
            return bytes([code]) + struct.pack(">" + width, size)
    raise ValueError(size)


def extension(kind: int, content: bytes) -> bytes:
    if len(content) in (1, 2, 4, 8, 16):
        head = bytes([0xD4 + len(content).bit_length() - 1])
    else:
        head = sized(len(content), (0xC7, 0xC8, 0xC9))
    return head + struct.pack("b", kind) + content


def array(shape, name: str, data: bytes, kind: int = ARRAY) -> bytes:
    return extension(kind, packed([list(shape), name, data]))


def packed(x) -> bytes:
    """What flax's `msgpack_serialize` makes of a value."""
    if x is None or isinstance(x, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[x]
    if isinstance(x, int):
        if -32 <= x < 128:
            return struct.pack("b", x)
        code, width = next(
            (code, width)
            for code, width in zip(range(0xCC, 0xD4), "BHIQbhiq", strict=True)
            if (x >= 0) == width.isupper() and x.bit_length() <= 8 * struct.calcsize(width) - (x < 0)
        )
        return bytes([code]) + struct.pack(">" + width, x)
    if isinstance(x, float):
        return b"\xcb" + struct.pack(">d", x)
    if isinstance(x, str):
        return sized(len(x.encode()), (0xD9, 0xDA, 0xDB), 0xA0, 32) + x.encode()
    if isinstance(x, bytes):
        return sized(len(x), (0xC4, 0xC5, 0xC6)) + x
    if isinstance(x, list):
        return sized(len(x), (0, 0xDC, 0xDD), 0x90, 16) + b"".join(map(packed, x))
    if isinstance(x, dict):
        items = b"".join(packed(key) + packed(value) for key, value in x.items())
        return sized(len(x), (0, 0xDE, 0xDF), 0x80, 16) + items
    if isinstance(x, complex):
        return extension(COMPLEX, packed([x.real, x.imag]))
    if isinstance(x, torch.Tensor):
        raw = x.contiguous().view(-1).view(torch.uint8).numpy()
        return array(x.shape, str(x.dtype).removeprefix("torch."), raw.tobytes())
    return array(x.shape, x.dtype.name, x.tobytes(), SCALAR)  # numpy's scalars


def nested(flat) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def written(folder: Path, content: bytes) -> Path:
    path = folder / "checkpoint_300000"  # flax gives no suffix
    path.write_bytes(content)
    return path


@pytest.fixture
def official() -> dict:
    return safetensors.torch.load_file(OFFICIAL)


ARGUMENTS = {"d_model": 32, "n_layers": 2, "ssm": {"ssm_size": 16, "ssm_blocks": 2}, "depths": (32, 64)}


def layouts(official) -> dict[str, dict]:
    tree = nested(official)
    moments = nested({path: torch.zeros_like(value) for path, value in official.items()})["params"]
    return {
        "variables": tree,
        "parameters alone": tree["params"],
        "training state": {"step": np.int32(300000), "params": tree["params"], "opt_state": {"0": {"mu": moments}}},
        "variables in a training state": {"step": 300000, "params": tree, "opt_state": {}, "rng": torch.ones(2)},
    }


@pytest.mark.filterwarnings("ignore:The weights")  # of the licence, once in a process
@pytest.mark.parametrize("layout", layouts({"params/a/b": torch.ones(1)}))
def test_the_official_model_comes_out_of_every_layout(layout: str, official, tmp_path: Path) -> None:
    path = written(tmp_path, packed(layouts(official)[layout]))
    found = load_state_dict(path)
    assert found.keys() == official.keys()
    assert all(torch.equal(found[key], official[key]) for key in official)
    model = ssmvision.create_model("convs5_moving_mnist_train300", checkpoint_path=path, **ARGUMENTS).eval()
    tensors = safetensors.torch.load_file(OFFICIAL.parent / "io.safetensors")
    recon = model(tensors["video"].permute(0, 1, 4, 2, 3)[:, :-1]).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(recon, tensors["recon"], rtol=1e-3, atol=2e-4)


def test_the_tool_converts_a_published_size_and_says_its_licence(tmp_path: Path, capsys) -> None:
    manifest = json.loads(
        (OFFICIAL.parents[2] / "manifests" / "video" / "convs5_moving_mnist_train600.json").read_text()
    )
    flat = {path: torch.full(shape, float(i)) for i, (path, shape) in enumerate(manifest["state_dict"].items())}
    path, target = written(tmp_path, packed({"step": 1, **nested(flat)})), tmp_path / "ours.safetensors"
    assert convert_checkpoint.main(["convs5_moving_mnist_train600", str(path), str(target)]) == 0
    printed = capsys.readouterr().out
    assert "184 tensors" in printed
    assert "licence of the official weights: NVIDIA Source Code License, non-commercial" in printed
    ours = safetensors.torch.load_file(target)
    assert {value.unique().item() for value in ours.values()} == {float(i) for i in range(184)}
    assert convert_checkpoint.main(["--inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "step: 1" in printed
    assert "weights: 184 entries, 184 of them tensors with 7.41 M numbers" in printed


DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint32", "float16", "bfloat16", "float32", "float64",
          "complex64", "complex128")  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_every_type_and_shape_of_array(name: str, shape, tmp_path: Path) -> None:
    x = torch.randint(2, shape).to(getattr(torch, name))
    tree = read_checkpoint(written(tmp_path, packed({"params": {"layer": {"x": x}}})))
    found = tree["params"]["layer"]["x"]
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert torch.equal(found, x)


def test_every_kind_of_value(tmp_path: Path) -> None:
    numbers = [0, 127, 128, 255, 256, 65536, 1 << 32, (1 << 64) - 1, -1, -32, -33, -129, -32769, -(1 << 31) - 1]
    extras = {
        "numbers": numbers, "floats": [0.5, -1e300], "none": None, "flags": [True, False], "bytes": b"x" * 300,
        "text": "ä" * 20, "long text": "y" * 70000, "list": list(range(20)), "complex": 1 + 2j,
        **{f"key {i}": i for i in range(20)},
    }  # fmt: skip
    if find_spec("msgpack"):  # which flax writes with
        import msgpack

        plain = {key: value for key, value in extras.items() if key != "complex"}
        assert packed(plain) == msgpack.packb(plain)
    content = packed({"params": {"a": {"w": torch.ones(2)}}, **extras, "scalar": np.float32(0.5)})
    tree = read_checkpoint(written(tmp_path, content))
    assert {key: tree[key] for key in extras} == extras
    assert tree["scalar"].item() == 0.5
    assert load_state_dict(tmp_path / "checkpoint_300000").keys() == {"params/a/w"}


def pieces(**changed) -> dict:
    """An array of 3 x 8 as flax writes one of more than a gigabyte; eleven pieces, so that "10" comes after "9"."""
    flat = torch.arange(24.0)
    chunks = {str(i): flat[2 * i : 2 * i + 2 if i < 10 else 24] for i in range(11)}
    parts = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 8}, "chunks": dict(sorted(chunks.items()))}
    return {"params": {"layer": {"kernel": parts | changed}}}


def test_arrays_in_pieces_are_joined(tmp_path: Path) -> None:
    found = load_state_dict(written(tmp_path, packed(pieces())))
    assert torch.equal(found["params/layer/kernel"], torch.arange(24.0).view(3, 8))


def test_any_cut_of_a_file_is_said_in_one_sentence(tmp_path: Path) -> None:
    content = packed({"step": 7, "params": {"layer": {"kernel": torch.ones(2, 3), "bias": torch.ones(3)}}})
    for length in range(12, len(content)):
        with pytest.raises(CheckpointError, match=r"checkpoint_300000 is cut off: \d+ (bytes|values) should follow"):
            read_checkpoint(written(tmp_path, content[:length]))


def leaf(content: bytes) -> bytes:
    """{"params": {"x": content}}."""
    return b"\x81" + packed("params") + b"\x81" + packed("x") + content


HOSTILE = {
    "more bytes than there are": (leaf(b"\xc6\xff\xff\xff\xff"), "is cut off: 4294967295 bytes should follow"),
    "more values than bytes": (leaf(b"\xdd\xff\xff\xff\xff"), "is cut off: 4294967295 values should follow"),
    "more keys than bytes": (leaf(b"\xdf\xff\xff\xff\xff"), "is cut off: 8589934590 values should follow"),
    "an endless nest": (leaf(b"\x91" * 5000), "nests more than 64 maps"),
    "a nest of arrays": (leaf(extension(ARRAY, b"\x91" * 5)), "is cut off"),
    "an unknown extension": (leaf(extension(5, b"abcd")), "an extension of type 5, which is none of flax's"),
    "a time stamp": (leaf(extension(-1, b"abcd")), "an extension of type -1"),
    "an extension that is no list": (leaf(extension(ARRAY, packed("shape"))), "an extension of type 1 that is no list"),
    "rest behind an array": (leaf(extension(ARRAY, packed([[0], "int8", b""]) + b"\xc0")), "type 1 that is no list"),
    "two fields": (leaf(extension(ARRAY, packed([[1], "int8"]))), "not its shape, type and bytes"),
    "objects": (leaf(array([1], "object", b"12345678")), "an array of type 'object', which is not read"),
    "a nameless type": (leaf(extension(ARRAY, packed([[1], [], b"1"]))), r"an array of type \[\], which is not read"),
    "a larger shape": (leaf(array([1 << 40, 4], "float32", b"1234")), "type float32 in 4 bytes"),
    "a smaller shape": (leaf(array([1], "float32", b"12345678")), r"shape \[1\] and type float32 in 8 bytes"),
    "a negative side": (leaf(array([-1, -1], "float32", b"1234")), r"shape \[-1, -1\]"),
    "a side that is true": (leaf(array([True], "int8", b"1")), r"shape \[True\]"),
    "a complex of texts": (leaf(extension(COMPLEX, packed(["1", "2"]))), "no pair of numbers"),
    "a key that is no text": (b"\x82" + packed("params") + b"\x01\x02\x03", "the key before byte 10 is no text"),
    "text that is none": (leaf(b"\xa2\xff\xff"), "is no UTF-8"),
    "a byte that begins nothing": (leaf(b"\xc1"), "is no msgpack: byte 11 is 0xc1"),
    "more behind its end": (leaf(packed(1)) + b"\x01", "not one map from beginning to end"),
    "no pieces": (packed(pieces(chunks={})), "in pieces without its shape or its pieces"),
    "pieces that are texts": (packed(pieces(chunks={"0": "x"})), "in pieces without its shape or its pieces"),
    "unnumbered pieces": (packed(pieces(chunks={"x": torch.ones(24)})), "in pieces without its shape or its pieces"),
    "too few pieces": (packed(pieces(chunks={"0": torch.ones(2)})), r"shape \[3, 8\] in pieces that do not make it up"),
    "pieces of two types": (
        packed(pieces(chunks={"0": torch.ones(12), "1": torch.ones(12).double()})), "do not make it up",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(written(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_other_formats_are_not_taken_for_it(tmp_path: Path) -> None:
    for size in (1, 40, 200):  # the first bytes of safetensors are the length of a header, which may look like msgpack
        weights = {f"{'k' * size}{i}": torch.ones(1) for i in range(3)}
        safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
        assert load_state_dict(tmp_path / "a.safetensors").keys() == weights.keys()
    head = b"\x88\xa6\x00\x00\x00\x00\x00\x00{"
    assert not flax_msgpack.is_flax(head)
    assert not flax_msgpack.is_flax(b"\x80\x02}q\x00.")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert load_state_dict(tmp_path / "a.pth").keys() == {"a"}
