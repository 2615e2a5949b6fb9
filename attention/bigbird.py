"""BigBird (Zaheer et al. 2020, arXiv:2007.14062), causal: a window of blocks, the first blocks, and random earlier blocks.

The random links of a block depend on the layer, the head and the block alone, never on the length of the text, so decoding
token by token sees what training saw. They are drawn from all blocks up to the query's own; one that falls into the window or
on the first blocks adds nothing, which is rare where links matter.
"""


class Options:
    block: int = 64  # tokens in a block
    window: int = 3  # blocks seen, the token's own included
    n_global: int = 2  # the document's first blocks, seen by all after them
    n_random: int = 3  # random blocks of the past, for each block and head
    seed: int = 0
    layer: int = 0


# block layouts list the links instead of searching for them: n_random blocks of length block, found by link()
LINKS = ("block", "n_random")


def allowed(q, k, h, o):
    i, j = q // o.block, k // o.block
    see = (i - j < o.window) | (j < o.n_global)
    for t in range(o.n_random):
        see = see | (j == link(i, h, t, o))
    return (k <= q) & see


def link(i, h, t, o):
    """The block that the t-th link of block i leads to: a hash below 2^30, made of squares modulo primes below 2^15."""
    c = h * 977 + t * 131 + o.layer * 3571 + o.seed * 7919
    x = (i + c) % 32749
    y = (x * x + c) % 32719
    z = (y * y + x) % 32749
    # the modulus 2^22 only keeps padding, which stands before block 0, from dividing by zero
    return (y * 32768 + z) % (i % 4194304 + 1)


def check(o):
    if o.block < 1 or o.window < 1 or o.n_global < 0 or o.n_random < 0:
        raise ValueError(
            f"block={o.block}, window={o.window}, n_global={o.n_global}, n_random={o.n_random}: "
            "block and window must be at least 1, n_global and n_random at least 0"
        )
    if not 0 <= o.seed < 1 << 16:
        raise ValueError(f"seed={o.seed}: it must lie between 0 and 65535")
