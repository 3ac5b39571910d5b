import importlib.metadata
import os
import subprocess
import sys

import flexprefill


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
