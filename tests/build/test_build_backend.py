import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# What pip does to the interpreter that runs a backend: the installing environment's site-packages go, an overlay of
# the build requirements comes.
ISOLATION = """
import site, sys
site_packages = site.getsitepackages()
sys.path[:] = [path for path in sys.path if path not in site_packages] + [{overlay!r}]
"""
NO_TORCH_ANYWHERE = "site.getsitepackages = lambda: []\n"
ASK = """
import json, build_backend, importlib.util
found = importlib.util.find_spec("torch")
print(json.dumps([build_backend.get_requires_for_build_wheel(), found and found.origin]))
"""


@pytest.fixture
def ask_backend(tmp_path):
    """Asks the backend, in an isolated build environment, what it wants installed and which torch it sees."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (overlay / name).symlink_to(Path(find_spec(name).origin).parent)

    def ask(sitecustomize):
        (tmp_path / "sitecustomize.py").write_text(sitecustomize.format(overlay=str(overlay)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CSRC)]), "PYTHONNOUSERSITE": "1"}
        output = subprocess.check_output([sys.executable, "-c", ASK], env=environment, cwd=tmp_path, text=True)
        return json.loads(output)

    return ask


def test_the_torch_of_the_installing_environment_is_found(ask_backend):
    required, origin = ask_backend(ISOLATION)
    assert required == []
    assert origin == find_spec("torch").origin


def test_torch_is_asked_for_only_where_there_is_none(ask_backend):
    required, origin = ask_backend(ISOLATION + NO_TORCH_ANYWHERE)
    assert required == ["torch==2.13.0"]
    assert origin is None
