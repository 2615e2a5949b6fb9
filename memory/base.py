"""What one layer remembers: slots, each with a position (-1: empty). Read with the segment, forgotten only when it closes.

A layer's state is a dict that is passed in and handed back:
    k, v      [B, K, N, D]  what the slots hold (a policy may hold other fields). Keys are turned to their positions already, unless the
              position scheme is `late` or the policy says `unturned`: then they wait as they are, and are turned as they are seen
    pos       [B, 1, N], or [B, K, N] where heads remember different tokens
    n         slots in use, the rest being room: an int while the host knows it, an array inside a static graph
    first     the position of slot 0 if the slots in use are consecutive and the host knows it, else None; the `always` leading slots
              count as standing right before the others: where they really stand matters to nobody but documents and biases
    solid     does the host know that no slot in use is empty, and that they stand in order of position? (not there: nothing was written)
    ahead     if it is there: empty slots have their pos already, slot i that of the token to be written there, ahead + i (see foreseen)
    capacity  slots to allocate, an int: what survives a close and the longest segment that comes piece by piece
Symbols: B rows, T tokens of this call, K key heads, N slots, D head width.
"""

import functools
from types import MappingProxyType

import numpy as np

import ops
import plugins
from kernels import Places, attend
from kernels.slots import kept
from ops import Module


