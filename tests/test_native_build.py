"""The native build: instruction sets kept apart and picked at run time, and an install that survives a bare machine."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def native() -> ModuleType:
    return pytest.importorskip("dgm_kernels._C", reason="the native extension is not built", exc_type=ImportError)


def test_build_info_names_this_pytorch(native):
    info = native.build_info()
    recorded = json.loads((ROOT / "dgm_kernels" / "_build_info.json").read_text())
    assert info["torch"] == torch.__version__.split("+")[0]
    assert recorded["native"] and recorded["torch"] == torch.__version__
    assert recorded["cuda"] == (info["cuda"] is not None)
    assert info["isas"][0] == "default"


@pytest.mark.parametrize(("capability", "allowed"), [("default", ["default"]), ("avx2", ["default", "avx2"])])
def test_active_isa_honours_aten_cpu_capability(native, capability, allowed):
    code = "import torch; from dgm_kernels import _C; print(_C.active_isa())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in allowed
    assert native.active_isa() in native.build_info()["isas"]


def _weak_symbols(objects: list[Path]) -> set[str]:
    """Symbols that the linker may take from any object that has them: inline functions and template instances."""
    text = subprocess.run(["nm", "-C", "--defined-only", *objects], check=True, capture_output=True, text=True).stdout
    fields = [line.split(maxsplit=2) for line in text.splitlines()]
    return {field[2] for field in fields if len(field) == 3 and field[1] in "WVu"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_inline_function_of_one_isa_can_run_on_another_cpu(native, isa):
    if isa not in native.build_info()["isas"]:
        pytest.skip(f"this build has no {isa} kernels")
    builds = (ROOT / "build").glob(f"{sys.implementation.cache_tag}-torch{torch.__version__}-*")
    objects = [path for build in builds for path in build.glob(f"CMakeFiles/*_{isa}.dir/**/*.o")]
    if not objects:
        pytest.skip("the objects of this build are not in build/")
    shared = {symbol for symbol in _weak_symbols(objects) if f"isa_{isa}" not in symbol}
    assert not shared, f"outside namespace isa_{isa}: {sorted(shared)}"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DGM_NO_NATIVE": "1"}, "DGM_NO_NATIVE=1"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found (looked for no-such-compiler)"),
    ],
)
def test_installs_without_the_extension_and_says_why(tmp_path, variables, reason):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "dgm_kernels" / "_build_info.json").read_text())
    assert info["native"] is False and reason in info["reason"]
    assert not (tmp_path / "dgm_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


def test_a_compile_error_fails_the_build(native, tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "dgm_kernels").mkdir()
    (tmp_path / "csrc" / "common" / "isa.cpp").write_text("this is not C++\n")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "DGM_CUDA": "0", "MAX_JOBS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "isa.cpp" in done.stdout + done.stderr
