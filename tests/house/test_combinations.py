"""The features of a call together, on each backend, against dense attention in float64; and the table of it."""

import os
import platform
from itertools import combinations as pairs
from pathlib import Path

import pytest
import torch
from support.combinations import FEATURES, PAGE, PARTS, bases, completed, covering_calls, possible, read, table, write
from support.inputs import DEVICE, as_variant, make_qkv
from support.oracle import corrected_attention
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import BlockMap, PrefillConfig, Sequences, explain_backend, prefill_attention, search_blocks

EVERYTHING = bool(os.environ.get("FLEXPREFILL_COMBINATIONS"))
IN_CI = 1  # calls on the CPU, which takes seconds to compile each
BATCH, LENGTH = 2, 433


def arguments_of(features, length=LENGTH):
    """The tensors and the arguments of a call with so many keys."""
    features = set(features)
    dtype = next(getattr(torch, name) for name in ("float32", "float16", "bfloat16") if name in features)
    dims = next(name for name in FEATURES if name in features and name.startswith("D "))
    head_dim, _, value_dim = dims.removeprefix("D ").partition(", Dv ")
    q_len = length * 2 // 3 if "queries at an offset" in features else length
    query, key, value = make_qkv(
        q_len, length, batch=BATCH, heads=4, kv_heads=2, head_dim=int(head_dim), dtype=dtype, device=DEVICE
    )
    value = value[..., : int(value_dim or head_dim)].contiguous()
    block_size = 64 if "block 64" in features else 128
    config = PrefillConfig(
        alpha=0.7,
        block_size=block_size,
        sink_blocks=1,
        window_blocks=1,
        last_full_blocks=0,
        dense_below=0,
        min_blocks=2 if "min_blocks" in features else 0,
        mask_heads="kv" if "mask_heads kv" in features else "query",
        score_rows="visible" if "score_rows visible" in features else "whole",
        scorer=next((name for name in ("xattention", "exact") if name in features), "flashprefill"),
        mean_correction="mean_correction" in features,
    )
    chosen = {}
    lengths = torch.tensor([length * 2 // 3, length - 3], device=DEVICE)
    for name in features & {"right padding", "left padding"}:
        chosen["sequences"] = Sequences.from_lengths(lengths, length, padding=name.partition(" ")[0])
    if "packed" in features:
        bounds = torch.tensor([0, length // 3, length * 3 // 5, length - 1], device=DEVICE)
        chosen["sequences"] = Sequences.from_cu_seqlens(bounds, length)
    more = {"sliding_window": 170, "soft_cap": 3.0}
    more["alibi_slopes"] = torch.tensor([0.1, 0.01, 0.001, 0.0], device=DEVICE)
    more["sinks"] = torch.tensor([0.5, -2.0, 3.0, 0.0], device=DEVICE)
    chosen.update({name: term for name, term in more.items() if name in features})
    attention = {"sinks": chosen.pop("sinks")} if "sinks" in features else {}
    if "score_mod" in features:
        attention["score_mod"] = lambda score, b, h, q, k: score + (k - q) / 64
    if "mask_mod" in features:
        attention["mask_mod"] = lambda b, h, q, k: (k & 7) != 5
    if "BlockMask" in features:
        sizes = {"q_len": q_len, "kv_len": length, "block_size": block_size, "device": DEVICE}
        attention["mask_mod"] = BlockMap.causal(BATCH, 1, **sizes).with_mask(lambda b, h, q, k: k >= 20 * b)
    if "log-sum-exp" in features:
        attention["return_aux"] = AuxRequest(lse=True)
    return (query, key, value), config, chosen, attention


def dense_attention(tensors, block_map, chosen, attention, dtype):
    """Output and log-sum-exps under the map's boolean mask and the score function, computed in ``dtype``."""
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    q_len, kv_len, size = query.shape[2], key.shape[2], block_map.block_size
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[3] ** -0.5
    b, h, q, k = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in scores.shape), indexing="ij")
    position = q + kv_len - q_len
    allowed = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]
    allowed = allowed & (k <= position)
    if "sequences" in chosen:
        starts, ends = (part.expand(BATCH, -1) for part in (chosen["sequences"].starts, chosen["sequences"].ends))
        allowed &= (starts[b, position] <= k) & (k < ends[b, position])
    if "sliding_window" in chosen:
        allowed &= position - k < chosen["sliding_window"]
    if "mask_mod" in attention:
        mask = attention["mask_mod"]
        allowed &= (mask if callable(mask) else mask.mask_mod)(b, h, q, k)
    if "soft_cap" in chosen:
        scores = chosen["soft_cap"] * torch.tanh(scores / chosen["soft_cap"])
    if "alibi_slopes" in chosen:
        scores = scores - (chosen["alibi_slopes"][h] * (position - k)).to(dtype)
    if "score_mod" in attention:
        scores = attention["score_mod"](scores, b, h, q, k).to(dtype)
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1), scores.double().logsumexp(-1)


