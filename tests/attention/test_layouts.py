"""What is kept of a call by its layout never answers for another call."""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from support.inputs import make_qkv
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import AttentionVariant, BlockMap, PrefillConfig, explain_backend, prefill_attention, search_blocks
from flexprefill.attention import decide as decide_module
from flexprefill.attention.backends import Request
from flexprefill.attention.call import Asked, Call, checked
from flexprefill.attention.decide import decide
from flexprefill.attention.steps import choose
from flexprefill.runtime.listeners import listen
from flexprefill.runtime.state import forget
from flexprefill.variant.inputs import check_attention_inputs
from flexprefill.variant.variant import PLAIN, check_variant

KINDS = {"kv_len": 300, "batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16}


def tensors(q_len=300, **changes):
    return make_qkv(q_len, **{**KINDS, **changes})


def test_what_has_the_same_layout_is_one_object_and_nothing_else_is():
    query, key, value = tensors()
    layout = check_attention_inputs(query, key, value)
    assert layout is not None and check_attention_inputs(*tensors()) is layout
    others = [
        check_attention_inputs(query, key),
        check_attention_inputs(*tensors(200)),
        check_attention_inputs(*tensors(kv_len=400)),
        check_attention_inputs(*tensors(batch=2)),
        check_attention_inputs(*tensors(heads=2)),
        check_attention_inputs(*tensors(kv_heads=4)),
        check_attention_inputs(*tensors(head_dim=64)),
        check_attention_inputs(*tensors(dtype=torch.float32)),
        check_attention_inputs(query, key, tensors(head_dim=64)[2]),
        *(check_attention_inputs(*apart) for apart in strided(query, key, value)),
    ]
    assert None not in others and len({layout, *others}) == 1 + len(others)


def strided(*tensors):
    """Each of the tensors with other strides, the others as they are."""
    for i, tensor in enumerate(tensors):
        other = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        yield *tensors[:i], other, *tensors[i + 1 :]


def with_grad(tensor):
    return tensor.clone().requires_grad_()


WRONG = {
    "dtype": lambda t: t.double(),
    "another dtype": lambda t: t.half(),
    "batch": lambda t: t.expand(2, -1, -1, -1),
    "dimensions": lambda t: t[0],
    "size of 0": lambda t: t[:, :, :0],
    "head dimension": lambda t: t[..., :16],
    "odd head dimension": lambda t: t[..., :20],
    "gradient": with_grad,
    "negated": torch._neg_view,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "no tensor": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("wrong", WRONG)
def test_a_layout_that_fits_does_not_let_another_pass(wrong, place):
    given = list(tensors())
    check_attention_inputs(*given)
    right = given[place]
    given[place] = WRONG[wrong](right)
    if (wrong, place) == ("head dimension", 2):  # of the values it may be another
        assert check_attention_inputs(*given) is not None
        return
    messages = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as raised:
            check_attention_inputs(*given)
        messages.append(str(raised.value))
    forget()
    with pytest.raises(type(raised.value)) as raised:
        check_attention_inputs(*given)
    assert messages == [str(raised.value)] * 2
    given[place] = right
    assert check_attention_inputs(*given) is not None


def test_a_gradient_counts_where_gradients_are_on():
    query, key, value = tensors()
    check_attention_inputs(query, key, value)
    with torch.no_grad():
        assert check_attention_inputs(with_grad(query), key, value) is None
    with pytest.raises(ValueError, match="requires grad"):
        check_attention_inputs(with_grad(query), key, value)


def test_a_tensor_inside_vmap_is_refused_though_its_layout_fits():
    query, key, value = tensors()
    check_attention_inputs(query, key, value)
    stacked = torch.stack([query, query])
    with pytest.raises(TypeError, match="outside of torch.vmap"):
        torch.vmap(lambda one: check_attention_inputs(one, key, value))(stacked)


def test_each_call_is_warned_of_a_transposed_query():
    given = tensors(8, kv_len=8, heads=300, kv_heads=300)
    for _ in range(2):
        with pytest.warns(UserWarning, match="more heads than tokens"):
            check_attention_inputs(*given)


def a_call(given=None, **changes):
    arguments = {
        "config": PrefillConfig(), "variant": PLAIN, "block_map": None, "mask_mod": None, "score_mod": None,
        "scale": 0.1, "last_chunk": True, "backend": "auto", "return_aux": None,
    }  # fmt: skip
    return Asked(*(given or tensors()), **{**arguments, **changes})


def causal(size):
    return BlockMap.causal(1, 4, q_len=300, kv_len=300, block_size=size)


def recording():
    return listen(object())  # it is asked whether anyone listens, and nothing is told


CALLS = {
    "dense below": lambda: a_call(config=PrefillConfig(dense_below=301)),
    "never dense": lambda: a_call(config=PrefillConfig(dense_below=300)),
    "block size": lambda: a_call(config=PrefillConfig(block_size=64)),
    "full blocks": lambda: a_call(config=PrefillConfig(last_full_blocks=1)),
    "no full blocks": lambda: a_call(config=PrefillConfig(last_full_blocks=0)),
    "mean correction": lambda: a_call(config=PrefillConfig(mean_correction=True)),
    "not the last chunk": lambda: a_call(last_chunk=False),
    "scale of 0": lambda: a_call(scale=0.0),
    "negative scale": lambda: a_call(scale=-0.1),
    "triton": lambda: a_call(backend="triton"),
    "flash": lambda: a_call(backend="flash"),
    "a map": lambda: a_call(block_map=causal(128)),
    "a map of small blocks": lambda: a_call(block_map=causal(64)),
    "a map of other blocks": lambda: a_call(block_map=causal(96)),
    "mask_mod": lambda: a_call(mask_mod=lambda b, h, q, k: q >= k),
    "score_mod": lambda: a_call(score_mod=lambda score, b, h, q, k: score),
    "log-sum-exp": lambda: a_call(return_aux=AuxRequest(lse=True)),
    "greatest scores": lambda: a_call(return_aux=AuxRequest(max_scores=True)),
    "window": lambda: a_call(variant=AttentionVariant(sliding_window=9)),
    "sinks": lambda: a_call(variant=AttentionVariant(sinks=torch.ones(4))),
    "one query": lambda: a_call(tensors(1)),
    "an offset": lambda: a_call(tensors(200)),
    "float32": lambda: a_call(tensors(dtype=torch.float32)),
    "head dimension": lambda: a_call(tensors(head_dim=256)),
    "whole tiles": lambda: a_call(tensors(256, kv_len=256)),
    "whole tiles by triton": lambda: a_call(tensors(256, kv_len=256), backend="triton"),
    "strides": lambda: a_call(next(strided(*tensors()))),
    "strides of no 16 bytes": lambda: a_call(
        (torch.zeros(1, 4, 300, 132, dtype=torch.bfloat16)[..., :128], *tensors()[1:])
    ),
    "unknown backend": lambda: a_call(backend="fast"),
    "no name": lambda: a_call(backend=["auto"]),
}


def outcome(decide, *arguments):
    try:
        return decide(*arguments)
    except Exception as error:
        return type(error), str(error)


@pytest.fixture(params=["cpu", "cuda"])
def device(request, machine, monkeypatch):
    """The requests of calls are of this device, a Hopper GPU if it is CUDA."""
    if request.param == "cuda":
        machine()
        properties = type("H200", (), {"multi_processor_count": 132})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr("flexprefill.attention.steps.TAIL_SPLIT_FROM", 0)
        own, there = Request.of, torch.device("cuda")
        monkeypatch.setattr(Request, "of", lambda *given, **more: own(*given, **more)._replace(device=there))
    forget("what was decided of calls", "parts of the last rows")
    yield request.param
    forget("what was decided of calls", "parts of the last rows")


def decided_anew(asked):
    call = checked(asked)
    return call, choose(call)


@pytest.mark.parametrize("around", [contextlib.nullcontext, recording])
def test_what_was_decided_of_a_call_is_what_it_alone_comes_to(device, around):
    found = []
    for _ in range(2):  # the second time all are kept
        for name, make in {"plain": a_call, **CALLS}.items():
            asked = make()
            for state in (contextlib.nullcontext, around):
                with state():
                    kept, anew = outcome(decide, asked), outcome(decided_anew, asked)
                if isinstance(kept[0], Call):
                    for field, ours, expected in zip(Call._fields, kept[0], anew[0], strict=True):
                        assert ours is expected or ours == expected, (name, field)
                assert kept[1] == anew[1], name
                found.append(kept[1])
    assert len(set(map(str, found))) >= (14 if device == "cuda" else 6)


def test_plain_calls_alone_are_kept(device):
    for make in (a_call, CALLS["mask_mod"], CALLS["window"], CALLS["log-sum-exp"], CALLS["no name"]):
        outcome(decide, make())
    outcome(decide, a_call())
    assert len(decide_module._decided._held) == 1


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("last_chunk", True, 1, "last_chunk must be"),
        ("scale", 1.0, True, "scale must be"),
        ("backend", "auto", None, "backend must be"),
        ("config", None, 0, "config must be"),
        ("variant", None, 0, "variant must be"),
        ("block_map", None, 0, "block_map must be"),
        ("mask_mod", None, 0, "mask_mod must be"),
        ("score_mod", None, 0, "score_mod must be"),
        ("return_aux", None, 0, "return_aux must be"),
    ],
)
def test_a_call_like_one_that_was_taken_is_still_checked(name, good, bad, message):
    decide(a_call(**{name: good}))
    with pytest.raises((TypeError, ValueError), match=message):
        decide(a_call(**{name: bad}))


