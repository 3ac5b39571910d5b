"""What a caller's torch.compile takes as constants, without a look at how it comes about.

Import it only while something is compiled: it loads torch._dynamo.
"""

from __future__ import annotations

from typing import Any

import torch

from flexprefill.backends import BackendChoice, Request, choose_once


@torch.compiler.assume_constant_result
def choose(backend: str, *facts: Any) -> BackendChoice:
    """choose_backend of the facts of a Request, flat because only plain constants get here."""
    return choose_once(backend, Request(*facts))
