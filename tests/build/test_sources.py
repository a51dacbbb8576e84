import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def read_lines(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_every_source_is_listed_once():
    listed = read_lines(CSRC / "sources.txt")
    present = [path.relative_to(CSRC).as_posix() for suffix in ("cpp", "cu") for path in CSRC.rglob(f"*.{suffix}")]
    assert sorted(listed) == sorted(present)


def test_the_processor_is_asked_for_every_compiler_flag():
    flags = {flag.removeprefix("-m") for line in read_lines(CSRC / "cpu/kernels/isa.txt") for flag in line.split()[1:]}
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', (CSRC / "cpu/capability.cpp").read_text()))
    assert asked == flags


@pytest.mark.parametrize("unit", sorted((CSRC / "cpu/kernels").glob("*.[ch]*")), ids=lambda path: path.name)
def test_kernel_units_include_no_torch(unit):
    assert not re.findall(r"#include <(?:ATen|torch|c10)/.*>", unit.read_text())