def test_a_map_is_checked_though_a_call_with_such_a_map_was_taken():
    decide(a_call(block_map=causal(128)))
    other = BlockMap.causal(1, 4, q_len=256, kv_len=256, block_size=128)
    with pytest.raises(ValueError, match="block_map must be of q_len=300"):
        decide(a_call(block_map=other))


def test_what_autocast_casts_is_not_kept_as_it_was_given():
    query, key, value = tensors()
    mixed = query.float(), key, value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert decide(a_call(mixed))[0].query.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="key must have query's dtype"):
        decide(a_call(mixed))


@pytest.mark.parametrize("call", [explain_backend, lambda q, k, v: search_blocks(q, k)])
def test_each_call_of_a_transposed_query_is_warned_of_where_it_is_made(call):
    given = tensors(8, kv_len=8, heads=300, kv_heads=300)
    for _ in range(2):
        with pytest.warns(UserWarning, match="more heads than tokens") as warned:
            call(*given)
        assert {warning.filename for warning in warned} == {__file__}


def test_a_call_keeps_the_settings_that_it_gave_where_an_equal_one_was_taken():
    one, other = PrefillConfig(alpha=1), PrefillConfig(alpha=1.0)
    assert one == other and decide(a_call(config=one, scale=0.0))[0].config is one
    call = decide(a_call(config=other, scale=-0.0))[0]
    assert call.config is other and str(call.scale) == "-0.0"


def test_a_variant_that_says_nothing_is_the_plain_one():
    query, key, _ = tensors()
    for variant in (None, PLAIN, AttentionVariant(), AttentionVariant(sliding_window=10**6).over(300)):
        assert check_variant(variant, query, key) is PLAIN
    assert check_variant(AttentionVariant(soft_cap=1.0), query, key) is not PLAIN
    other = replace(AttentionVariant(soft_cap=1.0), soft_cap=None)
    given = tensors(dtype=torch.float32)
    prefill_attention(*given, PrefillConfig(alpha=0.5), variant=other)
    before = len(decide_module._decided._held)
    prefill_attention(*given, PrefillConfig(alpha=0.5))
    assert len(decide_module._decided._held) == before, "the same choice is found"


def test_another_threads_export_does_not_change_a_choice(machine, monkeypatch):
    machine()
    query, key, value = tensors()
    aux = AuxRequest()
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert Request.of(query, key, value, block_size=128, mods="", scale=1.0, aux=aux).small


def test_threads_get_one_layout():
    forget("layouts that fit")
    given, found = tensors(), []
    start = threading.Barrier(4)

    def look():
        start.wait()
        found.append(check_attention_inputs(*given))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
