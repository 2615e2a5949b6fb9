"""Training on rows in segments: the state goes from one to the next, and how far its gradient goes back is a choice.

    bptt=0     cut at every boundary, as Transformer-XL (Dai et al. 2019, arXiv:1901.02860)
    bptt=K     through 0 to K boundaries, every (K + 1)th being cut (the depth that RMT, Bulatov et al. 2022, arXiv:2207.06881, varies)
    bptt=all   through all: the exact gradient of the whole row, wherever the memory keeps what the pattern sees

Segments between two cuts are a run, and no two segments' activations exist at once:

    forward    each segment but the last is read without gradients, and the state at each boundary is saved
    backward   from the last to the first: each is read again from its saved state, now with gradients. To its loss is added the
               inner product <g, s> of the state s that it hands on and the gradient g that the next segment found for s: a constant
               here, so that the backward pass goes on where the next segment's ended

A memory may leave an auxiliary loss when a segment closes: it is added to what is differentiated, not to the loss that is reported.
A state is a tree of arrays and of the host's own numbers; positions and other integers have no gradient. Peak memory: one segment, the
states at the boundaries (in the host's memory with offload), and one gradient of a state. Of a state only that waits which the one at
the next boundary does not have: of a memory of the newest tokens a segment's keys and values. Work: all but the last segment of each
run are read twice; with bptt=0 none is.
"""

import functools
from itertools import pairwise
from types import SimpleNamespace

import numpy as np

import ops


def cut(batch, n, least=None, seed=0):
    """A data.Batch of [B, T] in pieces of n tokens, the last one shorter where n does not divide T. least: each of a length drawn for all
    rows at once, one of nine between that and n, so that lengths come again."""
    arrays, T = batch[:3], batch.tokens.shape[1]
    lengths = np.full(T, n) if least is None else np.random.default_rng(seed).choice(np.linspace(least, n, 9).astype(int), T)
    edges = [0, *np.cumsum(lengths).tolist()]
    return [batch._replace(**dict(zip(batch._fields, (x[:, i:j] for x in arrays)))) for i, j in pairwise(edges) if i < T]


def documents(batch, n):
    """A data.Batch as the rows that it is made of, since documents know nothing of each other: each of n tokens or more is one by itself,
    and those of a row between stay together; what has no targets is left out. Rows without such a document stay side by side as they
    are. Loss and gradients are the same wherever they do not hang on where segments end, and nowhere on how many rows come at once; but the
    first segment of a long document has no past to keep it apart from, and none of its segments a `begin`."""
    made = [parted(batch._replace(**{f: getattr(batch, f)[i : i + 1] for f in PIECE}), n) for i in range(len(batch.tokens))]
    stay = [i for i, rows in enumerate(made) if rows is None]
    if len(stay) == len(made):
        return [batch]
    whole = [batch._replace(**{f: getattr(batch, f)[stay] for f in PIECE})] if stay else []
    return [row for row in (*whole, *(row for rows in made for row in rows or ())) if (row.targets >= 0).any()] or [batch]


def parted(row, n):
    """documents() of a single row; None: it stays as it is."""
    T, starts = row.tokens.shape[1], np.flatnonzero(row.begin[0] == np.arange(row.tokens.shape[1])).tolist()
    alone = np.diff([*starts, T]) >= n
    edges = [0, *(at for at, *either in zip(starts[1:], alone[1:], alone) if any(either)), T]
    if len(edges) == 2:
        return None
    t, u, b = row[:3]
    return [row._replace(tokens=t[:, i:j], targets=u[:, i:j], begin=b[:, i:j] - i) for i, j in pairwise(edges)]


def runs(pieces, bptt):
    """The pieces in lists, with a cut between one list and the next."""
    n = len(pieces) if bptt == "all" else bptt + 1
    return [pieces[i : i + n] for i in range(0, len(pieces), n)]


def inputs(batch):
    """A data.Batch as the model takes it: arrays; begin None where all of it is one document's, which is faster."""
    if ops.is_array(batch.tokens):
        return batch
    # padding stands in documents of its own: any token will do
    begin = ops.array(batch.begin) if batch.begin.any() else None
    return batch._replace(tokens=ops.array(batch.tokens.clip(0)), begin=begin, targets=ops.array(batch.targets))


def read(model, tokens, state, **how):
    """(logits, the state after, what the model's observers saw, the summed auxiliary loss): model(tokens, state), or the text's first
    segment if state is None."""
    if state is None:
        state = model.start()
        # no room for later tokens: what is written into that is written in place, and the states are saved
        state = without_room(state)
    logits, state = model(tokens, state, **how)
    seen, aux = ([s[k] for s in state["layers"] if k in s] for k in ("seen", "aux"))
    return logits, {**state, "layers": [{k: x for k, x in s.items() if k not in ("seen", "aux")} for s in state["layers"]]}, seen, sum(aux)


def without_room(state):
    if isinstance(state, dict):
        return {k: 0 if k == "capacity" else without_room(x) for k, x in state.items()}
    return [without_room(x) for x in state] if isinstance(state, list) else state


def total(model, pieces, loss):
    """The summed loss of a row's pieces, without gradients. loss(call, piece), where call(tokens, ...) is the model's own call."""
    state, lost = None, 0.0
    with ops.no_grad():
        for piece in pieces:
            one, state, *_ = forward(model, piece, loss, state)
            lost += one.item()
    return lost


