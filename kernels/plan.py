"""What the programs of a kernel do: from layouts of blocks to lists of work, on the device.

For the forward pass and dQ a piece of work is one block of queries with the blocks of keys that it sees. For dK and dV it is a block
of keys with the blocks of queries that see it, of all the query heads that share the key head. An entry of a list is one int32: the
block's number, in bits 25 to 30 the query head's number among those that share the key head, and the sign where the block is partial,
so that the rule must be applied. Heads, and rows of a batch, that see alike share their lists (a class).

Global tokens make a few blocks of keys whose lists are as long as the text. These are cut into parts of their own, which write
float32 sums that one more kernel adds in order: else all other programs wait for theirs.
"""

import heapq
from typing import Any, NamedTuple

import numpy as np

BLOCKS = 25  # bits of a block's number
SHARES = 132 * 16  # into so many the work is cut: some for each multiprocessor of a large GPU
LEAST = 32  # entries below which a part is not worth its own program


class Work(NamedTuple):
    """Lists of one kernel, int32 on the device. Piece w of class c: block ITEM[c, w], entries LIST[LO[c, w] : HI[c, w]],
    SLOT[c, w] the part that it writes, or -1 (ITEM -1: no work). WHO [B x heads]: the class. CUT (block, first slot, count) [3, m], for
    each class, and the number of slots."""

    who: Any
    item: Any
    lo: Any
    hi: Any
    slot: Any
    list: Any
    cut: Any
    slots: int


def by_query(found):
    """Work for blocks of queries. found [B][H]: Layout."""
    classes, who = distinct([x for row in found for x in row])
    return packed([pieces_of(*in_line(*parts_of(x)), x.shape[0]) for x in classes], who)


def by_key(found, key_heads):
    """Work for blocks of keys."""
    groups = [tuple(row[i : i + len(row) // key_heads]) for row in found for i in range(0, len(row), len(row) // key_heads)]
    classes, who = distinct(groups)
    pieces = []
    for group in classes:
        block, code = together(group)
        share = max(LEAST, len(code) * len(groups) // SHARES)
        pieces.append(pieces_of(block, code, group[0].shape[1], share))
    return packed(pieces, who)


def distinct(things):
    """The different ones, and for each its place among them; the same object counts as the same, and so do equal tuples of them."""
    key = lambda x: tuple(map(id, x)) if isinstance(x, tuple) else id(x)
    first = {}
    who = [first.setdefault(key(x), (len(first), x))[0] for x in things]
    return [x for _, x in first.values()], np.array(who, np.int32)


def in_line(i, j, full):
    """(i, entries) of blocks i x j, sorted by both: neighbours in a list are neighbours in the text, and often still in a cache."""
    codes = np.sort(i << 33 | j << 1 | full, kind="stable")
    partial = (codes & 1 ^ 1).astype(np.int32) << 31
    return codes >> 33, (codes >> 1 & 0x7FFFFFFF).astype(np.int32) | partial


def parts_of(found):
    """A layout's query blocks, key blocks and which are full."""
    return found.pairs >> 32, found.pairs & (1 << 31) - 1, found.pairs >> 31 & 1


def together(group):
    """Blocks of keys and their entries, of all query heads of a group."""
    each = [(j, g << BLOCKS | i, full) for g, found in enumerate(group) for i, j, full in [parts_of(found)]]
    return in_line(*map(np.concatenate, zip(*each)))


def pieces_of(block, code, n, share=None):
    """(item, lo, hi, slot) [4, pieces], longest first; the entries; (block, first slot, count) [3, cut blocks].

    block: the sorted block of each entry, of n; share: a block with more than twice that many is cut into parts, None: never.
    """
    start = np.searchsorted(block, np.arange(n + 1))
    size = np.diff(start)
    parts = np.where(size > 2 * share, -(-size // share), 1) if share else np.ones(n, np.int64)
    item = np.repeat(np.arange(n), parts)
    which = np.arange(len(item)) - np.repeat(np.cumsum(parts) - parts, parts)
    lo = start[item] + size[item] * which // parts[item]
    hi = start[item] + size[item] * (which + 1) // parts[item]
    many = parts[item] > 1
    slot = np.where(many, np.cumsum(many) - 1, -1)
    cut = np.flatnonzero(parts > 1)
    cuts = np.stack([cut, np.cumsum(parts[cut]) - parts[cut], parts[cut]])
    order = np.argsort(lo - hi, kind="stable")
    return np.stack([item, lo, hi, slot])[:, order], code, cuts


def packed(pieces, who):
    """One Work of the classes' pieces."""
    wide = max(p.shape[1] for p, *_ in pieces)
    base = np.cumsum([0] + [len(code) for _, code, _ in pieces])
    fill = lambda p, at: np.pad(p + np.array([[0], [at], [at], [0]]), ((0, 0), (0, wide - p.shape[1])), constant_values=-1)
    table = np.stack([fill(p, at) for (p, *_), at in zip(pieces, base)], 1).astype(np.int32)  # [4, classes, wide]
    cuts = [c for *_, c in pieces]
    most = max(c.shape[1] for c in cuts)
    cut = np.stack([np.pad(c, ((0, 0), (0, most - c.shape[1]))) for c in cuts], 1).astype(np.int32)  # [3, classes, most]
    slots = int(max(p[3].max(initial=-1) for p, *_ in pieces)) + 1
    codes = np.concatenate([code for _, code, _ in pieces] or [np.zeros(1, np.int32)])
    return Work(who, *np.ascontiguousarray(table), codes if len(codes) else np.zeros(1, np.int32), np.ascontiguousarray(cut), slots)


def in_order(work, many, programs=132, overhead=2):
    """The work of all rows and heads as one table, head after head, so that what runs together shares what lies in the cache: (META
    [pieces, 8] (block, lo, hi, slot, row and head), FIRST [programs + 1], the entries); program p does the pieces FIRST[p] to
    FIRST[p + 1]. One for each piece where there are
    more than `many` for each of them, else `programs` with a fair share each. No list is empty: a block that sees
    nothing gets one partial entry, of which the rule leaves nothing.
    """
    rows = []
    for z, c in enumerate(work.who):
        w = np.flatnonzero(work.item[c] >= 0)
        rows.append(np.stack([work.item[c, w], work.lo[c, w], work.hi[c, w], work.slot[c, w], np.full(len(w), z)], 1))
    rows = np.concatenate(rows).astype(np.int64)
    nothing = rows[:, 2] <= rows[:, 1]
    rows[nothing, 1], rows[nothing, 2] = len(work.list), len(work.list) + 1
    first = np.arange(len(rows) + 1)
    if programs < len(rows) <= many * programs:
        # each piece goes to the program that is done first
        who, heap = np.empty(len(rows), np.int64), [(0, p) for p in range(programs)]
        for u, cost in enumerate((rows[:, 2] - rows[:, 1] + overhead).tolist()):
            load, p = heap[0]
            who[u] = p
            heapq.heapreplace(heap, (load + cost, p))
        rows = rows[np.argsort(who, kind="stable")]
        first = np.concatenate([[0], np.cumsum(np.bincount(who, minlength=programs))])
    meta = np.zeros((len(rows), 8), np.int32)
    meta[:, :5] = rows
    return meta, first.astype(np.int32), np.append(work.list, np.int32(-(2**31)))
