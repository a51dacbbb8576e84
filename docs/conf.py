"""Sphinx's settings: ``sphinx-build -W --keep-going docs build/docs``."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from typer.testing import CliRunner

import peft_ext
from peft_ext.cli import app as cli

project = "peft_ext"
author = "the peft_ext contributors"
copyright = author
version = release = peft_ext.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"peft_ext {release}"
root_doc = "index"
exclude_patterns = ["conf.py"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "extra_repr"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
add_module_names = False


class CommandHelp(Directive):
    """``.. command-help::``: what ``peft-ext COMMAND --help`` prints, for every command."""

    def run(self) -> list[nodes.Node]:
        names = [str(command.name) for command in cli.registered_commands]
        return [node for name in names for node in (nodes.rubric(text=f"peft-ext {name}"), self.help_of(name))]

    def help_of(self, name: str) -> nodes.Node:
        shell = {"COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
        result = CliRunner().invoke(cli, [name, "--help"], prog_name="peft-ext", env=shell)
        if result.exit_code:
            raise self.error(f"peft-ext {name} --help failed: {result.output}")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        return nodes.literal_block(text, text, language="text")


def setup(app: Any) -> None:
    """Adds the directive."""
    app.add_directive("command-help", CommandHelp)
