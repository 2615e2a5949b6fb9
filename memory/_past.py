"""What memories share that hold the closed past in another form than the open segment: small at rest, whole while its layer attends."""

import ops
from kernels.slots import best
from memory.base import Memory as Base
from memory.base import blank


class Past(Base):
    """A state holds the open segment as any other does, and under "past" what was kept before, folded: a file overrides how."""

    def sealed(self, s):
        """What the past holds of the slots of an open segment beside its own fields: field -> [B, K, N, ...]."""
        return {}

    def folded(self, t):
        """Kept slots, field -> [B, 1 or K, N, ...], as they are held."""
        return t

    def unfolded(self, past, like):
        """The inverse. like: the open segment, for types."""
        return past

    def padded(self, past):
        """With empty slots up to the most that there may be."""
        return {f: ops.cat([a, blank(f, a, self.size - a.shape[2])], 2) for f, a in past.items()}

    def start(self, segment, total):
        return {"n": 0, "first": None, "capacity": segment}

    def room(self, s, segment, n):
        return {**s, "capacity": segment}

    def attend(self, attn, q, seg, s):
        if "past" not in s:
            return super().attend(attn, q, seg, s)
        y, t = super().attend(attn, q, seg, self.whole(s))
        # what the policy noted of each slot goes back to where it came from
        n, noted = s["past"]["pos"].shape[2], [f for f in self.fields if f in s and f not in ("k", "v", "pos")]
        past = {**s["past"], **{f: t[f][:, :, :n] for f in noted}}
        here = {f: ops.cat([t[f][:, :, n:], s[f][:, :, t[f].shape[2] - n :]], 2) for f in noted}
        return y, {**t, **{f: s[f] for f in ("k", "v", "pos", "n", "first")}, **here, "past": past}

    def close(self, attn, seg, s):
        t = super().close(attn, seg, {**self.whole(s, self.sealed(self.used(s))), "capacity": 0})
        past = self.folded({f: t[f] for f in self.fields if f in t})
        open_ = {f: s[f][:, :, :0] if f in self.fields else a for f, a in t.items() if f in s or f not in self.fields}
        return self.make_room({**open_, "past": past, "n": s["n"] * 0, "first": None, "capacity": s["capacity"]})

    def leaving(self, attn, seg, s):
        """What close() does to a static state, as kernels.codes.join() takes it, who does it in place: of the slots of past and segment
        those that go, [B, 1 or K, R], and the segment's R as the past holds them."""
        whole, slots = self.whole(s), s["pos"].shape[2]
        rank = ops.where(whole["pos"] < 0, -1e30, self.rank(attn, seg, whole))
        return best(-rank, slots), self.folded({**{f: s[f] for f in self.fields if f in s}, **self.sealed(s)})

    def emptied(self, s):
        """A static state after that."""
        rest = [f for f in self.fields if f in s and f not in ("k", "v")]
        return {**s, **{f: blank(f, s[f], s[f].shape[2]) for f in rest}, "n": s["n"] * 0}

    def still(self, s):
        """A static graph has every slot of the past from the beginning."""
        s = self.make_room(s)
        one = {f: s[f][:, :, :1] for f in self.fields if f in s}
        nothing = {f: blank(f, a, 1) for f, a in {**one, **self.sealed(one)}.items()}
        return super().still({**s, "past": self.padded(s["past"] if "past" in s else self.folded(nothing)), "solid": False})

    def whole(self, s, sealed=None):
        """Past and segment as one state of the policy's, every slot in use. sealed: what the segment's slots have beside their fields."""
        used = self.used(s)
        new = {f: used[f] for f in self.fields if f in used} | (sealed or {})
        if "past" in s:
            old = self.unfolded(s["past"], used)
            new = {f: ops.cat([old[f], a], 2) for f, a in new.items()}
        return {**used, **new, "n": new["pos"].shape[2], "first": None if "past" in s else used["first"]}
