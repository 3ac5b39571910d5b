import logging
from dataclasses import replace

import pytest
import torch
from support.inputs import make_qkv
from support.machines import PUBLISHED
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import (
    AttentionVariant,
    FlexPrefillError,
    PrefillConfig,
    Sequences,
    explain_backend,
    prefill_attention,
)
from flexprefill.attention import backends
from flexprefill.attention.backends import Request, choose_backend
from flexprefill.attention.call import Call
from flexprefill.variant.variant import PLAIN

MEASURED = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
WHOLE = {"IS_DIVISIBLE": True}
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}


def test_auto_takes_flash_where_it_can(machine):
    machine()
    choice = choose_backend("auto", PUBLISHED)
    assert (choice.name, choice.kernel_options, choice.passed_over) == ("flash", (("BACKEND", "FLASH"),), ())
    assert choose_backend("flash", PUBLISHED).name == "flash"
    for changes in ({"head_dim": 64, "value_dim": 64}, {"dtype": torch.float16}, {"lse": True}, {"at_offset": True}):
        assert choose_backend("auto", PUBLISHED._replace(**changes)).name == "flash", changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16, got torch.float32"),
        ({"block_size": 64}, "block_size=64"),
        ({"head_dim": 256, "value_dim": 256}, "D=256, Dv=256"),
        ({"head_dim": 80}, "D=80"),
        ({"value_dim": 192}, "Dv=192"),
        ({"positive_scale": False}, "positive scale"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"small": False}, r"2\*\*31 elements"),
        ({"max_scores": True}, "max_scores"),
        ({"lse": True, "compiling": True}, "log-sum-exp"),
    ],
)
def test_what_flash_cannot_do_goes_to_triton_and_raises_where_flash_is_named(machine, changes, message):
    machine()
    request = PUBLISHED._replace(**changes)
    choice = backends.choose_once("auto", request)
    assert choice.name == "triton"
    ((passed_over, why),) = choice.passed_over
    assert passed_over == "flash"
    with pytest.raises(FlexPrefillError, match=message) as raised:
        backends.choose_once("flash", request)
    assert why in str(raised.value)


def test_a_variants_masks_go_to_flash_and_other_mods_where_it_is_named(machine):
    machine()
    for mods, compiling, name in (
        ("masks", False, "flash"),
        ("masks", True, "triton"),
        ("cap", False, "flash"),
        ("cap", True, "triton"),
        ("scores", False, "triton"),
        ("own", False, "triton"),
    ):
        request = PUBLISHED._replace(mods=mods, compiling=compiling)
        choice = backends.choose_once("auto", request)
        assert choice.name == name, mods
        assert name == "flash" or "name it" in choice.passed_over[0][1]
        named = backends.choose_once("flash", request)
        assert (named.name, named.by_itself) == ("flash", (mods, compiling) == ("cap", False))


