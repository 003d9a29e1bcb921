"""What can be known of the Triton kernels without a GPU: the machine code that they compile to, read and counted.

Nothing here is a measurement of speed. A kernel is compiled ahead of time exactly as its launcher would have it
compiled, and its registers, spills, shared memory, load widths and instruction counts are read from the binary.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmvision.ops.triton import interpreting

__all__ = ["KERNELS", "MAX_SHARED", "TARGETS", "Report", "ReportError", "examine", "inspect_all"]

KERNELS = ("selective_scan", "linear_scan", "ssd_scan", "causal_conv1d")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
MAX_SHARED = 48 * 1024  # bytes per program
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1", torch.int64: "*i64",
    torch.int32: "*i32",
}  # fmt: skip
# Machine instructions that tell how a kernel spends its time: name in the report → how they begin, NVIDIA and AMD.
_COUNTED = {
    "exp and division": ("MUFU", "v_exp|v_rcp|v_log"),
    "matrix": ("HMMA|HGMMA|WGMMA", "v_mfma"),
    "multiply-add": ("FFMA", "v_fma|v_pk_fma|v_fmac"),
    "shuffles": ("SHFL", r"ds_bpermute|ds_swizzle|v_\w+_dpp"),
    "barriers": ("BAR", "s_barrier"),
}


class ReportError(RuntimeError):
    """The report cannot be made; the message says why in one line."""


@dataclass(frozen=True)
class Report:
    """One kernel, compiled for one target from tokens of one type.

    Args:
        kernel: Name of the launch.
        target: Key of `TARGETS`.
        dtype: Type of the tokens.
        registers: Per thread.
        budget: At most so many registers.
        spills: Bytes (NVIDIA) or registers (AMD) that did not fit and went to memory.
        shared: Bytes of shared memory per program.
        widths: Bits of the widest load of each bulk operand, by its name.
        counts: Instructions in the binary, by kind.
    """

    kernel: str
    target: str
    dtype: str
    registers: int
    budget: int
    spills: int
    shared: int
    widths: dict[str, int]
    counts: dict[str, int]

    def broken(self) -> list[str]:
        """The budgets that it exceeds, in words."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.registers > self.budget:
            found.append(f"{self.registers} registers exceed {self.budget}")
        if self.shared > MAX_SHARED:
            found.append(f"{self.shared} bytes of shared memory exceed {MAX_SHARED}")
        found += [f"{name} is loaded {width} bits at a time" for name, width in self.widths.items() if width < 128]
        return [f"{self.kernel} on {self.target} in {self.dtype}: {text}" for text in found]


def inspect_all(
    kernels: Iterable[str] = KERNELS, targets: Iterable[str] = tuple(TARGETS), dtypes: Iterable[str] = ("bf16", "fp32")
) -> Iterable[Report]:
    """Compile and read every launch of the named kernels, one report after the other.

    Raises:
        ReportError: Triton is absent, or set to interpret.
    """
    if interpreting():
        raise ReportError("TRITON_INTERPRET=1 is set: nothing would be compiled")
    if importlib.util.find_spec("triton") is None:
        raise ReportError("triton is not installed; it comes with torch for Linux, or: pip install triton")
    import triton

    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # A cache of its own: cached code keeps the line numbers of the source that it was compiled from.
        triton.knobs.cache.dir = folder
        for name in kernels:
            module = importlib.import_module(f"ssmvision.ops.triton.{name}")
            for dtype in dtypes:
                for variant in module.variants(types[dtype]):
                    for target in targets:
                        yield examine(variant, target, dtype)


def examine(variant: Any, target: str, dtype: str) -> Report:
    """Compile one `ops.triton._common.Variant` for a target and read the binary."""
    compiled = _compile(variant.launch, target)
    code = _nvidia(compiled) if target.startswith("sm_") else _amd(compiled)
    widths = {name: _widest(variant.launch.kernel, name, code.loads) for name in variant.bulk}
    kind = 0 if target.startswith("sm_") else 1
    counts = {
        name: sum(n for op, n in code.instructions.items() if re.match(patterns[kind], op))
        for name, patterns in _COUNTED.items()
    }
    shared = max(compiled.metadata.shared, code.shared)
    return Report(
        variant.name, target, dtype, code.registers, variant.registers, code.spills, shared, widths,
        {"instructions": sum(code.instructions.values()), **counts},
    )  # fmt: skip


def _compile(launch: Any, target: str) -> Any:
    """As Triton's own launcher would: 1 is a constant, and what 16 divides is known to be so divisible."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {**launch.arguments, **launch.constants}
    general = set(launch.kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and name not in general):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (name not in general and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


@dataclass(frozen=True)
class _Code:
    registers: int
    spills: int
    shared: int
    instructions: Counter[str]
    loads: list[tuple[str, int, int]]  # (source file, line, bits)


def _nvidia(compiled: Any) -> _Code:
    """Through the disassemblers that triton ships."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-g", "-c", file.name)
    place: tuple[str, int] = ("", 0)
    instructions: Counter[str] = Counter()
    loads = []
    for line in listing.splitlines():
        if match := re.search(r'//## File "([^"]*)", line (\d+)', line):
            place = (Path(match[1]).name, int(match[2]))
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            instructions[match[1]] += 1
            if match[1].startswith("LDG"):
                width = re.search(r"\.[US]?(8|16|64|128)\b", match[1])
                loads.append((*place, int(width[1]) if width else 32))
    local = sum(n for op, n in instructions.items() if op.startswith(("LDL", "STL")))
    return _Code(_number(usage, r"REG:(\d+)"), max(_number(usage, r"STACK:(\d+)"), local),
                 _number(usage, r"SHARED:(\d+)"), instructions, loads)  # fmt: skip


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _amd(compiled: Any) -> _Code:
    assembly = compiled.asm["amdgcn"]
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', assembly))
    place: tuple[str, int] = ("", 0)
    instructions: Counter[str] = Counter()
    loads = []
    for line in assembly.splitlines():
        if match := re.match(r"\s+\.loc\s+(\d+)\s+(\d+)", line):
            place = (Path(files.get(match[1], "")).name, int(match[2]))
        elif match := re.match(r"\s+([a-z]+_\w+)\s", line):
            instructions[match[1]] += 1
            if match[1].startswith(("global_load", "buffer_load")):
                wide = re.search(r"dwordx(\d)", match[1])
                bits = 32 * int(wide[1]) if wide else 32 if "dword" in match[1] else 8 if "byte" in match[1] else 16
                loads.append((*place, bits))
    spills = _number(assembly, r"\.vgpr_spill_count:\s*(\d+)") + _number(assembly, r"\.sgpr_spill_count:\s*(\d+)")
    registers = _number(assembly, r"\.vgpr_count:\s*(\d+)")
    return _Code(registers, spills, _number(assembly, r"\.group_segment_fixed_size:\s*(\d+)"), instructions, loads)


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ReportError(f"the compiler's output does not say {pattern!r}; another version of triton?")
    return int(match[1])


def _widest(kernel: Any, operand: str, loads: list[tuple[str, int, int]]) -> int:
    """Bits of the widest load whose source line reads through `operand`."""
    path = Path(inspect.getfile(kernel.fn))
    lines = path.read_text(encoding="utf-8").splitlines()
    reading = {i for i, text in enumerate(lines, start=1) if re.search(rf"tl\.load\(\s*{operand}\b", text)}
    widths = [bits for file, line, bits in loads if file == path.name and line in reading]
    if not widths:
        raise ReportError(f"no load of {operand} found in the machine code of {kernel.fn.__name__}")
    return max(widths)
