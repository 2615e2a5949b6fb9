"""Compressive Transformer (Rae et al. 2019, arXiv:1911.05507): what leaves Transformer-XL's memory is squeezed, `rate` tokens into one.

    m' = the last `length` layer inputs,   cm' = the last `compressed` of [cm ; f_c(what left m)]
    L_attn = sum over layers of || attn(h, old) - attn(h, f_c(old)) ||^2        (algorithm 2, attention-reconstruction)

f_c is one of compress=mean, max, conv (a convolution of kernel and stride `rate`), dilated (as many taps, every second token, so that
neighbouring groups overlap) or used (of each group the token that was looked at most). A convolution learns from L_attn alone: content
without positions, h, the old memories and the layer's weights as they are; the language model's loss does not reach it, nor L_attn
anything else. It begins as the mean. Remembered inputs are without gradient, as in xl.py, and projected anew in training.

A squeezed memory stands where its group's last token stood. Groups are counted from the newest token that leaves; an oldest, incomplete
group has zeros before it. The paper keeps the most used of all that leave; here it is one of each group, whatever segments look like.
As in _beside.py a gate keeps squeezed memories out of a trained model at first; closed=false is the paper's model.
"""

import numpy as np

import ops
from memory import _beside
from memory._beside import Beside
from memory._pruned import Pruned
from memory.base import blank
from memory.xl import Memory as XL

COMPRESS = ("mean", "max", "conv", "dilated", "used")


class Options:
    length: int = 512  # tokens kept as they are
    compressed: int = 512  # squeezed memories kept
    rate: int = 4  # tokens in one of them
    compress: str = "conv"
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0


def check(o):
    _beside.check(o)
    if min(o.length, o.compressed, o.rate) < 1:
        raise ValueError(f"length={o.length}, compressed={o.compressed}, rate={o.rate}: each must be at least 1")
    if o.compress not in COMPRESS:
        raise ValueError(f"compress={o.compress} is not known: choose one of {', '.join(COMPRESS)}")


