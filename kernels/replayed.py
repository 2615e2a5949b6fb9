"""Segments that are alike, asked for at once: a segment's forward pass, or its forward and backward pass, as one CUDA graph.

A host needs some ten microseconds to ask for a kernel, and a short segment's kernels do not take much longer: then the device waits for
the host. But in a long row one segment is like the next: so many tokens, so many remembered, the same kernels. All that differs are
numbers in memory, and that all positions are so many farther on. So a segment's work is a function of a tree of arrays (segments.py). The
first tree of its looks (shapes, dtypes, the host's numbers) is worked as ever; at the second the function is recorded as a graph, and from
then on the graph is replayed: its inputs are copied to where those of the recording were, its outputs stay where it leaves them.

What the host reckoned is in the graph as it was, so it may not depend on where the segment stands. Positions do: they are in the tree
(Known). What attention's kernels were told is noted at the recording (kernels.heard), and nothing is replayed unless the rule says the same
of all later segments (kernels.spans.moves). Memories and position schemes must say that they `move`.

Without CUDA a replay runs the function again, with the host's numbers of the recording: what tests can see of it.
"""

import math
import warnings

import kernels
import ops
from kernels.recent import Recent
from kernels.spans import behaviours, moves

if ops.BACKEND == "torch":
    import torch

    from backends import torch_

POSITIONS = "next", "first", "ahead"  # keys of a state at which the host's ints are positions


class Replays:
    """What is replayed of a model's training. most: tokens of the longest segments that are; settle(): makes ready what the recorded
    kernels read beside the tree and the parameters."""

    def __init__(self, model, most, settle=lambda: None):
        self.model, self.most, self.settle = model, most, settle
        self.made, self.seen, self.rooms, self.homes, self.done = {}, set(), {}, set(), []
        self.stream, self.pool = (torch.cuda.Stream(), torch.cuda.graph_pool_handle()) if ops.on_gpu() else (None, None)
        self.read = None

    def begin(self):
        """Another row begins. Recordings of the model with another config, or with parameters elsewhere, are dropped."""
        read = self.model.config, [p.data_ptr() for p in self.model.parameters()]
        if read != self.read:
            self.made, self.read = {}, read

    def __call__(self, name, f, given, grads, onwards):
        """f(given, grads) -> (out, grads), replayed where it can be. name: of this work; given and out are dicts of trees, grads name ->
        array, used up. onwards: a key of both: the next call is given what `out` has there. All of out is good until the next call."""
        if not self.serves(given):
            return self.eagerly(f, given, grads)
        key = name, looks(given, standing(given))
        if self.made.get(key):
            return self.made[key](given, grads)
        if key in self.made or key not in self.seen or len(self.made) == MOST:
            self.seen.add(key)
            return self.eagerly(f, given, grads)
        there = self.placed(given)
        kernels.heard, torch_._read = asked, read = [], []
        try:
            out, grads = self.eagerly(f, given, grads)
        finally:
            kernels.heard = torch_._read = None
        around = self.model.around
        by = there["piece"]["tokens"].shape[1] + (0 if around is None else around.size * (1 + around.read))
        self.made[key] = not read and farther(asked, by) and recorded(f, there, grads, onwards, self)
        return out, grads

    def serves(self, given):
        """May the host's numbers be those of another segment?"""
        tokens, begin, state = given["piece"]["tokens"], given["piece"]["begin"], given["state"]
        # each class says so itself: what inherits from one that moves may not
        plain = all(vars(type(m)).get("moves") for m in self.model.memories())
        plain = plain and all(p.moves for p in self.model.model.positions) and not getattr(self.model.adapter.options, "dropout", 0)
        known = state is None or all(isinstance(s["n"], int) for s in state["layers"])
        return begin is None and tokens.numel() <= self.most and plain and known

    def eagerly(self, f, given, grads):
        """f without a graph. Once there are graphs, their memory leaves no room for as much again: then blocks are recomputed."""
        decoder = self.model.model
        run = decoder.run
        if any(self.made.values()) and run is ops.call:
            decoder.run = ops.checkpoint
        try:
            out, grads = f(given, grads)
        finally:
            decoder.run = run
        return self.safe(out), grads

    def safe(self, tree):
        """The tree, none of its arrays where the next call may write."""
        return ops.tree_map(lambda x: x.clone() if x.untyped_storage().data_ptr() in self.homes else x, tree)

    def placed(self, tree, *path):
        """The tree, its arrays copied to the place that each path and shape has for good; so are numbers that differ between calls."""
        if torch.is_tensor(tree):
            return put(self.room(path, tree.shape, tree.dtype), tree)
        if isinstance(tree, dict):
            return {k: self.placed(x, *path, k) for k, x in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.placed(x, *path, i) for i, x in enumerate(tree)]
        if path == ("state", "next"):
            known = Known(tree)
            known.there = self.room(path, (), torch.int32).fill_(tree)
            return known
        return self.room(path, (), torch.float32).fill_(tree) if path == ("of",) else tree

    def room(self, path, shape, dtype):
        """The place for arrays of this path, shape and dtype: in a larger one's memory of the same path, where there is one already."""
        key = path, tuple(shape), dtype
        if key not in self.rooms:
            n, like = math.prod(shape), [a for (p, _, d), a in self.rooms.items() if (p, d) == (path, dtype)]
            large = next((a for a in like if a.numel() >= n), None)
            new = torch.empty(n, dtype=dtype, device=ops.device()) if large is None else large.reshape(-1)[:n]
            self.rooms[key] = new.reshape(shape)
            self.homes.add(new.data_ptr())
        return self.rooms[key]

    def over(self, s, later):
        """A layer's state s, its arrays written over a later one's where those stand in such places: nothing is copied twice then."""
        there = lambda a, b: torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape and b.data_ptr() in self.homes
        return {k: put(later[k], a) if there(a, later.get(k)) else a for k, a in s.items()}

    def wait(self):
        """Let the host be one replay ahead and no more: what it makes ready waits in the device's memory."""
        self.done.append(torch.cuda.current_stream().record_event())
        if len(self.done) > 1:
            self.done.pop(0).synchronize()


