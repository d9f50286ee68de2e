"""Build the library `regtome` of models/ and analysis/ (as regtome.analysis), with a `torchrun` for older Pythons.

Training runs from a checkout, as DeiT's does, where the folders are imported as `models` and `analysis`. Names such as
`models` or `utils` would hide other people's modules in site-packages: nothing is installed under them. Everything
static is in pyproject.toml.
"""

import ast
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Instruments whose command lines need the training program, which is not installed
CHECKOUT_ONLY = {"command"}
LAUNCHER = "regtome_torchrun.py"
# Up to Python 3.12.6 argparse refuses main.py's --r behind torchrun (see run/torchrun.py). pip installs a package after
# those that it depends on, so that this `torchrun` takes the place of torch's. Later Pythons keep torch's own.
SCRIPTS = ["torchrun = regtome_torchrun:main"] if sys.version_info < (3, 12, 7) else []


def installed_source(source: str) -> str:
    """The source of a module of analysis/, which imports the core as `models`, as it is installed: as `regtome`.

    Only import statements are changed, found by the parser: not the word in a string, a comment or another name.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_core(node.module):
            line, column = lines[node.lineno - 1], node.col_offset
            lines[node.lineno - 1] = line[:column] + line[column:].replace("from models", "from regtome", 1)
        elif isinstance(node, ast.Import) and any(_is_core(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno}: write 'from models import ...', which an installed copy can replace")
    return "".join(lines)


def _is_core(module: str | None) -> bool:
    return str(module).partition(".")[0] == "models"


class BuildPackages(build_py):
    """Copies the packages under their installed names."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("regtome is not installed with -e: in a checkout use models/ itself, else pip install .")
        shutil.rmtree(self.build_lib, ignore_errors=True)  # a module that is deleted since would be installed, too
        super().run()
        if SCRIPTS:
            self.copy_file("run/torchrun.py", str(Path(self.build_lib, LAUNCHER)))

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "regtome.analysis" or m[1] not in CHECKOUT_ONLY]

    def build_module(self, module: str, module_file: str, package: str) -> object:
        built = super().build_module(module, module_file, package)
        if package == "regtome.analysis":
            target = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
            target.write_text(installed_source(target.read_text(encoding="utf-8")), encoding="utf-8")
        return built


if __name__ == "__main__":
    setup(
        packages=["regtome", *(f"regtome.{name}" for name in find_packages("models")), "regtome.analysis"],
        package_dir={"regtome": "models", "regtome.analysis": "analysis"},
        package_data={"regtome": ["py.typed"], "regtome.analysis": ["*.html"]},
        entry_points={"console_scripts": SCRIPTS},
        cmdclass={"build_py": BuildPackages},
    )
