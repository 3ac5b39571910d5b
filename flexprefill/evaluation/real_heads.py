"""Six attention heads of a real model on real text, for the demo: what SmolLM2-135M-Instruct reads in Python's help.

The queries, keys and values are kept beside this file as int8 with a scale for each row. smollm2_heads.NOTICE says
where they come from; examples/capture_demo_heads.py made them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PATH = Path(__file__).with_name("smollm2_heads.safetensors")
MODEL = "SmolLM2-135M-Instruct"
TEXT = "Python's help on execmodel, identifiers and naming, of which the last repeats a part of the first"
# layer and head in the model; two each share a key head
REAL_HEADS = {
    "12.0 sink": "the first token for one half, nearby text for the other",
    "12.1 local": "nearby text",
    "18.7 lookup": "the first token; where the text repeats itself, the earlier place",
    "18.8 lookup": "the first token; where the text repeats itself, the earlier place",
    "4.0 broad": "single tokens anywhere before",
    "4.2 broad": "single tokens anywhere before",
}
REAL_LENGTH = 4864  # tokens


def load_heads(length: int, device: torch.device | str, *, path: str | Path = PATH) -> tuple[Tensor, Tensor, Tensor]:
    """The first tokens' query [1, 6, length, 64], and key and value [1, 3, length, 64].

    They are float32 on the CPU and bfloat16 on CUDA.

    Args:
        length: tokens, at most REAL_LENGTH.
        path: a file of examples/capture_demo_heads.py.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    with safe_open(path, "pt") as file:

        def read(name: str) -> Tensor:
            stored, scale = (file.get_slice(part)[:, :length] for part in (name, f"{name}_scale"))
            return (stored.float() * scale.float())[None].to(device, dtype)

        return read("query"), read("key"), read("value")
