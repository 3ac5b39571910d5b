import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flexprefill

ROOT = Path(__file__).parents[2]
BUILD = "import os; from setuptools import build_meta as b; os.mkdir('out'); b.build_sdist('out'); b.build_wheel('out')"


def test_every_public_name_is_there_and_documented():
    for name in flexprefill.__all__:
        assert getattr(flexprefill, name).__doc__, name
    assert flexprefill.__version__ == importlib.metadata.version("flexprefill")


def test_importing_the_library_stays_light():
    heavy = "('triton', 'transformers', 'matplotlib', 'torch._inductor')"
    code = f"import sys, flexprefill; print([name for name in {heavy} if name in sys.modules])"
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


def test_the_index_is_told_what_the_package_is():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["authors"] == [{"name": "flexprefill contributors"}] and project["license"] == "Apache-2.0"
    told = set(project["classifiers"])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= told
    assert {
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Environment :: GPU :: NVIDIA CUDA",
    } <= told
    assert not any(name.startswith("License ::") for name in told)  # an index refuses it beside `license`


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The names in the source archive, without its folder's, and in the wheel, built of a copy of this tree."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    copy = tmp_path_factory.mktemp("build") / "tree"
    left = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "flexprefill-*", "needle-model")
    shutil.copytree(ROOT, copy, ignore=left)
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    (source,), (wheel,) = ((copy / "out").glob(ending) for ending in ("*.tar.gz", "*.whl"))
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        return in_source, set(archive.namelist())


def files_in(*folders):
    """The files below these folders of the tree, by their names in it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix != ".pyc"}


def test_the_source_archive_has_what_its_tests_need(archives):
    in_source, _ = archives
    assert files_in("flexprefill", "tests", "examples", "docs") <= in_source
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "constraints.txt"} <= in_source
    assert not any(re.search(r"\.pyc$|^\.(ci|git)", name) for name in in_source)


def test_the_wheel_has_the_package_alone(archives):
    _, in_wheel = archives
    others = {name for name in in_wheel if ".dist-info/" not in name}
    assert others == files_in("flexprefill")
    assert {"flexprefill/py.typed", "flexprefill/__main__.py", "flexprefill/viewer/page.html"} <= others