def accumulate(model, pieces, loss, grads, bptt="all", offload=False, of=1):
    """The gradient of the summed loss of a row's pieces, divided by `of`, added to grads (name -> array, used up).

    loss(call, piece) -> scalar, where call(tokens, ...) is the model's own call. offload: boundaries' states wait in the host's memory.
    Returns ([(loss, what each observer saw...) of every piece], grads).
    """
    state, outs, pieces = None, [], [inputs(piece) for piece in pieces]
    if model.replays is not None:
        model.replays.begin()
    todo = runs(pieces, bptt)
    for run in todo:
        mine, state, grads = backward(model, run, loss, state, grads, offload, of, keep=run is not todo[-1])
        outs += mine
    return outs, grads


def forward(model, piece, loss, state):
    """(loss of a piece, the state after, what the observers saw, the auxiliary loss)."""
    left = []

    def call(tokens, **how):
        y, *rest = read(model, tokens, state, **how)
        left.extend(rest)
        return y

    return loss(call, piece), *left


def backward(model, run, loss, state, grads, offload, of=1, keep=False):
    """As accumulate, for one run of segments, which begins with `state`. Returns (outs, the state after it if keep, else None, grads)."""
    saved, outs, handed, end = [], [], None, None
    # what a replay gives is there until the next one
    lasting = (lambda tree: tree) if model.replays is None else model.replays.safe
    park = ops.parked if offload else lambda tree, more: Here(lasting(tree))
    # the state that this run begins with stays whole
    first = Here(lasting(state))
    with ops.no_grad():
        for i, piece in enumerate(run[:-1]):
            out, _ = work(model, onward, {"piece": piece, "state": state})
            ops.begin(out["state"], out["gone"] if saved else None)
            saved.append(park(out["gone"], len(run) - 2 - i) if saved else first)
            state = out.pop("state")
            del out
    saved.append(Here(state))
    first = state = None
    for piece in reversed(run):
        before = saved.pop().back()
        # the first of them is whole, and so is the last
        state = before if not saved or handed is None else model.again(before, state)
        if saved:
            # while this segment is computed
            saved[-1].fetch()
        given = {"piece": piece, "state": state, "handed": handed, "of": of}
        handed = None
        out, grads = work(model, through, given, grads, loss=loss, keep=keep and end is None)
        handed, end = out["handed"], end or lasting(out["state"])
        outs.insert(0, lasting((out["loss"], *out["seen"])))
    return outs, end, grads


def work(model, job, given, grads=None, **how):
    """job(model, given, grads) -> (a dict of trees, made of the dict of trees `given`; grads), replayed where model.replays can."""
    f, given = functools.partial(job, model, **how), given | {"piece": {k: getattr(given["piece"], k) for k in PIECE}}
    if model.replays is None:
        return f(given, grads)
    return model.replays((job.__name__, how.get("keep")), f, given, grads, onwards="state" if job is onward else "handed")


PIECE = "tokens", "targets", "begin"


def onward(model, given, grads):
    """A segment without gradients: the state after it, and what of the one before waits."""
    piece, state = given["piece"], given["state"]
    # nobody needs logits here: as few as can be, one token's
    _, after, *_ = read(model, piece["tokens"], state, begin=piece["begin"], last=1)
    return {"gone": state and model.gone(state, after), "state": after}, grads


def through(model, given, grads, loss, keep):
    """A segment read with gradients, those of the parameters being added to grads. handed: those of the state after it, as parts() orders
    it, used up; None: nothing comes after. Gives the loss, what the observers saw, if keep the state after it, and as `handed` the
    gradients of `state`."""
    piece, state, handed = SimpleNamespace(**given["piece"]), given["state"], given["handed"]

    def f(*arrays):
        now = filled(state, arrays)
        early = handed and state and model.around is None
        if early:
            # each layer's new state is reduced to that product as soon as it is there
            now["layers"] = [{**s, "then": functools.partial(met, g)} for s, g in zip(now["layers"], handed)]
        one, after, seen, aux = forward(model, piece, loss, now)
        one = one / given["of"]
        total = one + aux + sum(map(along, handed[-1:] if early else handed, parts(after)[-1:] if early else parts(after)))
        # the backward pass holds those that it needs, and lets go of each when it has used it
        handed.clear()
        return total, one, after if keep else None, *seen

    handed, mine = handed or [], parts(state)
    (_, one, after, *seen), flat, grads = ops.accumulate_through(model, f, [x for part in mine for x in part], grads)
    flat = iter(flat)
    return {"loss": one, "seen": seen, "state": after, "handed": [[next(flat) for _ in part] for part in mine]}, grads


class Here:
    """A tree that stays where it is, as ops.parked() gives one that does not."""

    def __init__(self, tree):
        self.tree = tree

    def fetch(self):
        pass

    def back(self):
        return self.tree


def along(handed, arrays):
    """The scalar <handed, arrays>: its gradient with respect to the arrays is `handed`, which what comes after has found for them."""
    return sum(map(ops.inner, handed, arrays))


def met(handed, s):
    """A layer's new state, reduced to an auxiliary loss that includes <handed, arrays>: nobody needs the arrays themselves."""
    mine = {k: x for k, x in s.items() if k not in ("seen", "aux")}
    left = {"aux": s.get("aux", 0.0) + along(handed, differing(mine))}
    return {**left, "seen": s["seen"]} if "seen" in s else left


def parts(state):
    """The arrays of a state that can have a gradient: those of each layer, and those of the rest."""
    if state is None:
        return []
    return [*map(differing, state["layers"]), differing({k: x for k, x in state.items() if k != "layers"})]


def differing(state):
    """The arrays of a state that can have a gradient, in order."""
    found = []
    ops.tree_map(lambda x: found.append(x) if ops.is_real(x) else None, state)
    return found


def filled(state, arrays):
    """The state with arrays in the places of these."""
    given = iter(arrays)
    return ops.tree_map(lambda x: next(given) if ops.is_real(x) else x, state)
