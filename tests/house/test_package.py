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
from flexprefill.search.scorers import OWN_SCORERS

ROOT = Path(__file__).parents[2]
BUILD = "import os; from setuptools import build_meta as b; os.mkdir('out'); b.build_sdist('out'); b.build_wheel('out')"


def test_every_public_name_is_there_and_documented():
    for name in flexprefill.__all__:
        assert getattr(flexprefill, name).__doc__, name
    assert flexprefill.__version__ == importlib.metadata.version("flexprefill")


def run_fresh(code, *, check=True, **environment):
    """What a new process prints that runs this code, with none of this process's settings for Triton."""
    inherited = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    process = [sys.executable, "-c", code]
    result = subprocess.run(process, capture_output=True, text=True, check=check, env=inherited | environment)
    return result.stdout.strip() if check else result.stderr


def test_importing_the_library_stays_light():
    heavy = "('triton', 'transformers', 'matplotlib', 'torch._inductor')"
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    assert run_fresh(f"import sys, flexprefill; flexprefill.search_blocks; {loaded}") == "[]"
    assert run_fresh("import sys, flexprefill; print('torch' in sys.modules, flexprefill.__version__)") == (
        f"False {flexprefill.__version__}"
    )


@pytest.mark.slow
def test_public_names_are_loaded_when_one_is_asked_for():
    code = "import flexprefill, pickle; print(pickle.loads(pickle.dumps(flexprefill.PrefillConfig(alpha=0.5))).alpha)"
    assert run_fresh(code) == "0.5"
    code = "from flexprefill import *; print(search_blocks.__module__, BlockMap.__module__)"
    assert run_fresh(code) == "flexprefill.search.blocks flexprefill.blockmap.map"
    assert run_fresh("import flexprefill; print(dir(flexprefill) == sorted(flexprefill.__all__))") == "True"
    replaced = "import flexprefill as f; f.search_blocks = 1; hasattr(f, 'nothing'); dir(f); print(f.search_blocks)"
    assert run_fresh(replaced) == "1"
    assert run_fresh("import flexprefill; print(flexprefill.config.PUBLISHED['Qwen2.5-7B'])") == "{'alpha': 0.08}"
    with pytest.raises(AttributeError, match="module 'flexprefill' has no attribute 'search_block'"):
        _ = flexprefill.search_block
    with pytest.raises(ImportError, match="cannot import name 'search_block'"):
        exec("from flexprefill import search_block")


def test_settings_are_checked_without_the_search():
    code = "from flexprefill.config import PrefillConfig, SCORERS; PrefillConfig(scorer='exact'); print(list(SCORERS))"
    assert run_fresh(code) == str(list(OWN_SCORERS))


def test_what_keeps_the_library_from_loading_is_said(tmp_path):
    (tmp_path / "torch.py").write_text("")
    said = run_fresh("from flexprefill import search_blocks", check=False, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "torch" in said.splitlines()[-1] and "cannot import name 'search_blocks'" not in said


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
    assert {f"flexprefill/evaluation/smollm2_heads.{kind}" for kind in ("safetensors", "NOTICE")} <= others