def test_a_call_says_what_its_mods_are():
    query, key, value = make_qkv(256, heads=2)
    window, capped = AttentionVariant(sliding_window=100), AttentionVariant(sliding_window=100, soft_cap=20.0)
    packed = AttentionVariant(sequences=Sequences.from_cu_seqlens(torch.tensor([0, 100, 256]), 256))

    def mods_of(variant=PLAIN, mask_mod=None, score_mod=None):
        return Call(
            query, key, value, PrefillConfig(), variant, None, mask_mod, score_mod, 1.0, True, "auto", None
        ).mods

    assert [mods_of(), mods_of(AttentionVariant(sinks=torch.zeros(2)))] == ["", ""]
    assert [mods_of(window), mods_of(packed)] == ["masks", "masks"]
    sloped, both = AttentionVariant(alibi_slopes=torch.ones(2)), replace(packed, soft_cap=20.0)
    assert [mods_of(capped), mods_of(sloped), mods_of(both)] == ["cap", "scores", "scores"]
    assert [mods_of(mask_mod=lambda b, h, i, j: j > 3), mods_of(window, score_mod=lambda s, *_: s)] == ["own", "own"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash_is_for_hopper(machine, capability):
    machine(capability=capability)
    assert choose_backend("auto", PUBLISHED).name == "triton"
    with pytest.raises(FlexPrefillError, match=f"9.0 alone, got {capability[0]}.{capability[1]}"):
        choose_backend("flash", PUBLISHED)


def test_flash_that_is_not_installed_or_does_not_load(machine, monkeypatch):
    machine(flash=False)
    assert choose_backend("auto", PUBLISHED).name == "triton"
    with pytest.raises(FlexPrefillError, match="needs the package flash-attn-4"):
        choose_backend("flash", PUBLISHED)
    machine()

    def broken(name):
        raise ImportError("no such symbol")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(FlexPrefillError, match="does not load: ImportError: no such symbol"):
        choose_backend("flash", PUBLISHED)
    assert choose_backend("auto", PUBLISHED).name == "triton"


@pytest.mark.parametrize(
    ("capability", "changes", "options"),
    [
        ((9, 0), {}, MEASURED | WHOLE),
        ((9, 0), {"dtype": torch.float16}, MEASURED | WHOLE),
        ((9, 0), {"dtype": torch.float32}, WHOLE),
        ((9, 0), {"head_dim": 64, "value_dim": 64}, WHOLE),
        ((9, 0), {"value_dim": 64}, WHOLE),
        ((8, 0), {}, WHOLE),
        ((9, 0), {"whole_tiles": False}, {}),
        ((9, 0), {"block_size": 64}, SMALL | WHOLE),
        ((9, 0), {"block_size": 64, "whole_tiles": False}, SMALL),
        ((9, 0), {"block_size": 64, "head_dim": 192}, SMALL | WHOLE | {"BLOCK_N": 32}),
        ((9, 0), {"block_size": 16, "head_dim": 192}, SMALL | WHOLE | {"BLOCK_M": 16, "BLOCK_N": 16}),
        ((9, 0), {"block_size": 64, "dtype": torch.float32}, SMALL | WHOLE | {"BLOCK_N": 32}),
        (
            (9, 0),
            {"block_size": 64, "dtype": torch.float32, "value_dim": 256},
            SMALL | WHOLE | {"BLOCK_M": 32, "BLOCK_N": 32},
        ),
    ],
)
def test_triton_gets_measured_options_or_the_defaults(machine, capability, changes, options):
    machine(capability=capability)
    choice = choose_backend("triton", PUBLISHED._replace(**{"whole_tiles": True, **changes}))
    assert dict(choice.kernel_options) == {"BACKEND": "TRITON"} | options and choice.reason == "named by the caller"


def test_the_request_sees_what_decides():
    query, key, value = make_qkv(64, 100, heads=4, kv_heads=2, head_dim=64, dtype=torch.float16)
    arguments = {"block_size": 128, "mods": "", "scale": -0.1, "aux": AuxRequest(lse=True)}
    request = Request.of(query, key, value[..., :32], **arguments)
    assert (request.head_dim, request.value_dim, request.dtype) == (64, 32, torch.float16)
    assert request.at_offset and request.lse and request.small and request.aligned
    assert not (request.positive_scale or request.max_scores or request.mods or request.compiling)
    odd = torch.zeros(1, 4, 64, 65, dtype=torch.float16)[..., :64]
    transposed = query.transpose(2, 3).contiguous().transpose(2, 3)
    for strange in (odd, transposed):
        assert not Request.of(strange, key, value, **arguments).aligned
    assert not request.whole_tiles
    for q_len, kv_len, whole in ((128, 256, True), (256, 256, True), (256, 300, False), (100, 256, False)):
        assert Request.of(*make_qkv(q_len, kv_len), **arguments).whole_tiles == whole
    vast = torch.empty(1, 32, 2**20, 128, device="meta")
    assert not Request.of(vast, vast, vast, **arguments).small


def test_explain_backend_and_the_log_say_what_runs(caplog):
    query, key, value = make_qkv(64, heads=2, head_dim=32)
    choice = explain_backend(query, key, value, PrefillConfig())
    assert choice.name == "cpp" and choice.kernel_options == () and "cpu" in choice.reason
    with caplog.at_level(logging.DEBUG, logger="flexprefill"):
        prefill_attention(query, key, value)
    (record,) = (record for record in caplog.records if record.name == "flexprefill")
    assert str(choice) in record.getMessage() and "[1, 2, 64, 32]" in record.getMessage()


def test_explain_backend_refuses_what_prefill_attention_refuses():
    query, key, value = make_qkv(64, heads=2)
    with pytest.raises(ValueError, match="backend must be one of"):
        explain_backend(query, key, value, backend="dense")
    with pytest.raises(ValueError, match="value must have key's heads and length"):
        explain_backend(query, key, value[:, :, 1:])
    with pytest.raises(FlexPrefillError, match="needs tensors on a CUDA device"):
        explain_backend(query, key, value, backend="flash")