def check(features, backend):
    """Raises unless the call's output is right."""
    tensors, config, chosen, attention = arguments_of(features)
    query, key, value = tensors
    dtype = query.dtype
    block_map = search_blocks(query, key, config, **as_variant(**chosen))
    kept = block_map.counts().sum() / BlockMap.causal(*block_map.shape[:2], **sizes_of(block_map)).counts().sum()
    exact, lse = dense_attention(tensors, block_map, chosen, attention, torch.float64)
    theirs = dense_attention(tensors, block_map, chosen, attention, dtype)[0].double()
    allowed = 2 * max(((theirs - exact).norm() / exact.norm()).item(), 1e-6)
    if config.mean_correction:
        exact, lse = (part.to(DEVICE) for part in corrected_attention(query, key, value, block_map))
        allowed *= 1.5  # the merge rounds the output once more
    if "sinks" in attention:
        exact = exact * torch.sigmoid(lse - attention["sinks"].double()[:, None])[..., None]
        allowed *= 1.5  # and so does the sinks' part
    if dtype == torch.float32 and DEVICE == "cuda":
        allowed = 2e-3  # its products may be tf32
    result = prefill_attention(query, key, value, config, **as_variant(**chosen, **attention), backend=backend)
    if "return_aux" in attention:
        result, aux = result
        finite = lse.isfinite()
        assert torch.equal(aux.lse.isfinite(), finite) and (aux.lse[finite] - lse[finite]).abs().max() <= 2e-2
    assert result.dtype == dtype and result.isfinite().all()
    assert kept < 1 and ((result.double() - exact).norm() / exact.norm()).item() <= allowed


def sizes_of(block_map):
    return {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": block_map.block_size}


def refused_because(features, backend):
    """What is said to features that make a whole call; None if it is taken."""
    tensors, config, chosen, attention = arguments_of(features, 20)
    try:
        explain_backend(*tensors, config, **as_variant(**chosen, **attention), backend=backend)
        # by the reference: a kernel would be compiled for each of hundreds of calls
        search_blocks(*tensors[:2], config, **as_variant(**chosen), implementation="reference")
    except (TypeError, ValueError) as error:
        return str(error).replace("|", "\\|")
    return None


def refusals(backend):
    """What completes a call that is taken, and each feature and pair of features that raises, and what it says."""
    base = next(base for base in bases() if refused_because(base, backend) is None)
    found = {}
    for count in (1, 2):
        for features in pairs(FEATURES, count):
            single = count == 1 or possible(features)
            if not single or any((name,) in found for name in features):
                continue
            if (message := refused_because(completed(features, base), backend)) is not None:
                found[features] = message
    return base, found


def show(backend, name, part):
    """Runs a part of all calls, and keeps what each shows, as soon as it does, where it is asked for."""
    base, refused = refusals(name)
    device = platform.machine() if DEVICE == "cpu" else torch.cuda.get_device_name()
    result = {"where": f"{device}, torch {torch.__version__}", "calls": [], "failed": {}}
    result["refused"] = {" + ".join(features): message for features, message in refused.items()}
    for call in covering_calls(set(refused), base)[part::PARTS]:
        try:
            check(call, name)
            result["calls"].append(call)
        except Exception as error:  # whatever a compiler comes up with is written down
            if not EVERYTHING:
                raise
            result["failed"][" + ".join(call)] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if EVERYTHING:
            write(Path(os.environ["FLEXPREFILL_COMBINATIONS"], f"{backend}-{part}.json"), result)
    assert not result["failed"]


parts = pytest.mark.parametrize("part", range(PARTS))


@parts
@pytest.mark.skipif(DEVICE == "cuda" or not EVERYTHING, reason="takes minutes: set FLEXPREFILL_COMBINATIONS")
def test_all_combinations_on_the_cpu(part):
    show("cpu", "auto", part)


@parts
@pytest.mark.gpu
def test_all_combinations_by_triton(part):
    show("triton", "triton", part)


@parts
@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_all_combinations_by_flash(part):
    show("flash", "flash", part)


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's column")
def test_the_cpus_column_is_what_this_library_does():
    kept = read("cpu")
    base, refused = refusals("auto")
    assert kept["refused"] == {" + ".join(features): message for features, message in refused.items()}
    calls = covering_calls(set(refused), base)
    assert sorted(tuple(call) for call in kept["calls"]) == sorted(calls) and not kept["failed"]
    # those that combine most; test_all_combinations_on_the_cpu runs the rest
    for call in sorted(calls, key=len)[-IN_CI:]:
        check(call, "auto")


def test_the_table_is_what_the_runs_showed():
    assert PAGE.read_text() == table()
