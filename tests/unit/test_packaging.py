"""What the wheel carries, and what the set-up files promise."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("rayrlhf", "actors", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel that setuptools builds from a copy of the tree, stray files planted in it."""
    tree = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree / name)
    for stray in (
        "tests/__init__.py",
        "benchmarks/__init__.py",
        "runs/one/__init__.py",
        "rayrlhf/assets/__pycache__/m.cpython-311.pyc",
    ):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).touch()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    result = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(tree / "out" / result.stdout.split()[-1]) as wheel:
        return set(wheel.namelist())


def test_wheel_holds_the_three_rooms_and_nothing_else(wheel_files: set[str]) -> None:
    own = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert own <= wheel_files
    version = PROJECT["project"]["version"]
    assert {name.split("/")[0] for name in wheel_files} == {*ROOMS, f"rayrlhf-{version}.dist-info"}
    assert not [name for name in wheel_files if "__pycache__" in name]


def test_wheel_holds_every_asset(wheel_files: set[str]) -> None:
    assets = {
        path.relative_to(ROOT).as_posix()
        for folder in ("assets", "labelling/web", "reports/page")
        for path in (ROOT / "rayrlhf" / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in assets} >= {
        ".parquet",
        ".safetensors",
        ".json",
        ".py",
        ".html",
        ".js",
        ".css",
    }
    assert assets <= wheel_files
    assert "rayrlhf/py.typed" in wheel_files


def test_wheel_carries_the_licence(wheel_files: set[str]) -> None:
    assert {Path(name).name for name in wheel_files if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_hold_every_declared_dependency_within_its_range() -> None:
    held = constraints()
    project = PROJECT["project"]
    declared = [
        *project["dependencies"],
        *project["optional-dependencies"]["cpu"],
        *PROJECT["dependency-groups"]["dev"],
    ]
    for requirement in map(Requirement, declared):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in held, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(Version(held[name]), prereleases=True), (
            f"{name}=={held[name]} is outside {requirement}"
        )


def test_constraints_are_exact_and_name_no_place() -> None:
    held = constraints()
    assert held["torch"].endswith("+cpu")
    assert not {"torchvision", "torchaudio", "torchcodec", "rayrlhf"} & held.keys()
    for name, version in held.items():
        assert re.fullmatch(r"[a-z0-9-]+", name), name
        assert str(Version(version)) == version, f"{name}=={version}"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_environment_is_free_of_cuda_media_builds(name: str) -> None:
    """Their wheels on PyPI break transformers beside a CPU torch."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    if torch.version.cuda is not None:
        pytest.skip("a CUDA torch goes with them")
    with pytest.raises(PackageNotFoundError):
        version(name)


def rules() -> dict[str, tuple[list[str], str]]:
    """By target of the Makefile: what it needs, and its recipe."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^([\w$().-]+):(?!=)([^\n#]*)[^\n]*\n((?:\t[^\n]*\n)*)", text, re.MULTILINE)
    return {target: (needs.split(), recipe) for target, needs, recipe in found}


def test_who_runs_the_product_installs_nothing_of_the_tests() -> None:
    makefile = rules()
    for target in ("setup", "quickstart"):
        assert makefile[target][0] == ["$(STAMP)"]
    assert '-e ".[cpu]"' in makefile["$(STAMP)"][1] and "--group" not in makefile["$(STAMP)"][1]


def test_who_tests_installs_every_group() -> None:
    makefile = rules()
    needs, recipe = makefile["$(DEV_STAMP)"]
    assert needs == ["$(STAMP)"] and "-c constraints.txt" in recipe
    assert set(re.findall(r"--group (\w+)", recipe)) == set(PROJECT["dependency-groups"])
    for target, (needs, recipe) in makefile.items():
        if re.search(r"pytest|ruff|mypy|mkdocs|benchmarks", recipe) and target != "clean":
            assert "$(DEV_STAMP)" in needs or "$(DEV_STAMP)" in makefile[needs[0]][0], target


def test_the_table_of_dependencies_is_that_of_the_project() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = text[text.index("## What each dependency is for") : text.index("## What was tried")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [re.split(r"\[", name)[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    extras = PROJECT["project"]["optional-dependencies"]
    declared = [*PROJECT["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    packages = {Requirement(each).name for each in declared}
    assert {*named} - ({*extras} - packages) == packages
