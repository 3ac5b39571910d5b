"""Each Python block of README.md and docs/ runs alone, as pasted, and prints what the page shows.

Two remarks in a block's first line change that. ``# downloads MODEL``: a small model of random weights takes the
model's place, and what it prints is not looked at. ``# needs a GPU``: the block is compiled and not run.
"""

import contextlib
import io
import operator
import sys
import types

import pytest
from support.pages import PAGES, blocks_of, local_model, local_tokenizer

BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.language == "python"]
PLACE = operator.attrgetter("place")


@pytest.fixture
def instead_of_downloads(monkeypatch):
    """Lets ``from_pretrained`` give a local model for the one name that a block may download."""
    transformers = pytest.importorskip("transformers")

    def allow(model):
        def checked(name):
            assert name == model, f"the block loads {name!r}; its first line must be '# downloads {name}'"
            return name

        def load_model(name, **options):
            return local_model(checked(name), **options)

        def load_tokenizer(name, **_):
            return checked(name) and local_tokenizer()

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_model)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_tokenizer)

    yield allow
    from flexprefill.integrations import transformers as integration

    for name in list(integration._registered):
        integration.unregister(name)


def test_there_are_blocks():
    assert len(BLOCKS) >= 10 and any(block.prints for block in BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.needs_a_gpu], ids=PLACE)
def test_a_block_runs_alone(block, instead_of_downloads, tmp_path, monkeypatch):
    instead_of_downloads(block.downloads)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "block.py"
    file.write_text(block.code, "utf-8")
    main = types.ModuleType("__main__")  # where torch.compile looks for the block's own names
    monkeypatch.setitem(sys.modules, "__main__", main)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, file, "exec"), main.__dict__)
    if block.prints is not None and not block.downloads:
        assert printed.getvalue().strip() == block.prints.strip()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.needs_a_gpu], ids=PLACE)
def test_a_block_for_a_gpu_is_python(block):
    compile(block.code, block.place, "exec")
