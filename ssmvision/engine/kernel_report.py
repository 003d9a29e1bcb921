"""What can be known of the Triton kernels without a GPU: they are compiled for absent machines and examined.

Registers, spills, shared memory and widths of loads are read from the machine code; bytes and exponentials are
counted; from these follows a bound that is predicted, not measured.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmvision.data import UserError

__all__ = ["MACHINES", "OPERATORS", "TARGETS", "Finding", "Traffic", "examine", "kernels", "traffic"]

OPERATORS = ("selective_scan", "linear_scan", "ssd_scan", "causal_conv1d")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARED_LIMIT = 48 * 1024

# Of a pipeline that copies the tokens four times, projects, scans and merges: bytes per element of (b, l, d), bfloat16.
# Copies 10, two projections 16, scan 32, merge 20, cast and norm 4; and delta's low rank, B and C, which are written,
# split (read and written) and read. With one state that is 83.
MATERIALISED, MATERIALISED_COEFFICIENTS = 82, 4
RATIO_LIMIT = 0.35
BANDWIDTH, EXPONENTIALS = 3.35e12, 3.7e12  # per second, of an H100 by its data sheet: memory, and 16 a clock and core


class Machine(NamedTuple):
    """A GPU of a target, by its data sheet.

    Args:
        name: As it is sold.
        warps: That run at once with 128 registers each.
        cache: Bytes of L2.
    """

    name: str
    warps: int
    cache: int


MACHINES = {
    "sm_80": Machine("A100", 108 * 16, 40 * 2**20),
    "sm_90": Machine("H100", 132 * 16, 50 * 2**20),
    "gfx942": Machine("MI300X", 304 * 4 * 4, 32 * 2**20),  # 4 MiB in each of 8 dies
}

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


class Finding(NamedTuple):
    """One kernel compiled for one machine.

    Args:
        name: Of the kernel and its shape.
        registers: Per thread.
        limit: Of registers.
        spills: Bytes (NVIDIA) or registers (AMD) that did not fit.
        shared: Bytes of shared memory per program.
        widths: Bits of the widest load of each operand that is as large as the tokens.
        counts: How often the machine code holds an exponential and a fused multiply-add.
    """

    name: str
    registers: int
    limit: int
    spills: int
    shared: int
    widths: dict[str, int]
    counts: dict[str, int]

    @property
    def broken(self) -> list[str]:
        """The budgets that this kernel exceeds, in words."""
        found = [f"{self.registers} registers, at most {self.limit}"] if self.registers > self.limit else []
        found += [f"{self.spills} spilled"] if self.spills else []
        found += [f"{self.shared} bytes of shared memory, at most {SHARED_LIMIT}"] if self.shared > SHARED_LIMIT else []
        return found + [f"{name} read by {bits} bits, not 128" for name, bits in self.widths.items() if bits < 128]


class Traffic(NamedTuple):
    """Counted bytes per element of (b, l, d) of a forward scan of bfloat16 tokens along several routes, merged.

    Args:
        cached: Bytes if tokens and sums that are in flight stay in the cache from route to route.
        cold: Bytes if nothing does.
        materialised: Bytes of the pipeline that it replaces.
        in_flight: Bytes of tokens and sums that would have to stay.
        fits: Whether the machine's L2 holds them, so that `cached` is what to expect, else `cold`.
        picoseconds: Of a whole H100 for what is to expect, or for the exponentials if these take longer.
        bound: Which of the two it is.
    """

    cached: float
    cold: float
    materialised: float
    in_flight: float
    fits: bool
    picoseconds: float
    bound: str


def traffic(
    batch: int, routes: int, channels: int, states: int, rank: int, tokens: int, target: str
) -> Traffic:  # fmt: skip
    """Counts what the programs of one call must move, given how the launcher cuts the work.

    Args:
        batch: Samples.
        routes: Scans over the same tokens, more than one.
        channels: Of a token.
        states: Per channel, at most 16.
        rank: Of delta; 0 if it comes in full width.
        tokens: Of a sample.
        target: One of `MACHINES`.
    """
    module = importlib.import_module("ssmvision.ops.triton.selective_scan")
    machine, lanes = MACHINES[target], TARGETS[target][2]
    coefficients = routes * (2 * states + (rank or channels)) * 2 / channels
    together = module.walks_together(batch, routes, channels, lanes)
    if together:
        # Every route reads u; the first writes sums, the others read and write them; a last pass widens these.
        cold = 2 * routes + 2 * (2 * routes - 1) + 2 + 4 + coefficients
        programs = min(batch * -(-channels // lanes), machine.warps)
        in_flight = programs * tokens * lanes * (2 + 2)
    else:  # every route has sums of its own, which a last pass reads together
        cold = 2 * routes + 2 * routes + 2 * routes + 4 + coefficients
        in_flight = batch * tokens * channels * 2 * (1 + routes)
    # Sums that are no longer needed are written back all the same.
    cached, fits = 2 + 2 * (1 if together else routes) + 4 + coefficients, in_flight <= machine.cache
    memory, exponentials = 1e12 * (cached if fits else cold) / BANDWIDTH, 1e12 * routes * (states + 1) / EXPONENTIALS
    bound = "memory" if memory > exponentials else "exp2"
    materialised = MATERIALISED + MATERIALISED_COEFFICIENTS * coefficients
    return Traffic(cached, cold, materialised, in_flight, fits, max(memory, exponentials), bound)


def kernels(operator: str, dtype: str, target: str) -> list[Any]:
    """The launches that the report examines: `ops.triton._common.Variant`s on meta tensors."""
    module = importlib.import_module(f"ssmvision.ops.triton.{operator}")
    return module.variants(DTYPES[dtype], TARGETS[target][2])


def examine(variant: Any, target: str) -> Finding:
    """Compiles a launch for a machine and reads its machine code.

    Raises:
        UserError: TRITON_INTERPRET is set, so that triton compiles nothing; or triton is not installed.
    """
    compiled = _compile(variant.launch, target)
    found = _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled)
    text = compiled.asm.get("ptx") or compiled.asm["llir"]
    widths = {name: _width(text, variant.launch.kernel, name) for name in variant.bulk}
    return Finding(variant.name, limit=variant.registers, widths=widths, **found)


def _compile(launch: Any, target: str) -> Any:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it for the report.")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
    except ImportError as error:
        raise UserError(f"The report needs triton: {error}. It comes with torch for Linux.") from error
    goal = GPUTarget(*TARGETS[target])
    backend = make_backend(goal)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        kind, constant, known = _argument(launch, name, backend)
        signature[name] = kind
        if kind == "constexpr":
            constants[(i,)] = constant
        if known:
            attributes[(i,)] = backend.parse_attr(known)
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=goal, options=launch.options(goal.backend))


def _argument(launch: Any, name: str, backend: Any) -> tuple[str, Any, str]:
    """An argument's type, its value where that is compiled in, and what else a call tells the compiler of it.

    That is: what divides by 16, without which no load is wide; and on AMD, which tensors have less than 2 GiB, whose
    addresses are then computed in other instructions.
    """
    if name in launch.constants:
        return "constexpr", launch.constants[name], ""
    value, special = launch.arguments[name], name not in (launch.kernel.do_not_specialize or ())
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], None, backend.get_tensor_specialization(value, align=True) if special else ""
    if value is None or (value == 1 and special):
        return "constexpr", value, ""
    known = backend.get_int_specialization(value, align=True) if special else ""
    return "i32" if abs(value) < 2**31 else "i64", None, known


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_nvidia_tool(*tool, file.name) for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("MUFU", "FFMA")}
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "spills": stack, "shared": compiled.metadata.shared, "counts": counts}


def _nvidia_tool(name: str, option: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    counts = {"MUFU": len(re.findall(r"v_exp_f32", text)), "FFMA": len(re.findall(r"v_(?:pk_)?fma\w*_f32", text))}
    return {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count"),
            "shared": compiled.metadata.shared, "counts": counts}  # fmt: skip


def _width(text: str, kernel: Any, name: str) -> int:
    """Bits of the widest load that stands in the source on a line `tl.load(NAME ...`."""
    path = Path(kernel.fn.__code__.co_filename)
    lines = {i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if f"tl.load({name}" in line}
    loads = _ptx_loads if ".visible .entry" in text else _llvm_loads
    return max((bits for where, bits in loads(text, path.name) if where in lines), default=0)


def _ptx_loads(text: str, file: str) -> Iterator[tuple[int, int]]:
    """Line of the source and bits of each load from memory in PTX."""
    where, inline = 0, False
    for line in text.splitlines():
        if "inline asm" in line:  # whose lines are counted on from that of the call
            inline = "begin" in line
        elif inline and ".loc" in line:
            continue
        elif match := re.search(r"\.loc\s.*?(\w+\.py):(\d+):\d+", line):
            where = int(match[2]) if match[1] == file else 0
        elif match := re.search(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", line):
            yield where, int(match[1] or 1) * int(match[2])


def _llvm_loads(text: str, file: str) -> Iterator[tuple[int, int]]:
    """The same in LLVM's code. AMD's assembly has the same loads, but of merged ones it forgets the lines."""
    files = re.findall(rf'^!(\d+) = !DIFile\(filename: "{re.escape(file)}"', text, re.MULTILINE)
    scopes = set(re.findall(rf"^!(\d+) = .*file: !(?:{'|'.join(files)})\b", text, re.MULTILINE))
    places = re.findall(r"^!(\d+) = .*DILocation\(line: (\d+),.*scope: !(\d+)", text, re.MULTILINE)
    lines = {place: int(line) for place, line, scope in places if scope in scopes}
    of_type = {"float": 32, "half": 16, "bfloat": 16}
    load = r"(?:ptr\.buffer\.load\.(?:v(\d+))?[a-z]+(\d+)|load (?:<(\d+) x )?(\w+)>?, ptr addrspace\(1\)).*!dbg !(\d+)"
    for many, bits, several, kind, place in re.findall(load, text):
        width = int(bits) if bits else of_type.get(kind) or int(kind.removeprefix("i"))
        yield lines.get(place, 0), int(many or several or 1) * width