class Memory(Beside, XL):
    moves = True

    def __init__(self, c, o):
        super().__init__(c, o)
        if o.compress in ("conv", "dilated"):
            self.squeeze = ops.Linear(o.rate * c.hidden_size, c.hidden_size)

    def initial(self, attn, name):
        if name != "squeeze.weight":
            return super().initial(attn, name)
        return ops.array(np.tile(np.eye(self.c.hidden_size, dtype="float32") / self.o.rate, self.o.rate))

    @property
    def fields(self):
        fields = super().fields if self.learning else (*super().fields, "x")
        return (*fields, "mass") if self.o.compress == "used" else fields

    def pack(self, attn, x, seg):
        mass = {"mass": ops.full((x.shape[0], 1, x.shape[1]), 0.0, ops.float32, x)} if self.o.compress == "used" else {}
        return {**super().pack(attn, x, seg), "x": x[:, None], **mass}

    def attend(self, attn, q, seg, s):
        y, s = super().attend(attn, q, seg, s)
        if self.o.compress != "used":
            return y, s
        k, _, slots = self.seen(attn, q, seg, s)
        mass = Pruned.total(self, attn, seg, seg.queries(q), k, slots, seg.at, seg.begin).sum(1)[:, None]
        N = mass.shape[2]
        return y, {**s, "mass": ops.cat([s["mass"][:, :, :N] + mass, s["mass"][:, :, N:]], 2)}

    def aside(self, attn, q, seg, side, felt=True):
        side = self.standing(attn, side["x"][:, 0], seg, side["pos"]) if "x" in side else side
        return super().aside(attn, q, seg, side, felt)

    def close(self, attn, seg, s):
        now = self.used(s)
        if seg.begin is not None:
            now = {**now, "pos": ops.where(now["pos"] < seg.begin[..., -1:], -1, now["pos"])}
        leave = now["pos"].shape[2] - self.size
        if leave > 0:
            slots = ops.expand(ops.arange(now["pos"].shape[2], now["pos"])[None, None], now["pos"].shape)
            # the oldest, behind slots that are empty
            oldest = ops.sort_by(now["pos"], slots)[:, :, :leave]
            old = {f: self.grouped(ops.take(now[f], oldest), -1 if f == "pos" else 0) for f in ("x", "pos", "mass") if f in now}
            old["x"] = ops.stop(old["x"])
            new, pos = self.squeezed(old), ops.amax(old["pos"], -1)[..., 0]
            if self.learning and hasattr(self, "squeeze"):
                s = {**s, "aux": self.loss(attn, ops.stop(now["x"][:, 0, -seg.at.at.shape[2] :]), old, new, pos)}
            s = {**s, "side": self.queue(attn, seg, s.get("side"), ops.stop(new), pos)}
        return super().close(attn, seg, s)

    def grouped(self, a, fill):
        """[B, 1, n, ...] -> [B, 1, groups, rate, ...], filled up before the first."""
        short = -a.shape[2] % self.o.rate
        if short:
            a = ops.cat([ops.full((*a.shape[:2], short, *a.shape[3:]), fill, a.dtype, a), a], 2)
        return a.reshape(*a.shape[:2], -1, self.o.rate, *a.shape[3:])

    def squeezed(self, old):
        """f_c: [B, 1, groups, rate, C] -> [B, groups, C]."""
        x, live, kind = old["x"][:, 0], (old["pos"][:, 0] >= 0)[..., None], self.o.compress
        x, n = ops.where(live, x, 0.0), ops.cast(live, x.dtype).sum(2)
        if kind == "mean":
            return x.sum(2) / ops.where(n > 0, n, 1.0)
        if kind == "max":
            return ops.amax(ops.where(live | (n == 0)[:, :, None], x, -1e30), 2)[:, :, 0]
        if kind == "used":
            mass = ops.where(live[..., 0], old["mass"][:, 0], -1.0)
            most = ops.cast(mass >= ops.amax(mass, 2), x.dtype)[..., None]
            return (x * most).sum(2) / most.sum(2)
        if kind == "dilated":
            # every second token of this group and the one before it
            before = ops.cat([x[:, :1] * 0, x[:, :-1]], 1)
            x = ops.cat([before, x], 2)[:, :, 1::2]
        return self.squeeze(x.reshape(*x.shape[:2], -1))

    def loss(self, attn, h, old, new, pos):
        """|| attn(h, old) - attn(h, new) ||^2 in the mean over rows, heads, queries and channels; old in groups, new [B, groups, C]."""
        frozen = lambda proj, x: attn.heads(ops.cast(x, ops.float32) @ ops.swap(ops.cast(ops.stop(proj.matrix()), ops.float32), 0, 1))
        q, live = frozen(attn.q_proj, h), (old["pos"].reshape(h.shape[0], 1, 1, -1) >= 0, (pos >= 0)[:, :, None])

        def look(m, live):
            k, v = (ops.repeat(frozen(proj, m), attn.H // attn.K, 1) for proj in (attn.k_proj, attn.v_proj))
            return ops.softmax(ops.where(live, q @ ops.swap(k, 2, 3) * attn.D**-0.5, -1e30), -1) @ v

        off = look(old["x"].reshape(h.shape[0], -1, h.shape[2]), live[0]) - look(new, live[1])
        # rows from which nothing leaves have nothing to say
        return (off * off * ops.cast(ops.amax(live[1], -1), ops.float32)).mean()

    def queue(self, attn, seg, side, new, pos):
        """The newest of what was squeezed before, and new [B, groups, C] at pos [B, 1, groups]."""
        new = {"x": new[:, None], "pos": pos} if self.learning else self.standing(attn, new, seg, pos)
        if side is None:
            side = {f: blank(f, a, self.o.compressed) for f, a in new.items()}
        both = {f: ops.cat([side[f], a], 2) for f, a in new.items()}
        slots = ops.expand(ops.arange(both["pos"].shape[2], pos)[None, None], both["pos"].shape)
        newest = ops.sort_by(both["pos"], slots)[:, :, -self.o.compressed :]
        return {f: ops.take(a, newest) for f, a in both.items()}

    def still(self, s):
        return super().still(self.with_side(s, self.o.compressed))
