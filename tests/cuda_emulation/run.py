"""Builds csrc/cuda as CPU code and runs pytest on it, with the arguments given (by default the ops' tests)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"
LIBRARY = BUILD / "ops.so"
TORCH = Path(torch.__file__).parent / "lib"
# What no C++ compiler reads, and what would register the ops for CUDA.
EDITS = (
    r"s/TORCH_LIBRARY_IMPL(peft_ext, CUDA/TORCH_LIBRARY_IMPL(peft_ext, CPU/",
    r"s/#ifdef __CUDACC__/#if 1/",
    r"s/extern __shared__ __align__(16) unsigned char shared\[\];/"
    r"unsigned char* const shared = ::cuda_emulation::grid.shared;/",
)
REPLACED = {path.name for path in (HERE / "include" / "cuda").iterdir()}
# Not so here: see README.md.
LEFT_OUT = "cpu and not thread_count and not one_rounding and not autocast_of_the and not bad_arg"


def ninja_file() -> str:
    """Copies of csrc/cuda with the edits, their objects and those of the checks, and the library."""
    includes = " ".join(f"-I{path}" for path in (HERE / "include", BUILD / "csrc", CSRC, *include_paths()))
    # A vector that does not lie on a multiple of its size, which a GPU cannot read, ends the process.
    alignment = "-fsanitize=alignment -fsanitize-undefined-trap-on-error"
    quiet = "-Wno-unknown-pragmas -Wno-attributes"
    flags = f"-std=c++20 -O1 -g -fPIC {quiet} {alignment} -include {HERE}/include/cuda_emulation.h"
    edits = " ".join(f"-e '{edit}'" for edit in EDITS).replace("$", "$$")
    lines = [
        "rule edit",
        f"  command = sed {edits} $in > $out",
        "rule compile",
        f"  command = {get_cxx_compiler()} {flags} {includes} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {get_cxx_compiler()} -shared $in -o $out -L{TORCH} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,{TORCH}",
    ]
    copies = {path: BUILD / "csrc" / "cuda" / path.name for path in sorted((CSRC / "cuda").iterdir())}
    copies = {path: copy for path, copy in copies.items() if path.name not in REPLACED}
    lines += [f"build {copy}: edit {path}" for path, copy in copies.items()]
    headers = " ".join(str(copy) for copy in copies.values() if copy.suffix == ".h")
    sources = [HERE / "scheduler.cpp", *sorted((CSRC / "common").glob("*.cpp"))]
    sources += [copy for copy in copies.values() if copy.suffix == ".cu"]
    objects = {source: BUILD / "objects" / f"{source.parent.name}_{source.stem}.o" for source in sources}
    lines += [f"build {target}: compile {source} || {headers}" for source, target in objects.items()]
    lines.append(f"build {LIBRARY}: link {' '.join(map(str, objects.values()))}")
    return "\n".join(lines) + "\n"


def main() -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(ninja_file())
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run(["ninja", "-C", str(BUILD), *jobs], check=True)
    environment = os.environ | {"PEFT_EXT_EMULATED_CUDA": str(LIBRARY), "PYTHONPATH": f"{ROOT}:{HERE}"}
    arguments = sys.argv[1:] or ["tests/ops", "-k", LEFT_OUT]
    return subprocess.call(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulate", *arguments], cwd=ROOT, env=environment
    )


if __name__ == "__main__":
    raise SystemExit(main())
