"""`python -m bench.aot [--only OP] [--out FILE]`: compiles Triton kernels for sm_80, sm_90 and sm_100, without a GPU.

Each `dgm_kernels/<op>/triton.py` lists its kernels in `aot_specs()`: an iterable of
(name, jit function, {argument: type such as "*fp32", "i64"}, {constexpr: value}, {option such as "num_warps": value}),
with the capabilities behind them where a form is not for all.
A kernel that spills registers is an error.
"""

import argparse
import concurrent.futures
import importlib
import importlib.util
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

import dgm_kernels
from bench.markdown import markdown_table

CAPABILITIES = (80, 90, 100)
HEADINGS = (
    "kernel",
    "target",
    "warps",
    "registers",
    "spill bytes",
    "stack bytes",
    "shared bytes",
    "occupancy",
    "tensor core",
    "16-byte loads",
    "16-byte stores",
)
# Of a multiprocessor: registers, bytes of shared memory (a block takes 1 KiB of them for itself), warps, blocks.
LIMITS = {80: (65536, 164 << 10, 64, 32), 90: (65536, 228 << 10, 64, 32), 100: (65536, 228 << 10, 64, 32)}
TENSOR_CORE = r"\b(HGMMA|HMMA|UTC\w*MMA)\b"
LOADS, STORES = r"\b(?:LDG\.E|LDGSTS)[\w.]*\.128\b|\bUTMALDG\b", r"\bSTG\.E[\w.]*\.128\b|\bUTMASTG\b"


INTRODUCTION = f"""# Triton kernels, compiled ahead of time

Written by `python -m bench.aot --out` with this file's name, Triton {triton.__version__}. Where a cell has several
values they are for the targets in the order of the second column. Nothing here was run on a GPU. `tensor core` counts
matrix instructions in the machine code, the last two columns accesses of 16 bytes to global memory, those straight to
shared memory among them; the two sides of a branch both count. Occupancy is the share of a multiprocessor's warps that
fit on it at once.
"""


class Spec(NamedTuple):
    """A kernel to compile: types of its run-time arguments, values of the others, launch options."""

    name: str
    function: triton.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    capabilities: Sequence[int] = CAPABILITIES


class Usage(NamedTuple):
    """What one compiled kernel takes of the device; the counts are of instructions in its machine code.

    Occupancy is the share of a multiprocessor's warps that fit on it at once. `tensor_core` names the matrix
    instructions and counts them; loads count those straight to shared memory, too.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    occupancy: str
    tensor_core: str
    wide_loads: int
    wide_stores: int


def compile_spec(spec: Spec, capability: int) -> Usage:
    """Compile for one compute capability (90 is sm_90) and read the resources that it uses."""
    constexprs = dict(spec.constexprs)
    signature = {
        argument: "constexpr" if argument in constexprs else spec.signature[argument]
        for argument in spec.function.arg_names
    }
    # Tensors of PyTorch's allocator are aligned: this is the specialisation that runs.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, type_ in enumerate(signature.values()) if type_.startswith("*")
    }
    source = ASTSource(spec.function, signature, constexprs, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(spec.options))
    registers, spills, stack, code = _assemble(kernel.asm["ptx"], capability)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    found = Counter(re.findall(TENSOR_CORE, code))
    return Usage(
        spec.name,
        sm_arch_from_capability(capability),
        warps,
        registers,
        spills,
        stack,
        shared,
        f"{occupancy(capability, warps, registers, shared):.0%}",
        ", ".join(f"{count} {name}" for name, count in sorted(found.items())),
        len(re.findall(LOADS, code)),
        len(re.findall(STORES, code)),
    )


def occupancy(capability: int, warps: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that blocks of so many warps fill at once.

    Registers are given to a warp in units of 256; source: CUDA C++ programming guide, compute capabilities.
    """
    all_registers, all_shared, all_warps, most = LIMITS[capability]
    of_warp = -(-registers * 32 // 256) * 256
    fits = (most, all_warps // warps, all_registers // of_warp // warps, all_shared // (shared + 1024))
    return min(fits) * warps / all_warps


def _assemble(ptx: str, capability: int) -> tuple[int, int, int, str]:
    """Registers, spilled bytes and stack of a thread, and the machine code as text.

    `ptxas -v` tells spills from the stack that libdevice's sin and cos use; `cuobjdump` does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        command += [str(source), "-o", str(binary)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        disassembler = knobs.nvidia.nvdisasm.path
        code = subprocess.run([disassembler, str(binary)], check=True, capture_output=True, text=True).stdout
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise RuntimeError(f"ptxas reported no registers: {log}")
    stack = [int(found) for found in re.findall(r"(\d+) bytes stack frame", log)]
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return max(registers), sum(spills), max(stack, default=0), code


def compile_all(specs: Iterable[Spec]) -> list[Usage]:
    """Compile every kernel for every capability that it has a form for, on all cores."""
    jobs = [(spec, capability) for spec in specs for capability in spec.capabilities]
    # Jitted functions cannot be sent to a process: a fork has them.
    _JOBS[:] = jobs
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_job, range(len(jobs))))


_JOBS: list[tuple[Spec, int]] = []


def _compile_job(index: int) -> Usage:
    return compile_spec(*_JOBS[index])


def op_specs() -> Iterator[Spec]:
    """The kernels of every op, named `<op>.<kernel>`."""
    for module in pkgutil.iter_modules(dgm_kernels.__path__):
        name = f"dgm_kernels.{module.name}.triton"
        is_op = module.ispkg and not module.name.startswith("_")
        if is_op and importlib.util.find_spec(name) is not None:
            for found in importlib.import_module(name).aot_specs():
                spec = Spec(*found)
                yield spec._replace(name=f"{module.name}.{spec.name}")


def table(usages: Sequence[Usage]) -> str:
    """A line a kernel, and in each cell one value for all targets or one for each."""
    merged: dict[str, list[Usage]] = {}
    for usage in usages:
        merged.setdefault(usage.kernel, []).append(usage)
    rows = []
    for found in merged.values():
        columns = [list(dict.fromkeys(map(str, column))) for column in zip(*found, strict=True)]
        every = [[str(value) for value in column] for column in zip(*found, strict=True)]
        rows.append([c[0] if len(c) == 1 else " / ".join(e) for c, e in zip(columns, every, strict=True)])
    return markdown_table(HEADINGS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--only", help="one op, such as sampler")
    arguments = parser.parse_args()
    out = arguments.out
    specs = [spec for spec in op_specs() if arguments.only in (None, spec.name.split(".")[0])]
    usages = compile_all(specs)
    if not usages:
        sys.exit("no op lists a Triton kernel")
    lines = table(usages)
    print(lines)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"{INTRODUCTION}\n{lines}\n")
    spilling = [f"{usage.kernel} ({usage.target})" for usage in usages if usage.spill_bytes]
    if spilling:
        sys.exit("registers spilled by " + ", ".join(spilling))


if __name__ == "__main__":
    main()
