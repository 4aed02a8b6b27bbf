"""`python -m bench.aot [--out FILE]`: compiles every Triton kernel for sm_80, sm_90 and sm_100, without a GPU.

Each `dgm_kernels/<op>/triton.py` lists its kernels in `aot_specs()`: an iterable of
(name, jit function, {argument: type such as "*fp32", "i64"}, {constexpr: value}, {option such as "num_warps": value}),
with the capabilities behind them where a form is not for all.
A kernel that spills registers is an error.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

import dgm_kernels
from bench.markdown import markdown_table

CAPABILITIES = (80, 90, 100)
HEADINGS = (
    "kernel",
    "target",
    "registers",
    "spill bytes",
    "stack bytes",
    "shared bytes",
    "16-byte loads",
    "16-byte stores",
)


class Spec(NamedTuple):
    """A kernel to compile: types of its run-time arguments, values of the others, launch options."""

    name: str
    function: triton.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    capabilities: Sequence[int] = CAPABILITIES


class Usage(NamedTuple):
    """What one compiled kernel takes of the device."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
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
    registers, spills, stack = _assemble(kernel.asm["ptx"], capability)
    target = sm_arch_from_capability(capability)
    loads, stores = (kernel.asm["ptx"].count(f"{access}.global.v4.b32") for access in ("ld", "st"))
    return Usage(spec.name, target, registers, spills, stack, kernel.metadata.shared, loads, stores)


def _assemble(ptx: str, capability: int) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack of a thread.

    `ptxas -v` tells spills from the stack that libdevice's sin and cos use; `cuobjdump` does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        command += [str(source), "-o", str(source.with_suffix(".cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise RuntimeError(f"ptxas reported no registers: {log}")
    stack = [int(found) for found in re.findall(r"(\d+) bytes stack frame", log)]
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return max(registers), sum(spills), max(stack, default=0)


def compile_all(specs: Iterable[Spec]) -> list[Usage]:
    """Compile every kernel for every capability that it has a form for."""
    return [compile_spec(spec, capability) for spec in specs for capability in spec.capabilities]


def op_specs() -> Iterator[Spec]:
    """The kernels of every op, named `<op>.<kernel>`."""
    for module in pkgutil.iter_modules(dgm_kernels.__path__):
        name = f"dgm_kernels.{module.name}.triton"
        is_op = module.ispkg and not module.name.startswith("_")
        if is_op and importlib.util.find_spec(name) is not None:
            for found in importlib.import_module(name).aot_specs():
                spec = Spec(*found)
                yield spec._replace(name=f"{module.name}.{spec.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    out = parser.parse_args().out
    usages = compile_all(op_specs())
    if not usages:
        sys.exit("no op lists a Triton kernel")
    table = markdown_table(HEADINGS, [[str(value) for value in usage] for usage in usages])
    print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table + "\n")
    spilling = [f"{usage.kernel} ({usage.target})" for usage in usages if usage.spill_bytes]
    if spilling:
        sys.exit("registers spilled by " + ", ".join(spilling))


if __name__ == "__main__":
    main()
