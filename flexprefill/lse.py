"""FlashAttention-4's log-sum-exp through FlexAttention, checked against plain PyTorch before it is passed on."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill.blockmap import BlockMap
from flexprefill.compiled import flex_over
from flexprefill.errors import FlexPrefillError
from flexprefill.flex import lists_of

LENGTH, HEAD_DIM = 128, 64  # of the known input
CLOSE = 0.01  # relative; the fault is 30 %


@functools.cache
def flash_lse_factor(device: torch.device) -> float:
    """What FlashAttention-4's log-sum-exp has to be multiplied with on a device.

    torch 2.11 multiplies it by ln 2 once too often (pytorch issue 181645). Found out once, at the first use, from a
    small known input; that waits for the device.

    Raises:
        FlexPrefillError: it is wrong in another way.
    """
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, LENGTH, HEAD_DIM, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    block_map = BlockMap.causal(1, 1, q_len=LENGTH, kv_len=LENGTH, block_size=LENGTH, device=device)
    scale = HEAD_DIM**-0.5
    options = (("BACKEND", "FLASH"),)
    aux = AuxRequest(lse=True)
    lists = lists_of(block_map, None, None)
    settings = {"block_size": LENGTH, "scale": scale, "kernel_options": options, "return_aux": aux}
    _, found = flex_over(query, key, key, lists, None, **settings)

    products = scale * query.float() @ key.float().transpose(2, 3)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    return factor_to(found.lse, products.masked_fill(hidden, -math.inf).logsumexp(-1))


def factor_to(found: Tensor, right: Tensor) -> float:
    """1 if the two agree, 1 / ln 2 if that makes them.

    Raises:
        FlexPrefillError: neither does.
    """
    for factor in (1.0, 1 / math.log(2)):
        if (factor * found - right).norm() <= CLOSE * right.norm():  # false for NaN as well
            return factor
    last, wanted = found.flatten()[-1].item(), right.flatten()[-1].item()
    raise FlexPrefillError(
        "FlashAttention-4 returns a wrong log-sum-exp through this torch, and not by the factor ln 2 that is known: "
        f"{last:.4f} instead of {wanted:.4f}; backend='triton' gives a right one"
    )
