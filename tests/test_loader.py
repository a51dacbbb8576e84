import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import peft_ext
from peft_ext import _loader

PACKAGE = Path(peft_ext.__file__).parent
BUILT_HERE = {"torch": torch.__version__, "cuda": None}
needs_native = pytest.mark.skipif(not _loader.native_devices, reason="peft_ext was not compiled")


def load(folder, built_for=None):
    """Runs a copy of the loader that finds ``built_for`` beside itself."""
    shutil.copy(PACKAGE / "_loader.py", folder)
    if built_for is not None:
        (folder / "_build.json").write_text(json.dumps(built_for))
    spec = importlib.util.spec_from_file_location("loader_copy", folder / "_loader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code, *, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_build_the_references_run_and_one_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_EXT_REQUIRE_NATIVE", raising=False)
    with pytest.warns(UserWarning, match=r"without its native extension: it was not compiled.*pip install") as caught:
        loader = load(tmp_path)
    assert len(caught) == 1
    assert loader.native_devices == frozenset()
    assert loader.describe()["native"] is False
    assert loader.describe()["why_not_native"] == "it was not compiled"


def test_require_native_makes_a_missing_build_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_EXT_REQUIRE_NATIVE", "1")
    with pytest.raises(ImportError, match=r"has no native extension: it was not compiled.*pip install"):
        load(tmp_path)


def test_a_build_for_another_python_is_no_build(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_EXT_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="not compiled for Python 3"):
        loader = load(tmp_path, BUILT_HERE)
    assert loader.native_devices == frozenset()


@pytest.mark.parametrize(
    "built_for",
    [{"torch": "2.9.1+cpu", "cuda": None}, {"torch": torch.__version__, "cuda": "1.0"}],
    ids=["torch", "cuda"],
)
def test_a_build_for_another_torch_is_refused_before_it_is_loaded(tmp_path, monkeypatch, built_for):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    with pytest.raises(ImportError) as caught:
        load(tmp_path, built_for)
    message = str(caught.value)
    assert f"built for torch {built_for['torch']} (CUDA: {built_for['cuda']})" in message
    assert f"you have torch {torch.__version__} (CUDA: {torch.version.cuda})" in message
    assert "pip install --no-build-isolation" in message


def test_a_patch_release_of_the_same_minor_version_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    major, minor = Version(torch.__version__).release[:2]
    loader = load(tmp_path, {"torch": f"{major}.{minor}.99", "cuda": None})
    assert loader.native_devices == {"cpu", "meta"}


@needs_native
def test_a_library_that_does_not_load_says_what_it_was_built_for(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "peft_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = (tmp_path / "peft_ext").glob("_C.*")
    library.write_bytes(b"not a library")
    result = run_python("import peft_ext", folder=tmp_path)
    assert result.returncode == 1
    assert "ImportError: peft_ext's extension, built for torch" in result.stderr
    assert "does not load with torch" in result.stderr


@needs_native
def test_a_package_without_its_library_still_computes(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "_C.*", "_build.json")
    shutil.copytree(PACKAGE, tmp_path / "peft_ext", ignore=ignore)
    code = (
        "import torch; from peft_ext import ops\n"
        "x, w, a, b = torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)\n"
        "print(ops.lora_linear(x, w, None, a, b).tolist())"
    )
    result = run_python(code, folder=tmp_path, PEFT_EXT_REQUIRE_NATIVE="0")
    assert result.stdout.strip() == "[[3.0, 3.0]]"
    assert result.stderr.count("without its native extension") == 1


@needs_native
def test_build_info_agrees_with_the_package():
    build = _loader.describe()["build"]
    assert build["version"] == peft_ext.__version__
    assert Version(build["torch"]).release == Version(torch.__version__).release
    assert build["cpp_standard"] >= 202002
    assert build["openmp"] is True
    assert build["isa_in_use"] in build["isa_built"]


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_instruction_set_can_be_lowered(capability, tmp_path):
    if capability not in _loader.describe()["build"]["isa_built"]:
        pytest.skip(f"{capability} is not a set of this architecture")
    code = "from peft_ext._loader import describe; print(describe()['build']['isa_in_use'])"
    result = run_python(code, folder=PACKAGE.parent, ATEN_CPU_CAPABILITY=capability)
    assert result.stdout.strip() == capability


@needs_native
def test_the_installed_package_requires_the_minor_version_it_was_built_against():
    try:
        requirements = [Requirement(line) for line in requires("peft-ext")]
    except PackageNotFoundError:
        pytest.skip("peft-ext runs from its source tree")
    (specifier,) = [requirement.specifier for requirement in requirements if requirement.name == "torch"]
    built_for = Version(json.loads((PACKAGE / "_build.json").read_text())["torch"])
    assert Version(built_for.public) in specifier
    assert f"{built_for.major}.{built_for.minor}.99" in specifier
    assert f"{built_for.major}.{built_for.minor + 1}.0" not in specifier


def test_importing_peft_ext_imports_none_of_the_training_libraries():
    code = "import sys, peft_ext; print([m for m in ('transformers', 'accelerate', 'matplotlib') if m in sys.modules])"
    result = run_python(code, folder=PACKAGE.parent)
    assert result.stdout.strip() == "[]"