MOST = 64  # graphs; rows of ever other lengths are not recorded for ever


class Known(int):
    """A position that the host knows, and the device in `there`, where it may be another one later."""

    def __add__(self, n):
        known = Known(int(self) + n)
        known.there = self.there + n
        return known


def recorded(f, given, grads, onwards, shared):
    """A Replay, or None where CUDA does not record what is done."""
    try:
        return Replay(f, given, grads, onwards, shared)
    except RuntimeError as no:
        warnings.warn(f"segments are not replayed, which is slower: {str(no).splitlines()[0]}", stacklevel=2)
        for p in shared.model.parameters():
            p.grad = None
        return None


class Replay:
    """f recorded, working on the arrays of `given` and adding to those of grads."""

    def __init__(self, f, given, grads, onwards, shared):
        self.f, self.given, self.grads, self.shared = f, given, dict(grads or {}), shared
        self.onwards, self.standing, self.graph = onwards, standing(given), None
        if shared.pool is None:
            return
        # once outside of the graph: kernels that are compiled for where these arrays stand are compiled now
        shared.eagerly(f, fresh(given), {})
        shared.settle()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph, Recent.noted = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.stream(shared.stream):
                # other threads may ask for memory of the host meanwhile
                self.graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
                try:
                    self.out = self.run()
                finally:
                    self.graph.capture_end()
        finally:
            # lists of blocks that the kernels read: they live as long as the graph
            self.held, Recent.noted = Recent.noted, None
        shared.settle()

    def run(self):
        """f once, its outputs put in their places; what goes onwards is written over the inputs that it was made of."""
        out, grads = self.f(fresh(self.given), dict(self.grads))
        if any(grads[n] is not g for n, g in self.grads.items()):
            raise RuntimeError("a gradient was not added to in place")
        # all of it in places that others give from too; what goes onwards last, for the rest may be a part of what it is written over
        order = sorted(out, key=lambda k: k == self.onwards)
        return {k: self.shared.placed(ops.tree_map(self.own, out[k]) if k == self.onwards else out[k], k) for k in order}

    def own(self, x):
        """x in memory that is not that of `given`, unless it is one of its arrays as a whole."""
        near = [a for a in leaves(self.given) if a.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()]
        return x if not near or any(one(a, x) for a in near) else x.clone()

    def __call__(self, given, grads):
        shared = self.shared
        shared.placed(given)
        for n, there in self.grads.items():
            put(there, grads[n]) if n in grads else there.zero_()
        if self.graph is None:
            self.out = self.run()
        else:
            shared.settle()
            self.graph.replay()
            shared.settle()
            shared.wait()
        now = standing(given)
        return moved(self.out, {name: n - self.standing[name] for name, n in now.items()}), dict(self.grads)


def standing(given):
    """Name -> what the host's numbers of this name count from: the position where the segment begins, and the number of positions that the
    model's own vectors (memory/_around.py) have taken."""
    state = given["state"] or {"next": 0}
    return {**dict.fromkeys(POSITIONS, int(state["next"])), "more": state.get("around", {}).get("more", 0)}


def leaves(tree):
    found = []
    ops.tree_map(found.append, tree)
    return found


def put(to, x):
    """The tree x, its arrays where those of `to` are."""
    if torch.is_tensor(x):
        return to if one(to, x) else to.copy_(x)
    if isinstance(x, dict):
        return {k: put(to.get(k), a) for k, a in x.items()}
    return [put(there, a) for there, a in zip(to, x, strict=True)] if isinstance(x, list | tuple) else x


def one(a, b):
    """Are two arrays the same numbers in memory?"""
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def fresh(tree):
    """The same arrays in dicts and lists of its own."""
    return ops.tree_map(lambda x: x, tree)


def looks(tree, standing, name=None):
    """A key that is equal for two trees that differ in nothing but the numbers in their arrays and where the segment stands."""
    if torch.is_tensor(tree):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, dict):
        return tuple((k, looks(x, standing, k)) for k, x in tree.items() if k != "of")
    if isinstance(tree, list | tuple):
        return tuple(looks(x, standing) for x in tree)
    return tree - standing[name] if name in standing and isinstance(tree, int) else tree


def moved(tree, by, name=None):
    """The tree, the host's numbers in it moved, each by what `by` says of its name."""
    if isinstance(tree, dict):
        return {k: moved(x, by, k) for k, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [moved(x, by) for x in tree]
    return int(tree) + by[name] if name in by and isinstance(tree, int) else tree


def farther(asked, by):
    """Does attention as it was asked see the same if all stand some multiple of `by` farther?"""

    def same(rule, heads, q, k, begin, always, opening):
        if q[0] is None or k[0] is None:
            # positions are data
            return True
        first = k[0] + always
        each = set(behaviours(rule, heads))
        return begin is None and first >= opening and all(moves(rule, h, q, (first, k[0] + k[1] - first), by) for h in each)

    return all(same(*what) for what in asked)
