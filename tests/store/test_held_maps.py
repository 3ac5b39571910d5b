"""A MaskCache's maps: totals are those of what is held, and other prompts' maps are not looked at."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv

from flexprefill import BlockMap, MaskCache, PrefillConfig
from flexprefill.store.held_maps import FEW, HeldMap, HeldMaps, Identity, Place
from flexprefill.store.tokens import token_tensor

CONFIG = PrefillConfig(block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1)


def identity_of(tokens):
    return Identity(None, token_tensor(tokens).int().numpy().tobytes())


def prefix(ours, theirs):
    both = min(len(ours), len(theirs))
    return next((at for at in range(both) if ours[at] != theirs[at]), both)


@settings(deadline=None, max_examples=200)
@given(
    length=st.integers(1, 3 * FEW),
    other=st.integers(1, 3 * FEW),
    changed=st.integers(0, 3 * FEW),
    block=st.integers(1, 64),
)
def test_prompts_share_what_they_begin_with(length, other, changed, block):
    ours = list(range(length))
    theirs = [token + (at >= changed) for at, token in enumerate(range(other))]
    one, two = identity_of(ours), identity_of(theirs)
    assert one.shared(two) == two.shared(one) == prefix(ours, theirs)
    assert (one.beginning(block) == two.beginning(block)) == (ours[:block] == theirs[:block])


MAPS = [BlockMap.causal(1, heads, q_len=128, kv_len=128, block_size=16) for heads in (1, 2, 3)]
IDENTITIES = [identity_of(range(start, start + size)) for start, size in ((0, 40), (1, 40), (0, 90))]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("pppuod"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1))))
def test_totals_are_those_of_what_is_held(steps):
    maps, expected = HeldMaps(), {}  # expected: the most recently used last
    for step, which, prompt, layer in steps:
        identity = IDENTITIES[prompt]
        place = Place((layer, identity.beginning(16)), identity, 128, 128, True)
        if step == "p":
            maps.put(place, HeldMap(identity, MAPS[which]))
            expected.pop(place, None)
            expected[place] = MAPS[which]
        elif step == "u":
            found = maps.use(place)
            assert (found is None) == (place not in expected)
            if found is not None:
                expected[place] = expected.pop(place)
        elif step == "d":
            maps.drop(place)
            expected.pop(place, None)
        elif expected:
            maps.drop_oldest()
            del expected[next(iter(expected))]
        assert [place for place, _ in maps.items()] == list(expected) and len(maps) == len(expected)
        prompts = {id(place.identity): len(place.identity.tokens) for place in expected}
        assert maps.nbytes == sum(held.words.nbytes for held in expected.values()) + sum(prompts.values())
        assert {id(one) for one in maps.identities()} == set(prompts)
        for kind in {place.kind for place in expected} | {(7,)}:
            assert {place for place, _ in maps.of_kind(kind)} == {place for place in expected if place.kind == kind}
        for layer in (0, 1):
            of_layer = [held for place, held in expected.items() if place.kind[0] == layer]
            newest = maps.newest(layer)
            assert (newest.block_map if newest else None) is (of_layer[-1] if of_layer else None)
        assert dict(HeldMaps(maps.items()).items()) == dict(maps.items())


@pytest.mark.parametrize("others", [0, 1, 40])
def test_an_extension_looks_at_no_map_of_another_prompt_or_layer(others, monkeypatch):
    query, key, _ = make_qkv(128, heads=2, kv_heads=1, head_dim=16)
    cache = MaskCache()
    tokens = torch.arange(128)
    for start in range(others + 1):
        for layer in range(3):
            cache.prompt(tokens[:64] + start).search_blocks(layer, query[:, :, :64], key[:, :, :64], CONFIG)
    prompt, looked = cache.prompt(tokens), []
    of_kind = HeldMaps.of_kind

    def watched(maps, kind):
        looked.extend(found := of_kind(maps, kind))
        return found

    monkeypatch.setattr(HeldMaps, "of_kind", watched)
    before = cache.stats()
    prompt.search_blocks(1, query, key, CONFIG)
    assert cache.stats().extensions == before.extensions + 1
    assert {place.identity.tokens for place, _ in looked} == {identity_of(range(64)).tokens}
    assert {place.kind[0] for place, _ in looked} == {1}
