"""GPUs that are not there, as far as the choice of a backend looks at them."""

import sys
import types

import torch

from flexprefill.attention.backends import Request
from flexprefill.runtime.state import forget

PUBLISHED = Request(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    head_dim=128,
    value_dim=128,
    block_size=128,
    at_offset=False,
    mods="",
    positive_scale=True,
    lse=False,
    max_scores=False,
    aligned=True,
    whole_tiles=False,
    small=True,
    compiling=False,
)


def forget_choices():
    forget(
        "what was decided of calls",
        "choices of a backend",
        "choices of a dense kernel",
        "whether flash-attn-4 is there",
    )


def pretend(monkeypatch, *, capability=(9, 0), flash=True):
    """A GPU of a compute capability, with flash-attn-4 or without."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for name in ("flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = types.SimpleNamespace(name=name), []
        monkeypatch.setitem(sys.modules, name, module if flash else None)
    forget_choices()
