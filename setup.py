"""Extension modules; everything else about the package is in pyproject.toml.

A machine that cannot compile them still installs: one line says that the reference ops will run.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

EXTENSIONS: list[Extension] = []


class BuildExtensions(build_ext):
    def run(self) -> None:
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            self.extensions = []
            self.warn(f"no compiled ops, the reference ops will run: {error}")


setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtensions})
