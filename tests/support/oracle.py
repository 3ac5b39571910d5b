"""The rule evaluated a second time, in float64 and by plain loops, from its published description alone."""

import numpy as np
import torch


def evaluate_rule(query, key, *, config, scale=None, last_chunk=True):
    """Returns (keep, close): the decision for every block, and where it hangs on less than 1e-3 in log2."""
    b, dtype = config.block_size, key.dtype
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    rows, columns, offset = -(-q_len // b), -(-kv_len // b), kv_len - q_len
    q, k = query.double().cpu().numpy(), key.double().cpu()
    keep = np.zeros((batch, heads, rows, columns), bool)
    close = np.zeros_like(keep)
    group = heads // kv_heads
    members = group if config.mask_heads == "kv" else 1  # query heads of one mask
    for n in range(batch):
        for first in range(0, heads, members):
            head_keys = k[n, first // group]
            means = np.stack(
                [head_keys[j * b : (j + 1) * b].mean(0).to(dtype).double().numpy() for j in range(columns)]
            )
            for i in range(rows):
                row = np.arange(i * b, min((i + 1) * b, q_len))
                s = q[n, first : first + members, row[0] : row[-1] + 1] @ means.T * scale * np.log2(np.e)
                L = np.full(columns, -np.inf)
                has_score = np.zeros(columns, bool)
                for j in range(columns):
                    first_position = j * b if config.score_rows == "visible" else min((j + 1) * b, kv_len) - 1
                    sees = row + offset >= first_position
                    if sees.any():
                        has_score[j] = True
                        seen = s[:, sees, j]
                        with np.errstate(all="ignore"):
                            L[j] = seen.max() + np.log2(np.exp2(seen - seen.max()).sum())
                finite = has_score & np.isfinite(L)
                last_visible = (offset + row[-1]) // b
                h = slice(first, first + members)
                for j in range(last_visible + 1):
                    kept = (
                        j < config.sink_blocks
                        or last_visible - j < config.window_blocks
                        or (last_chunk and i >= rows - config.last_full_blocks)
                        or (has_score[j] and not finite[j])
                    )
                    if not kept and finite[j]:
                        margins = [L[j] - L[finite].max() - np.log2(config.alpha)]
                        if config.min_blocks:
                            ranked = np.sort(L[finite])[::-1]
                            margins.append(L[j] - ranked[min(config.min_blocks, len(ranked)) - 1])
                        kept = max(margins) >= 0
                        close[n, h, i, j] = min(abs(margin) for margin in margins) < 1e-3
                    keep[n, h, i, j] = kept
    return torch.from_numpy(keep), torch.from_numpy(close)


def assert_follows_rule(block_map, query, key, **settings):
    keep, close = evaluate_rule(query, key, **settings)
    wrong = (block_map.to_dense().cpu() != keep) & ~close
    assert not wrong.any(), f"{int(wrong.sum())} of {keep.numel()} blocks, first at {wrong.nonzero()[0].tolist()}"


def masked_attention(query, key, value, block_map, *, mask=None, dtype=torch.float64):
    """Dense attention in ``dtype`` under the map's own boolean mask, causal per element."""
    group, size = query.shape[1] // key.shape[1], block_map.block_size
    blocks = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    position = torch.arange(block_map.q_len, device=query.device) + block_map.offset
    causal = torch.arange(block_map.kv_len, device=query.device) <= position[:, None]
    allowed = blocks[:, :, : block_map.q_len, : block_map.kv_len] & causal
    if mask is not None:
        allowed = allowed & mask
    key, value = (tensor.to(dtype).repeat_interleave(group, 1) for tensor in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query.to(dtype), key, value, attn_mask=allowed)


def relative_error(output, expected):
    return ((output.double() - expected.double()).norm() / expected.double().norm()).item()


def corrected_attention(query, key, value, block_map, *, scale=None):
    """Mean correction from its definition, in float64: every dropped block that all rows of a query block see whole is
    one more key of the softmax, its mean, with the log of its length added to the logit. Returns output and lse."""
    b, offset, kv_len = block_map.block_size, block_map.offset, block_map.kv_len
    group, dtype = query.shape[1] // key.shape[1], key.dtype
    scale = query.shape[3] ** -0.5 if scale is None else scale
    kept = block_map.to_dense().cpu()
    query, key, value = (tensor.double().cpu() for tensor in (query, key, value))
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for n, h in np.ndindex(*query.shape[:2]):
        keys, values = key[n, h // group], value[n, h // group]
        blocks = [slice(j * b, min((j + 1) * b, kv_len)) for j in range(block_map.shape[3])]
        for i in range(block_map.shape[2]):
            rows = slice(i * b, min((i + 1) * b, block_map.q_len))
            position = torch.arange(rows.start, rows.stop)[:, None] + offset
            attended_keys, attended_values, biases = [], [], []  # biases are -inf for the future
            for j, block in enumerate(blocks):
                if kept[n, h, i, j]:
                    attended_keys.append(keys[block])
                    attended_values.append(values[block])
                    seen = torch.arange(block.start, block.stop) <= position
                    biases.append(torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf))
                elif block.stop - 1 <= offset + rows.start:
                    attended_keys.append(keys[block].mean(0, keepdim=True).to(dtype).double())
                    attended_values.append(values[block].mean(0, keepdim=True).to(dtype).double())
                    biases.append(torch.full(position.shape, np.log(block.stop - block.start), dtype=torch.float64))
            if biases:
                logits = scale * query[n, h, rows] @ torch.cat(attended_keys).T + torch.cat(biases, 1)
                lse[n, h, rows] = logits.logsumexp(1)
                output[n, h, rows] = logits.softmax(1).nan_to_num(0) @ torch.cat(attended_values)
    return output, lse


def evaluate_cut_rule(
    query, key, starts, ends, *, config, scale=None, last_chunk=True, window=None, soft_cap=None, slopes=None
):
    """As evaluate_rule where rows see less than all keys before them: row by row and block by block.

    starts, ends: [B][S_kv], of each position's sequence; equal for padding.
    """
    b, dtype = config.block_size, key.dtype
    batch, heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    rows, columns, offset = -(-q_len // b), -(-kv_len // b), kv_len - q_len
    group = heads // key.shape[1]
    members = group if config.mask_heads == "kv" else 1
    keep = np.zeros((batch, heads, rows, columns), bool)
    close = np.zeros_like(keep)
    for n, first, i in np.ndindex(batch, heads // members, rows):
        hs = range(first * members, (first + 1) * members)
        L, has_score, kept = np.full(columns, -np.inf), np.zeros(columns, bool), np.zeros(columns, bool)
        inside = [p for p in range(offset + i * b, offset + min((i + 1) * b, q_len)) if starts[n][p] < ends[n][p]]
        for j in range(columns):
            logs = []
            for p in inside:
                start, end = starts[n][p], ends[n][p]
                own = range(max(j * b, start), min((j + 1) * b, end))
                seen = [k for k in own if k <= p and (window is None or k > p - window)]
                last_row = min(end - 1, inside[-1])
                kept[j] |= bool(seen) and (
                    j - start // b < config.sink_blocks
                    or last_row // b - j < config.window_blocks
                    or (last_chunk and i > (end - 1 - offset) // b - config.last_full_blocks)
                )
                if not (seen if config.score_rows == "visible" else seen and len(seen) == len(own)):
                    continue
                has_score[j] = True
                for h in hs:
                    mean = key[n, h // group, own.start : own.stop].double().mean(0).to(dtype).double()
                    logit = scale * float(query[n, h, p - offset].double() @ mean)
                    if soft_cap is not None:
                        logit = soft_cap * np.tanh(logit / soft_cap)
                    if slopes is not None:
                        logit += np.log(np.mean(np.exp(-float(slopes[h]) * (p - np.array(seen)))))
                    logs.append(logit * np.log2(np.e))
            if logs:
                L[j] = np.max(logs) + np.log2(np.exp2(np.array(logs) - np.max(logs)).sum())
        for j in np.flatnonzero(has_score & ~kept):
            margins = [L[j] - L[has_score].max() - np.log2(config.alpha)]
            if config.min_blocks:
                ranked = np.sort(L[has_score])[::-1]
                margins.append(L[j] - ranked[min(config.min_blocks, len(ranked)) - 1])
            kept[j] = max(margins) >= 0
            close[n, list(hs), i, j] = min(abs(margin) for margin in margins) < 1e-3
        keep[n, list(hs), i] = kept
    return torch.from_numpy(keep), torch.from_numpy(close)


def attention_weights(query, key, *, scale=None, window=None, starts=None, soft_cap=None, slopes=None):
    """Every row's softmax over the keys that it sees, in float64: [B, Hq, S_q, S_kv], 0 in rows that see none.

    starts: [B][S_kv], where each position's sequence begins; S_kv for padding.
    """
    (batch, heads, q_len, head_dim), kv_len = query.shape, key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    logits = scale * query.double() @ key.double().repeat_interleave(heads // key.shape[1], 1).mT
    if soft_cap is not None:
        logits = soft_cap * (logits / soft_cap).tanh()
    position, keys = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    if slopes is not None:
        logits = logits - slopes.double()[:, None, None] * (position - keys)
    hidden = (keys > position).expand(batch, 1, -1, -1)
    if window is not None:
        hidden = hidden | (position - keys >= window)
    if starts is not None:
        hidden = hidden | (keys < torch.tensor(starts)[:, None, kv_len - q_len :, None])
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
