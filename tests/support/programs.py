"""Programs of this folder that need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def lines_of(program, tmp_path, *arguments, interpret):
    """What a program prints that makes code for a GPU without one. Triton's interpreter runs it, or it is compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = sys.executable, Path(__file__).parent / program, *arguments
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.splitlines()
