import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv

from flexprefill import MaskCache, PrefillConfig, search_blocks

CONFIG = PrefillConfig(block_size=16, alpha=0.6, sink_blocks=1, window_blocks=1, last_full_blocks=2)


def model(tokens, seed=0):
    """query and key that depend on each token and its position alone, as a first layer's do."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(50, 32, generator=generator)
    places = torch.randn(2000, 32, generator=generator)
    hidden = 2 * table[tokens] + places[: len(tokens)]
    projection = torch.randn(32, 4 * 16, generator=generator) / 6
    query = (hidden @ projection).unflatten(-1, (4, 16)).transpose(0, 1)[None]
    key = (hidden @ torch.randn(32, 2 * 16, generator=generator) / 6).unflatten(-1, (2, 16)).transpose(0, 1)[None]
    return query.to(DEVICE), key.to(DEVICE)


def tokens_of(length, seed=0):
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_reused_maps_equal_searched_ones(data):
    cache = MaskCache()
    pool = tokens_of(900)
    for _ in range(4):
        # prompts that share a prefix of some length and then go on differently
        tokens = pool[: data.draw(st.integers(1, 900))].clone()
        changed = data.draw(st.integers(0, len(tokens)))
        if data.draw(st.booleans()):
            tokens[changed:] = (tokens[changed:] + 1) % 50
        query, key = model(tokens)
        prompt = cache.prompt(tokens)
        end = data.draw(st.sampled_from([len(tokens), len(tokens), max(1, len(tokens) // 2)]))
        start = data.draw(st.sampled_from([0, 0, end // 2, end // 2 // 16 * 16]))
        last_chunk = data.draw(st.booleans())
        arguments = query[:, :, start:end], key[:, :, :end], CONFIG
        for layer in (0, 1):
            found = prompt.search_blocks(layer, *arguments, last_chunk=last_chunk)
            assert found == search_blocks(*arguments, last_chunk=last_chunk)
            assert cache[layer] == found


def test_an_extended_prompt_searches_only_its_new_query_blocks():
    tokens = tokens_of(1280)
    query, key = model(tokens)
    cache = MaskCache()
    cache.prompt(tokens[:960]).search_blocks(3, query[:, :, :960], key[:, :, :960], CONFIG)
    whole = cache.prompt(tokens).search_blocks(3, query, key, CONFIG)
    assert whole == search_blocks(query, key, CONFIG)
    stats = cache.stats()
    # 60 rows were searched, of which the last two kept all and are searched again: 58 of 80 are known
    assert (stats.misses, stats.extensions, stats.hits) == (1, 1, 0)
    assert stats.reused_rows == 58 and stats.searched_rows == 60 + 22
    assert cache.prompt(tokens).search_blocks(3, query, key, CONFIG) == whole
    assert cache.stats().hits == 1
    assert cache.prompt(tokens).search_blocks(4, query, key, CONFIG) == whole
    assert cache.stats().misses == 2


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([16, 32, 64, 128]), st.data())
def test_every_row_before_the_first_other_token_is_reused(block, data):
    config = replace(CONFIG, block_size=block)
    longest = 12 * block
    first, second = (data.draw(st.integers(1, longest)) for _ in range(2))
    same = data.draw(st.integers(0, min(first, second)))
    before = tokens_of(longest)
    after = torch.cat([before[:same], (before[same:] + 1) % 50])
    if data.draw(st.booleans()):  # a batch differs where one of its entries does
        before, after = torch.stack([before, before]), torch.stack([before, after])
    last_chunks = data.draw(st.tuples(st.booleans(), st.booleans()))

    cache = MaskCache()
    for tokens, length, last_chunk in zip((before, after), (first, second), last_chunks, strict=True):
        query, key = (torch.cat(parts) for parts in zip(*map(model, torch.atleast_2d(tokens)[:, :length]), strict=True))
        found = cache.prompt(tokens[..., :length]).search_blocks(0, query, key, config, last_chunk=last_chunk)
        assert found == search_blocks(query, key, config, last_chunk=last_chunk)
    # rows of prompts that end with them keep everything there
    known = [-(-length // block) - 2 * last for length, last in zip((first, second), last_chunks, strict=True)]
    expected = max(0, min(same // block, *known))
    if (same, first, *last_chunks[:1]) == (second, second, *last_chunks[1:]):
        expected = -(-second // block)  # the same search again
    assert cache.stats().reused_rows == expected


def test_rows_of_several_maps_are_joined():
    tokens = tokens_of(640)
    query, key = model(tokens)
    cache = MaskCache()
    prompt = cache.prompt(tokens)
    for start, end in ((0, 160), (160, 320), (320, 480)):
        prompt.search_blocks(0, query[:, :, start:end], key[:, :, :end], CONFIG, last_chunk=False)
    assert prompt.search_blocks(0, query, key, CONFIG) == search_blocks(query, key, CONFIG)
    assert cache.stats().reused_rows == 30 and cache.stats().searched_rows == 30 + 10


def test_a_long_prompt_shows_itself_in_a_line():
    shown = repr(MaskCache().prompt(torch.arange(100_000)))
    assert "CachedPrompt" in shown and len(shown) < 300


def test_what_tokens_take_counts_too_once_for_all_layers():
    tokens = tokens_of(512)
    query, key = model(tokens)
    words = search_blocks(query, key, CONFIG).words.nbytes
    cache = MaskCache()
    for layer in range(3):
        cache.prompt(tokens).search_blocks(layer, query, key, CONFIG)
    assert cache.stats().bytes == 3 * words + 512 * 4
    cache.prompt(tokens + 2**40).search_blocks(0, query, key, CONFIG)  # no int32
    assert cache.stats().bytes == 4 * words + 512 * 4 + 512 * 8

    tight = MaskCache(max_bytes=2 * (words + 512 * 4))
    for change in range(3):
        tight.prompt(tokens + change).search_blocks(0, query, key, CONFIG)
    assert tight.stats().entries == 2 and tight.stats().bytes == tight.max_bytes and tight.stats().evictions == 1
    small = MaskCache(max_bytes=words + 512 * 4 - 1)
    small.prompt(tokens).search_blocks(0, query, key, CONFIG)
    assert small.stats().entries == 0


def test_a_part_of_a_map_does_not_hold_the_whole():
    tokens = tokens_of(640)
    query, key = (tensor[:, :1].contiguous() for tensor in model(tokens))
    cache = MaskCache()
    cache.prompt(tokens).search_blocks(0, query, key, CONFIG, last_chunk=False)
    part = cache.prompt(tokens).search_blocks(0, query[:, :, :544], key[:, :, :544], CONFIG, last_chunk=False)
    assert cache.stats().searched_rows == 40
    assert part.words.untyped_storage().nbytes() == part.words.nbytes


def test_a_key_stands_for_a_conversation_and_length_alone_for_nothing():
    tokens = tokens_of(640)
    query, key = model(tokens)
    other_query, other_key = model(tokens_of(640, seed=9))
    cache = MaskCache()
    cache.prompt(key="a").search_blocks(0, query[:, :, :320], key[:, :, :320], CONFIG)
    assert cache.prompt(key="a").search_blocks(0, query, key, CONFIG) == search_blocks(query, key, CONFIG)
    assert cache.stats().extensions == 1 and cache.stats().reused_rows == 18
    found = cache.prompt(key="b").search_blocks(0, other_query, other_key, CONFIG)
    assert found == search_blocks(other_query, other_key, CONFIG) and cache.stats().misses == 2
    found = cache.prompt(tokens_of(640, seed=9)).search_blocks(0, other_query, other_key, CONFIG)
    assert found == search_blocks(other_query, other_key, CONFIG) and cache.stats().misses == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"config": PrefillConfig(block_size=16, alpha=0.61, sink_blocks=1, window_blocks=1)},
        {"config": PrefillConfig(block_size=32, alpha=0.6, sink_blocks=1, window_blocks=1)},
        {"scale": 0.3},
    ],
)
def test_other_settings_are_other_maps(changes):
    tokens = tokens_of(512)
    query, key = model(tokens)
    cache = MaskCache()
    cache.prompt(tokens).search_blocks(0, query, key, CONFIG)
    arguments = {"config": CONFIG} | changes
    assert cache.prompt(tokens).search_blocks(0, query, key, **arguments) == search_blocks(query, key, **arguments)
    assert cache.stats().misses == 2


def test_the_least_recently_used_maps_go_first_and_the_limit_holds():
    query, key = model(tokens_of(512))
    size = search_blocks(query, key, CONFIG).words.nbytes
    cache = MaskCache(max_bytes=3 * size)
    prompts = [cache.prompt(key=name) for name in "abcd"]
    for prompt in prompts[:3]:
        prompt.search_blocks(0, query, key, CONFIG)
    prompts[0].search_blocks(0, query, key, CONFIG)
    prompts[3].search_blocks(0, query, key, CONFIG)
    assert cache.stats().evictions == 1 and cache.stats().bytes == 3 * size and cache.stats().entries == 3
    prompts[0].search_blocks(0, query, key, CONFIG)
    assert cache.stats().hits == 2
    prompts[1].search_blocks(0, query, key, CONFIG)
    assert cache.stats().misses == 5
    small = MaskCache(max_bytes=size - 1)
    assert small.prompt(key=1).search_blocks(0, query, key, CONFIG) == search_blocks(query, key, CONFIG)
    assert small.stats().entries == 0 and small.stats().bytes == 0
    cache.clear()
    assert cache.stats().bytes == 0 and cache.layers() == []


def test_maps_are_kept_on_the_device_asked_for():
    query, key = model(tokens_of(300))
    cache = MaskCache(device="cpu")
    found = cache.prompt(key=0).search_blocks(2, query, key, CONFIG)
    assert cache[2].device.type == "cpu" and found.device.type == DEVICE
    assert cache.prompt(key=0).search_blocks(2, query, key, CONFIG).device.type == DEVICE


def test_threads_share_a_cache():
    query, key = model(tokens_of(512))
    expected = search_blocks(query, key, CONFIG)
    cache = MaskCache(max_bytes=4 * expected.words.nbytes)
    wrong = []

    def work(number):
        for step in range(12):
            found = cache.prompt(key=(number + step) % 6).search_blocks(step % 3, query, key, CONFIG)
            if found != expected:
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert not wrong and stats.hits + stats.extensions + stats.misses == 72
    assert stats.bytes <= cache.max_bytes


def test_batches_and_lists_of_tokens_are_hashed_alike():
    tokens = tokens_of(300)
    assert MaskCache().prompt(tokens).identity == MaskCache().prompt(tokens.tolist()).identity
    assert MaskCache().prompt(tokens).identity == MaskCache().prompt(tokens[None].int()).identity
    batch = torch.stack([tokens, tokens.flip(0)])
    assert MaskCache().prompt(batch).identity != MaskCache().prompt(batch.flip(0)).identity
    assert MaskCache().prompt(tokens).identity != MaskCache().prompt(tokens[:-1]).identity


def test_wrong_arguments_are_named():
    query, key, _ = make_qkv(64)
    cache = MaskCache()
    for arguments, error, message in (
        ({}, ValueError, "either token_ids or a key"),
        ({"token_ids": [1], "key": 2}, ValueError, "either token_ids or a key"),
        ({"key": []}, TypeError, "key must be hashable, got list"),
        ({"token_ids": "chat"}, TypeError, "token_ids must be whole numbers, got a str; a name goes to key='chat'"),
        ({"token_ids": torch.zeros(3)}, TypeError, "token_ids must be whole numbers, got torch.float32"),
        ({"token_ids": torch.zeros(0, dtype=torch.int64)}, ValueError, r"token_ids must be \[S\].*\[0\]"),
    ):
        with pytest.raises(error, match=message):
            cache.prompt(**arguments)
    with pytest.raises(ValueError, match="prompt's 63 tokens, got S_kv=64"):
        cache.prompt(list(range(63))).search_blocks(0, query, key)
    with pytest.raises(TypeError, match="layer must be an int, got '0'"):
        cache.prompt(key=1).search_blocks("0", query, key)
    with pytest.raises(KeyError, match="layer 7 has no map in the cache, which holds layers"):
        cache[7]
    with pytest.raises(TypeError, match="max_bytes must be an int"):
        MaskCache(max_bytes=1e9)
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        MaskCache(max_bytes=0)


@pytest.mark.gpu
def test_extending_96k_to_128k_gives_the_whole_searchs_map():
    generator = torch.Generator("cuda").manual_seed(0)
    query = 2 * torch.randn(1, 8, 131072, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 2, 131072, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    cache = MaskCache()
    config = PrefillConfig(alpha=0.5)
    prompt = cache.prompt(key="long")
    prompt.search_blocks(0, query[:, :, :98304], key[:, :, :98304], config)
    assert prompt.search_blocks(0, query, key, config) == search_blocks(query, key, config)
    assert cache.stats().reused_rows == 766
