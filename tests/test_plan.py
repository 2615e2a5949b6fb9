"""The lists of work (kernels/plan.py) name every block of a layout once, however it is cut and dealt out."""

import numpy as np
import pytest

import plugins
from kernels import plan
from kernels.layout import layout

SPECS = ["longformer:window=300,n_global=20", "bigbird:block=32,n_random=2", "duo:window=100,sinks=9", "local:block=500"]
N, B, H, K = 1500, 2, 4, 2

every_spec = pytest.mark.parametrize("spec", SPECS)


def layouts(spec, size):
    """[B][H] layouts; the second row of the batch is two documents."""
    rule = plugins.place(plugins.parse("attention", spec), layer=1, n_layer=2, n_head=H, n_kv_head=K)
    begins = [None, np.where(np.arange(N) < 700, 0, 700)]
    return [[layout(rule, (0, N), (0, N), size, b, head=h) for h in range(H)] for b in begins]


def wanted(found):
    """(row, head, query block, key block, partial) of all blocks."""
    pairs = [
        (b, h, int(c) >> 32, int(c) & (1 << 31) - 1, not c >> 31 & 1)
        for b, row in enumerate(found)
        for h, x in enumerate(row)
        for c in x.pairs
    ]
    assert len(set(pairs)) == len(pairs) > 0
    return set(pairs)


def listed(work, by_key):
    """The same, as the pieces of work name them; each once."""
    out = []
    for z, c in enumerate(work.who):
        for item, lo, hi in zip(work.item[c], work.lo[c], work.hi[c]):
            for e in work.list[lo:hi].tolist() if item >= 0 else ():
                out.append(named(z, int(item), e, by_key))
    assert len(set(out)) == len(out)
    return set(out)


def named(z, item, e, by_key):
    block, g, partial = e & (1 << plan.BLOCKS) - 1, e >> plan.BLOCKS & 63, e < 0
    if by_key:
        return z // K, z % K * (H // K) + g, block, item, partial
    return z // H, z % H, item, block, partial


@every_spec
def test_every_block_of_queries_has_its_list(spec):
    found = layouts(spec, (64, 32))
    assert listed(plan.by_query(found), False) == wanted(found)


@every_spec
@pytest.mark.parametrize("cut", [False, True])
def test_every_block_of_keys_has_its_list(spec, cut, monkeypatch):
    monkeypatch.setattr(plan, "LEAST", 2 if cut else 1 << 20)
    monkeypatch.setattr(plan, "SHARES", 1 << 20)
    found = layouts(spec, (32, 64))
    work = plan.by_key(found, K)
    assert listed(work, True) == wanted(found)
    assert (work.slots > 0) == cut
    for c in range(len(work.item)):
        # a cut block's parts have slots of their own, one behind the other, and nobody else writes there
        cuts = [tuple(x) for x in work.cut[:, c].T.tolist() if x[2]]
        slots = sorted(s for s in work.slot[c].tolist() if s >= 0)
        assert slots == sorted(s for _, first, count in cuts for s in range(first, first + count))
        assert all(sorted(work.slot[c][work.item[c] == j]) == list(range(f, f + n)) for j, f, n in cuts)


@every_spec
@pytest.mark.parametrize("many", [0, 1 << 20])
def test_work_in_order_is_the_same_work(spec, many):
    found = layouts(spec, (32, 64))
    work = plan.by_key(found, K)
    meta, first, entries = plan.in_order(work, many, programs=7)
    assert first[0] == 0 and first[-1] == len(meta) and len(first) - 1 == (7 if many else len(meta))
    assert (meta[:, 2] > meta[:, 1]).all()
    out = [named(int(z), int(j), e, True) for j, lo, hi, _, z in meta[:, :5] for e in entries[lo:hi].tolist() if lo < len(work.list)]
    assert len(out) == len(set(out)) and set(out) == wanted(found)
    # every block is written, and only once, or in parts
    whole = [(int(j), int(z)) for j, _, _, slot, z in meta[:, :5] if slot < 0]
    assert len(whole) == len(set(whole))
    load = np.add.reduceat(meta[:, 2] - meta[:, 1], first[:-1])
    assert not many or load.max() <= load.mean() + (meta[:, 2] - meta[:, 1]).max() + 4


def test_a_block_that_sees_nothing_is_written_all_the_same():
    rule = plugins.parse("attention", "window:window=5")
    found = [[layout(rule, (0, 200), (100, 100), (64, 64))]]
    meta, _, entries = plan.in_order(plan.by_query(found), 0)
    assert sorted(meta[:, 0]) == [0, 1, 2, 3]
    empty = meta[meta[:, 0] == 0][0]
    assert entries[empty[1] : empty[2]].tolist() == [-(2**31)]
