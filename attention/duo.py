"""DuoAttention (Xiao et al. 2024, arXiv:2410.10819): some heads see everything, to retrieve; the others see the first tokens and
a window, to stream.

The paper learns which heads retrieve; here they are the first ones of each layer. All query heads of a key head are of one
kind, so that the streaming key heads may forget.
"""


class Options:
    full: int = 50  # percent of the heads that see everything
    window: int = 1024  # tokens seen by the others, the token itself included
    sinks: int = 64  # the document's first tokens, seen by all
    n_head: int = 2
    n_kv_head: int = 2


def allowed(q, k, h, o):
    key_head = h * o.n_kv_head // o.n_head
    return (k <= q) & ((key_head * 100 < o.full * o.n_kv_head) | (q - k < o.window) | (k < o.sinks))


def check(o):
    if not 0 <= o.full <= 100:
        raise ValueError(f"full={o.full} is no percentage: it must lie between 0 and 100")
    if o.window < 1 or o.sinks < 0:
        raise ValueError(f"window={o.window}, sinks={o.sinks}: window must be at least 1 and sinks at least 0")