class Memory(Module):
    """The policy of one layer. c: Config; o: the policy's Options. A file usually overrides `size` and `rank`, or pack/unpack."""

    size = None  # slots that survive a close; None: all of them. What follows from a budget is a property: see settle()
    always = 0  # that many leading slots are exempt from the attention pattern,
    opening = 0  # and so are the first so many tokens of each document
    slides = False  # does closing always keep the `always` leading slots and the newest, each as it was written?
    moves = False  # in training, are the host's numbers the same farther on? Not inherited: each class says it (kernels/replayed.py)
    ordered = False  # must what stays be in order of position, in a static graph too?
    heads_differ = False  # does each key head remember tokens of its own?
    fields = ("k", "v", "pos")  # what a slot holds
    beside = MappingProxyType({})  # fields that write() adds to those of pack(): name -> "at" (the token's position), or a first float32
    tally = None  # the field in which attend() sums up the attention weights of each slot, if that is all it does beside attention
    cuts = False  # does closing stop the gradient?
    whole_rows = False  # does training need a whole row at once?
    observes = False  # are some parameters learned from what is seen in training, not by gradients? Then see learn()
    learning = False  # does the model train?
    segment = None  # tokens of the segments that it is made for, if it says so
    unturned = False  # do keys wait unturned under any position scheme?
    parts_heads = False  # does it treat heads differently, so that a pattern may not?
    looks = True  # does attend() see by look()? Else nothing can stand beside the slots

    def __init__(self, c, o):
        super().__init__()
        self.c, self.o, self.given = c, o, o

    def settle(self, read):
        """A budget that is a share of a text becomes tokens, the text having `read` of them."""
        self.o = plugins.in_tokens(self.given, read)

    # the policy: what is stored of a token, its inverse, and which slots outlive the segment

    def pack(self, attn, x, seg):
        """What to store of the segment's tokens: field -> [B, K, T, ...]. x [B, T, C] is the layer's normed input."""
        k, v = attn.kv(x)
        return {"k": k if self.late(seg) else seg.keys(k), "v": v}

    def unpack(self, attn, s):
        """k, v [B, K, N, D] of every slot, keys as pack() has them."""
        return s["k"], s["v"]

    def rank(self, attn, seg, s):
        """[B, 1 or K, N]: the `size` slots of highest rank stay. Default: the newest."""
        return ops.cast(s["pos"], ops.float32)

    # the moments: start, write, attend, close, and leave, behind the block

    def start(self, segment, total):
        """Nothing remembered yet. segment: the most tokens that come between closes; total: the most that come at all."""
        return {"n": 0, "first": None, "capacity": total if self.size is None else self.size + segment}

    def write(self, attn, x, seg, s):
        """The segment joins the slots: in place where there is room, else by concatenation."""
        new, (B, T), n, at = self.pack(attn, x, seg), x.shape[:2], s["n"], seg.at.at
        room, ahead = self.foreseen(seg, s, T)
        if room > T:
            at, s = seg.at.first + ops.arange(room, at)[None, None], {**s, "ahead": ahead}
        if room:
            heads = new["k"].shape[1] if self.heads_differ else 1
            new["pos"] = ops.expand(at, (B, heads, room))
        for f, what in self.beside.items():
            if what != "at":
                new[f] = ops.full(new["v"].shape[:3], what, ops.float32, x)
            elif room:
                new[f] = ops.expand(at, (B, 1, room))
        consecutive = isinstance(n, int) and (n == 0 or (s["first"] is not None and seg.at.first == s["first"] + n))
        first = (s["first"] if n else seg.at.first) if consecutive else None
        solid = s.get("solid", True) and seg.at.first is not None
        return {**self.put(s, new, n), "n": ops.advance(n, T), "first": first, "solid": solid}

    def foreseen(self, seg, s, T):
        """For how many slots `pos` is written as T tokens are, and the state's `ahead` then. T, their own; but where tokens come singly
        and each follows the one before, at the first of them all of the room (one write, not one a token), and then 0."""
        if T > 1 or not isinstance(s["n"], int) or seg.at.first is None or "pos" not in s or not foresees(type(self)):
            return T, None
        room, ahead = s["pos"].shape[2] - s["n"], seg.at.first - s["n"]
        return (0 if room and s.get("ahead") == ahead else max(room, 1)), ahead

    def put(self, s, new, n):
        """The state with fields of T more tokens, [B, K, T, ...], behind n slots in use: in place where there is room, else by
        concatenation."""
        s = {**s}
        for f, a in new.items():
            T = a.shape[2]
            if f not in s and s["capacity"] > T:
                s[f] = blank(f, a, s["capacity"])
            if f not in s:
                s[f] = a
            elif not isinstance(n, int) or n + T <= s[f].shape[2]:
                s[f] = ops.put(s[f], a, n)
            else:
                s[f] = ops.cat([s[f][:, :, :n], a], 2)
        return s

    def attend(self, attn, q, seg, s):
        """Past and present are one array of slots. q [B, H, T, D], not yet turned -> [B, H, T, D], state."""
        return self.look(attn, q, *self.seen(attn, q, seg, s), seg, s), s

    def look(self, attn, q, k, v, slots, seg, s, lse=False):
        """Attention of queries, not yet turned, over what seen() gives -> [B, H, T, D], and with lse its log-sum-exp (see attend)."""
        return attend(seg.queries(q), k, v, seg.at, slots, attn.rule, seg.begin, **self.how(seg), lse=lse)

    def seen(self, attn, q, seg, s):
        """Keys and values of the slots in use, as attend() takes them, and their Places."""
        used = self.used(s)
        k, v = self.unpack(attn, used)
        if self.late(seg):
            # a text's first segment sees itself alone
            k = seg.keys(k, None if isinstance(s["n"], int) and s["n"] == q.shape[2] else used["pos"])
        return k, v, Places(used["pos"], self.row(seg, used), s.get("solid", False) and isinstance(s["n"], int))

    def row(self, seg, s):
        """The position of slot 0 if attention may take the slots in use for consecutive ones, else None."""
        return s["first"]

    def how(self, seg):
        """What attend() is told beside the rule."""
        scale = seg.position.temperature * self.c.head_dim**-0.5
        return {"always": self.always, "opening": self.opening, "scale": scale, "bias": seg.bias}

    def close(self, attn, seg, s):
        """The segment ends: what is over the size is forgotten, and there is room for the next segment behind what stays."""
        s = self.unforeseen(s)
        if self.size is not None and s["pos"].shape[2] > self.enough:
            if seg.begin is not None:
                # a finished document frees its slots
                s = {**s, "pos": ops.where(s["pos"] < seg.begin[..., -1:], -1, s["pos"]), "solid": False}
            s = self.forget(attn, seg, s)
        return self.make_room(s)

    def leave(self, block, x, seg, s):
        """What the block made of the segment's tokens, [B, T, C], on its way to the next one, and the state."""
        return x, s

    def forget(self, attn, seg, s):
        """The best `size` slots first."""
        N = s["pos"].shape[2]
        size = min(self.size, N)
        if self.slides and s["first"] is not None and seg.begin is None:
            # the host knows which: slices, of which the gradient is a copy
            stay = lambda a: ops.cat([a[:, :, : self.always], a[:, :, N - size + self.always :]], 2)
            return {**s, **{f: stay(s[f]) for f in self.fields if f in s}, "n": size, "first": s["first"] + N - size}
        rank = ops.where(s["pos"] < 0, -1e30, self.rank(attn, seg, s))
        n = size if isinstance(s["n"], int) else ops.minimum(s["n"], size)
        s = kept(rank, s, [f for f in self.fields if f in s], size, self.ordered)
        return {**s, "n": n, "first": None}

    def moving(self, s):
        """The inverse of still, where all rows are alike."""
        s = {**s, "n": ops.host(s["n"])}
        if not self.size or not s.get("solid", False):
            return s
        # a static close leaves slots where they are, those of which some stay
        used, fields = self.used(s), [f for f in self.fields if f in s]
        rank = ops.cast(used["pos"], ops.float32)
        return self.make_room({**kept(rank, {**used, "solid": False}, fields, s["n"]), "solid": True})

    def room(self, s, segment, n):
        """The state with capacity for n more tokens, of which `segment` come between closes."""
        return {**s, "capacity": self.size + segment if self.size is not None else max(s["capacity"], s["n"] + n)}

    def packed(self, s):
        """The state without the room that nothing bounds."""
        return self.used(s) if self.size is None else self.make_room(self.unforeseen(s)) if "ahead" in s else s

    def cut(self, s, n):
        """The state, as a call left it, as it was after the text's first n tokens; None where what was forgotten cannot come back."""
        return self.used({**s, "n": n}) if self.size is None else None

    def gone(self, s, later):
        """What of a state the one at the next boundary, `later`, does not have: where memory slides, all but the newest slots."""
        n = self.shared(s, later)
        return {**s, **{f: ops.copy(s[f][:, :, : s["n"] - n]) for f in self.fields if f in s}, "elsewhere": n} if n else s

    def again(self, s, later):
        """The inverse: gone(s, later), later -> s."""
        n, rest = s.get("elsewhere", 0), {f: a for f, a in s.items() if f != "elsewhere"}
        newest = lambda f: later[f][:, :, self.always : self.always + n]
        return {**rest, **{f: ops.cat([s[f], newest(f)], 2) for f in self.fields if f in s}} if n else rest

    def shared(self, s, later):
        """How many of a state's newest slots stand in a later state too, behind the `always` leading ones."""
        known = self.slides and s.get("first") is not None and later.get("first") is not None and s["n"] == s["pos"].shape[2]
        return max(0, s["first"] + s["n"] - later["first"] - self.always) if known else 0

    def stays(self, n):
        """Which of a text's first n tokens are remembered after them for sure, bool [n]; None where the text itself decides."""
        return np.arange(n) >= n - (n if self.size is None else self.size)

    def still(self, s):
        """The same state for a static graph: every slot allocated, and counters that the graph can hold."""
        return {**self.make_room(self.unforeseen(s) if "ahead" in s else s), "n": ops.scalar(s["n"]), "first": None}

    @property
    def grows(self):
        """Does every token take a slot for good?"""
        return self.size is None

    @property
    def forgets(self):
        """Does closing a segment change anything?"""
        return self.size is not None

    @property
    def enough(self):
        """Closing forgets only where there are more slots than this in use."""
        return self.size

    # parameters of a memory's own

    def initial(self, attn, name):
        """The array that the parameter of this name begins with; None: random, as any other."""

    def learn(self, seen):
        """Where `observes`: learn from what a step has seen, the sum over its rows of what `attend` left in the state as "seen"."""

    # helpers

    def late(self, seg):
        """Are keys remembered unturned?"""
        return self.unturned or seg.position.late

    def used(self, s):
        """The slots in use; all slots where the host does not know (inside a static graph: the others are empty)."""
        n = s["n"]
        return {**s, **{f: s[f][:, :, :n] for f in self.fields if f in s}} if isinstance(n, int) and n < s["pos"].shape[2] else s

    def unforeseen(self, s):
        """The slots in use, and no word of those to come."""
        return {k: a for k, a in self.used(s).items() if k != "ahead"}

    def make_room(self, s):
        """Empty slots behind those in use, up to the capacity."""
        short = s["capacity"] - s["pos"].shape[2]
        return {**s, **{f: ops.cat([s[f], blank(f, s[f], short)], 2) for f in self.fields if f in s}} if short > 0 else s


@functools.cache
def foresees(kind):
    """Has this class the base's own methods wherever slots that are not in use could be seen, so that their `pos` may be set early?"""
    return all(getattr(kind, f) is getattr(Memory, f) for f in ("write", "put", "attend", "look", "seen", "used", "close", "make_room"))


def blank(field, like, n):
    """n empty slots for a field, shaped and typed like an array of it."""
    return ops.full((*like.shape[:2], n, *like.shape[3:]), -1 if field in ("pos", "born", "cluster", "q_at") else 0, like.dtype, like)
