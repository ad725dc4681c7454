"""Checks of ``distillbench doctor``: Python, packages and their versions, torch beside torchvision."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from distillbench.cli.doctor_findings import Finding, Installation, Level
from distillbench.errors import counted
from distillbench.registry import FILE
from distillbench.system.subprocesses import in_words

MODULES = {  # by distribution, where the module has another name
    "clean-fid": "cleanfid",
    "hydra-core": "hydra",
    "nvidia-ml-py": "pynvml",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
COMPILED = ("numpy", "pandas", "pillow", "pyarrow", "safetensors", "scipy", "torch", "torchvision")  # always imported


@dataclass(frozen=True)
class Package:
    """A required distribution: its installed version ("": not installed), and why it cannot be imported."""

    requirement: Requirement
    needed_by: str
    version: str
    error: str = ""
    optional: bool = False

    def judged(self) -> Finding | None:
        """What is wrong with it; None if nothing is."""
        level: Level = "warning" if self.optional else "wrong"
        name, install = self.requirement.name, f'pip install "{_specifier(self.requirement)}"'
        if not self.version:
            return None if self.optional else Finding(level, f"{self.needed_by} needs {name}: not installed", install)
        try:
            fits = self.requirement.specifier.contains(self.version, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            line = f"{self.needed_by} needs {_specifier(self.requirement)}, {self.version} is installed"
            return Finding(level, line, install)
        if self.error:
            return Finding(
                level, f"{name} {self.version} cannot be imported: {self.error}", f"{install} --force-reinstall"
            )
        return None


def _specifier(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def judge_python(version: str, wanted: str | None) -> Finding:
    """Whether `version` is within `wanted`, the range that the distribution's metadata declares."""
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        line = f"Python {version}, distillbench needs {wanted}"
        return Finding("wrong", line, "create an environment with that Python")
    return Finding("ok", f"Python {version}")


def check_packages(installation: Installation) -> Iterator[Finding]:
    """Versions of Python and of the packages that distillbench and the plugins' distributions require."""
    try:
        wanted = importlib.metadata.metadata("distillbench")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wrong", "distillbench is imported but not installed", "pip install .")
        wanted = None
    yield judge_python(platform.python_version(), wanted)
    distributions = {"distillbench", *(plugin.distribution for plugin in installation.registry.plugins)} - {FILE, "?"}
    with installation.progress.step("importing packages"):
        packages = [package for name in sorted(distributions) for package in needed(name, installation.thorough)]
    bad = [finding for package in packages if (finding := package.judged()) is not None]
    yield from dict.fromkeys(bad)
    installed = {package.requirement.name for package in packages if package.version}
    if not bad:
        yield Finding("ok", f"{counted(len(installed), 'package')}, all in the declared versions")


def needed(distribution: str, thorough: bool) -> list[Package]:
    """The requirements that an installed distribution declares, with the versions that are installed."""
    try:
        declared = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in declared:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not optional and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        always = requirement.name.lower() in COMPILED
        error = _import_error(requirement.name, thorough or always) if version and not optional else ""
        found.append(Package(requirement, distribution, version, error, optional))
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _import_error(distribution: str, run: bool) -> str:
    """Why its module cannot be imported, "" if it can; without `run` only whether the module exists."""
    module = MODULES.get(distribution.lower(), distribution.replace("-", "_"))
    try:
        if run:
            importlib.import_module(module)
        elif importlib.util.find_spec(module) is None and distribution.lower() in MODULES:
            return f"no module {module!r}"
    except (Exception, SystemExit) as error:  # an import can raise anything
        return in_words(error) if run and not _wrong_guess(error, module) else ""
    return ""


def _wrong_guess(error: BaseException, module: str) -> bool:
    """Whether `module` was guessed from the distribution's name and does not exist."""
    return isinstance(error, ModuleNotFoundError) and error.name == module and module not in MODULES.values()


def judge_torchvision(
    torch_version: str, torchvision_version: str, wanted: str, cudas: Sequence[str | None]
) -> Finding:
    """Whether both fit: `wanted` is torchvision's requirement of torch, `cudas` the CUDA versions of the two builds."""
    both = f"torch {torch_version}, torchvision {torchvision_version}"
    reinstall = "install both in one command, from one index: pip install torch torchvision"
    if not SpecifierSet(wanted).contains(torch_version, prereleases=True):
        return Finding("wrong", f"{both}, which needs torch{wanted}", reinstall)
    if cudas[0] != cudas[1]:
        builds = " and ".join(f"CUDA {cuda}" if cuda else "CPUs" for cuda in cudas)
        return Finding("warning", f"{both}: built for {builds}", reinstall)
    return Finding("ok", both)


def check_torch(installation: Installation) -> Iterator[Finding]:
    """torch and torchvision fit, and an operator that torchvision compiled (nms) works."""
    import torch
    import torchvision
    from torchvision.ops import nms

    declared = map(Requirement, importlib.metadata.requires("torchvision") or [])
    wanted = next((str(r.specifier) for r in declared if r.name == "torch"), "")
    cudas = torch.version.cuda, cuda_version(torch.ops.torchvision._cuda_version())
    yield judge_torchvision(torch.__version__, torchvision.__version__, wanted, cudas)
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        line = f"torchvision's nms keeps {kept} of three boxes instead of [0, 2]"
        yield Finding("wrong", line, "reinstall torchvision")


def cuda_version(number: int) -> str | None:
    """CUDA's version number as torch writes it: 12060 is "12.6". None for a build without CUDA."""
    return f"{number // 1000}.{number % 1000 // 10}" if number > 0 else None
