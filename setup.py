"""Drives CMake: builds dgm_kernels._C in build/<tag>/ with ninja, or installs without it and records why.

Environment: DGM_NO_NATIVE=1 skips the native build; DGM_CUDA=0|1|auto; DGM_CUDA_ARCHS, "80;90;100" unless set.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80;90;100"


class NativeUnavailableError(Exception):
    """The native build, or the CUDA part of it, cannot start here; the message says what is missing."""


def find_tool(name: str) -> str:
    """Path of a build tool: next to this Python first, so that an environment's own tool wins, then on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise NativeUnavailableError(f"{name} was not found")
    return path


def check_toolchain() -> None:
    """Raises NativeUnavailableError unless a compiler, Python's headers and PyTorch are there."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        raise NativeUnavailableError(f"no C++ compiler was found (looked for {', '.join(compilers)})")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise NativeUnavailableError("Python.h was not found: the Python development headers are not installed")
    if importlib.util.find_spec("torch") is None:
        raise NativeUnavailableError("PyTorch is not in the build environment: install with --no-build-isolation")


def find_nvcc(torch_cuda: str | None) -> tuple[Path, str]:
    """The CUDA compiler that fits PyTorch's CUDA and its version; raises NativeUnavailableError where there is none."""
    if torch_cuda is None:
        raise NativeUnavailableError("this PyTorch is built without CUDA")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found and not homes]
    candidates += [Path("/usr/local/cuda/bin/nvcc")] if not homes else []
    nvcc = next((path for path in candidates if path.exists()), None)
    if nvcc is None:
        raise NativeUnavailableError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None:
        raise NativeUnavailableError(f"{nvcc} --version named no release")
    if version[1].split(".")[0] != torch_cuda.split(".")[0]:
        raise NativeUnavailableError(f"nvcc is of CUDA {version[1]}, PyTorch of CUDA {torch_cuda}")
    return nvcc, version[1]


def cuda_archs(nvcc: Path) -> str:
    """DGM_CUDA_ARCHS, or those of the default ones that this nvcc knows."""
    if os.environ.get("DGM_CUDA_ARCHS"):
        return os.environ["DGM_CUDA_ARCHS"]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(arch for arch in DEFAULT_CUDA_ARCHS.split(";") if f"compute_{arch}" in known)


def find_cudart(nvcc: Path, site_packages: Path, major: str) -> tuple[Path, list[Path]]:
    """libcudart, the one that PyTorch's wheel loads before the toolkit's, and the wheels' CUDA header folders."""
    wheels = [site_packages / "nvidia" / f"cu{major}", site_packages / "nvidia" / "cuda_runtime"]
    toolkit = nvcc.resolve().parent.parent
    folders = [wheel / "lib" for wheel in wheels] + [toolkit / "lib64", toolkit / "lib", Path("/usr/local/cuda/lib64")]
    libraries = [library for folder in folders for library in sorted(folder.glob(f"libcudart.so.{major}*"))]
    if not libraries:
        raise NativeUnavailableError(f"libcudart.so.{major} was not found beside PyTorch or in the CUDA toolkit")
    return libraries[0], [wheel / "include" for wheel in wheels if (wheel / "include").is_dir()]


def cuda_options() -> tuple[dict[str, str], str | None]:
    """CMake variables of the CUDA build, or none and the reason."""
    import torch

    wanted = os.environ.get("DGM_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"DGM_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return {"DGM_CUDA": "OFF"}, "DGM_CUDA=0 was set"
    try:
        nvcc, version = find_nvcc(torch.version.cuda)
        cudart, includes = find_cudart(nvcc, Path(torch.__file__).parent.parent, version.split(".")[0])
    except NativeUnavailableError as missing:
        if wanted == "1":
            raise RuntimeError(f"DGM_CUDA=1 was set, but {missing}") from missing
        return {"DGM_CUDA": "OFF"}, str(missing)
    options = {
        "DGM_CUDA": "ON",
        "DGM_CUDA_ARCHS": cuda_archs(nvcc),
        "DGM_CUDART": str(cudart),
        "DGM_CUDA_INCLUDES": ";".join(map(str, includes)),
        "CMAKE_CUDA_COMPILER": str(nvcc),
    }
    return options, None


def build_native() -> tuple[Path, dict[str, object]]:
    """Configures and builds; returns the module and what is to be recorded of it. A compile error is not caught."""
    check_toolchain()
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    import torch
    from torch.utils.cpp_extension import include_paths

    cuda, cuda_reason = cuda_options()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    build_dir = (
        ROOT
        / "build"
        / "-".join(
            [sys.implementation.cache_tag, f"torch{torch.__version__}", "cuda" if cuda_reason is None else "cpu"]
        )
    )
    options = {
        "CMAKE_BUILD_TYPE": "None",  # every flag is in CMakeLists.txt
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build_dir),
        "DGM_EXT_SUFFIX": suffix,
        "DGM_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "DGM_TORCH_INCLUDES": ";".join(include_paths()),
        "DGM_TORCH_LIB_DIR": str(Path(torch.__file__).parent / "lib"),
        "DGM_TORCH_ABI": str(int(torch._C._GLIBCXX_USE_CXX11_ABI)),
        **cuda,
    }
    start_afresh_if_changed(build_dir, [cmake, os.environ.get("CXX"), cuda.get("CMAKE_CUDA_COMPILER")])
    defines = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *defines], check=True)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    subprocess.run([cmake, "--build", build_dir, "--parallel", jobs], check=True)
    info = {
        "native": True,
        "reason": None,
        "torch": torch.__version__,
        "cuda": cuda_reason is None,
        "cuda_reason": cuda_reason,
    }
    return build_dir / f"_C{suffix}", info


def start_afresh_if_changed(build_dir: Path, tools: list[str | None]) -> None:
    """Empties the build folder if it was configured with other compilers: CMake would forget the other settings."""
    record, tools_now = build_dir / "tools.json", json.dumps(tools)
    if not record.exists() or record.read_text() != tools_now:
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        record.write_text(tools_now)


class CMakeBuild(build_ext):
    """build_ext whose one extension is CMake's module; without a toolchain it records the reason and builds nothing."""

    def run(self) -> None:
        package = ROOT / "dgm_kernels" if self.inplace else Path(self.build_lib, "dgm_kernels")
        package.mkdir(parents=True, exist_ok=True)
        try:
            if os.environ.get("DGM_NO_NATIVE") == "1":
                raise NativeUnavailableError("DGM_NO_NATIVE=1 was set when the package was built")
            module, info = build_native()
            copy_if_changed(module, package / module.name)
        except NativeUnavailableError as missing:
            for stale in package.glob("_C.*.so"):
                stale.unlink()
            info = {"native": False, "reason": str(missing), "torch": None, "cuda": False, "cuda_reason": str(missing)}
            print(f"dgm_kernels: installing without the native extension: {missing}", file=sys.stderr)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        self.extensions = []  # nothing is left for setuptools to compile or copy


def copy_if_changed(source: Path, target: Path) -> None:
    """Replaces target by a new file, never in place: a running Python may have the old one mapped."""
    if target.exists() and target.stat().st_mtime_ns == source.stat().st_mtime_ns:
        return
    temporary = target.with_suffix(".tmp")
    shutil.copy2(source, temporary)
    temporary.replace(target)


setup(ext_modules=[Extension("dgm_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
