"""Compiles ``peft_ext._C`` against the torch that is importable here; the rest is in pyproject.toml.

Environment: ``MAX_JOBS`` (parallel compilations), ``PEFT_EXT_FORCE_CUDA`` (0 or 1, else decided from torch and
CUDA_HOME), ``TORCH_CUDA_ARCH_LIST`` (by default 8.0 and 9.0, which later ones run too), ``CXX``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from packaging.version import Version
from setuptools import setup
from setuptools.command.build_py import build_py as BuildPy
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
BUILD_TEMP = ROOT / "build/native"

COMMON_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
# What -ffast-math gives to these loops, without its licence to break NaN and infinity.
KERNEL_FLAGS = ["-fPIC", "-DNDEBUG", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def read_lines(path: Path) -> list[str]:
    """The lines of a list file, without blanks and # comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def instruction_sets() -> dict[str, list[str]]:
    """Name and compiler flags of each set that this machine's architecture knows."""
    sets = {name: flags for name, *flags in map(str.split, read_lines(CSRC / "cpu/kernels/isa.txt"))}
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {name: flags for name, flags in sets.items() if x86 or not flags}


def decide_cuda(cuda_sources: list[str]) -> bool:
    """Whether to build the CUDA kernels: never by asking for a device, so that builders need none."""
    possible = torch.version.cuda is not None and CUDA_HOME is not None and bool(cuda_sources)
    facts = f"torch.version.cuda={torch.version.cuda}, CUDA_HOME={CUDA_HOME}, {len(cuda_sources)} .cu files"
    force = os.environ.get("PEFT_EXT_FORCE_CUDA")
    if force == "1" and not possible:
        raise SystemExit(f"PEFT_EXT_FORCE_CUDA=1, but a CUDA build is not possible: {facts}")
    use_cuda = possible and force != "0"
    print(f"peft_ext: building for {'CPU and CUDA' if use_cuda else 'CPU only'} ({facts}, PEFT_EXT_FORCE_CUDA={force})")
    return use_cuda


class build_py(BuildPy):
    """setuptools' build_py into an empty folder: else the wheel keeps modules that the tree no longer has."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class build_ext(BuildExtension):
    """torch's build_ext, plus the kernel units, each compiled once per instruction set."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Not the front end's temporary folder: there, every editable install would compile everything.
        self.build_temp = str(BUILD_TEMP)

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        extension.define_macros.append(("PEFT_EXT_VERSION", f'"{self.distribution.get_version()}"'))
        extension.extra_objects = build_kernels()
        super().build_extensions()

    def run(self) -> None:
        super().run()
        built_for = {"torch": torch.__version__, "cuda": torch.version.cuda if USE_CUDA else None}
        target = Path(self.get_ext_fullpath("peft_ext._C")).with_name("_build.json")
        target.write_text(json.dumps(built_for) + "\n")


def build_kernels() -> list[str]:
    """Compiles the kernel units by ninja, which sees changed headers and flags; returns the objects."""
    flags = " ".join([*COMMON_FLAGS, *KERNEL_FLAGS, f"-I{CSRC}"])
    rules = [
        "rule kernel",
        f"  command = {get_cxx_compiler()} {flags} $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    folder = BUILD_TEMP / "kernels"
    objects = []
    for isa, isa_flags in instruction_sets().items():
        for source in KERNELS:
            objects.append(str(folder / isa / f"{source.stem}.o"))
            rules += [
                f"build {objects[-1]}: kernel {source}",
                f"  isa_flags = -DPEFT_EXT_ISA=isa_{isa} {' '.join(isa_flags)}",
            ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run(["ninja", "-v", "-C", str(folder), *jobs], check=True)
    return objects


SOURCES = [CSRC / line for line in read_lines(CSRC / "sources.txt")]
KERNELS = [source for source in SOURCES if source.parent.name == "kernels"]
CUDA_SOURCES = [str(source.relative_to(ROOT)) for source in SOURCES if source.suffix == ".cu"]
CPP_SOURCES = [str(source.relative_to(ROOT)) for source in SOURCES if source.suffix == ".cpp" and source not in KERNELS]
USE_CUDA = decide_cuda(CUDA_SOURCES)

macros = [("PEFT_EXT_ISA_BUILT", f'"{",".join(instruction_sets())}"')]
if USE_CUDA:
    # torch's own default is the device of this machine, which a builder need not have.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    macros.append(("PEFT_EXT_CUDA_VERSION", f'"{torch.version.cuda}"'))

extension = (CUDAExtension if USE_CUDA else CppExtension)(
    "peft_ext._C",
    CPP_SOURCES + (CUDA_SOURCES if USE_CUDA else []),
    include_dirs=[str(CSRC)],
    define_macros=macros,
    extra_compile_args={
        "cxx": [*COMMON_FLAGS, "-fopenmp"],
        "nvcc": ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fopenmp,-fvisibility=hidden"],
    },
    # Not -fopenmp: libtorch_cpu brings the OpenMP runtime, and a second one would have its own threads.
    extra_link_args=["-s"],
)

torch_version = Version(torch.__version__)
setup(
    ext_modules=[extension],
    cmdclass={"build_py": build_py, "build_ext": build_ext},
    install_requires=[
        # The C++ interface is stable within a minor version only. The local part (+cpu) is no requirement.
        f"torch>={torch_version.public},<{torch_version.major}.{torch_version.minor + 1}",
        "numpy",
        "safetensors>=0.4",
        "typer>=0.12",
        "rich>=13",
    ],
)
