"""The pages as a site: built as strictly as mkdocs can, with everything public in its reference."""

import re
import subprocess
import sys

import pytest
from support.pages import ROOT

import flexprefill
from flexprefill import evaluation, inspection, plotting
from flexprefill.cli import COMMANDS

REFERENCE = [(ROOT / "docs/reference" / name).read_text("utf-8") for name in ("api.md", "tools.md")]


@pytest.mark.parametrize("module", [flexprefill, evaluation, inspection, plotting], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    """A name that is listed and not there fails the build."""
    listed = set(re.findall(r"^::: flexprefill[\w.]*\.(\w+)$", "".join(REFERENCE), re.MULTILINE))
    assert set(module.__all__) - listed <= {"__version__"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_public_name_and_command(site):
    page = (site / "reference/api.html").read_text("utf-8")
    assert all(f'id="flexprefill.{name}"' in page for name in flexprefill.__all__ if name != "__version__")
    assert ":func:" not in page and ":class:" not in page
    page = (site / "reference/cli.html").read_text("utf-8")
    assert all(f'id="{name}"' in page for name in COMMANDS) and "--quick" in page


@pytest.mark.slow
def test_the_site_fetches_nothing(site):
    for page in site.rglob("*.html"):
        assert not re.search(r'(?:src=|<link [^>]*href=)"?https?:', page.read_text("utf-8")), page
