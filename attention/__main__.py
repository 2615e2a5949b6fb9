"""Draw a pattern: python -m attention longformer:window=512,n_global=16 --length 4096

In the terminal, and with --out as a PNG (needs matplotlib). With --all, every pattern of positions in this folder in one picture;
what routing sees depends on the text, so it has none. Joined patterns stand in quotes: "window:window=64|strided:stride=32"
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

import errors
import plugins
from cli import whole
from errors import Refused
from kernels.layout import layout
from kernels.spans import FAR

COLUMNS = 64  # of the terminal
LIMIT = 1 << 18  # tokens of a drawn pattern
# small enough for the structure to show at 256 tokens
SHOWN = {
    "full": "full",
    "window": "window:window=48",
    "local": "local:block=48",
    "longformer": "longformer:window=32,n_global=12",
    "dilated": "dilated:window=16,dilation=4",
    "strided": "strided:window=24,stride=24",
    "bigbird": "bigbird:block=12,window=2,n_global=1,n_random=2",
    "s2": "s2:group=64",
    "duo": "duo:window=32,sinks=8",
    # two of them joined
    "strided|local": "strided:window=1,stride=24|local:block=48",
}


def parser():
    p = argparse.ArgumentParser(prog="python -m attention", description=__doc__.split("\n")[0])
    p.add_argument("pattern", nargs="?", metavar="SPEC", help=f"{', '.join(rules())}; options as name:key=value,key=value")
    p.add_argument("--all", action="store_true", help="every pattern, in one picture")
    p.add_argument("--length", type=whole, help="tokens (default 4096; with --all 256)")
    p.add_argument("--block", type=whole, default=64, help="tokens in a block (default 64)")
    p.add_argument("--head", type=whole, default=0, help="which head (default 0)")
    p.add_argument("--heads", type=whole, default=4, help="how many query and key heads there are (default 4)")
    p.add_argument("--layer", type=whole, default=0, help="which layer (default 0)")
    p.add_argument("--out", metavar="FILE.png", help="draw into this file")
    return p


def rules():
    """The mechanisms of this folder that are patterns of positions."""
    return [name for name in plugins.names("attention") if hasattr(plugins.load("attention", name), "allowed")]


def main(argv=None):
    args = parser().parse_args(argv)
    if args.all == bool(args.pattern):
        raise Refused("name one pattern, or give --all: python -m attention longformer:window=512 --length 4096")
    if args.all and not args.out:
        raise Refused("--all draws one picture of all patterns: say where with --out patterns.png")
    if args.out and not args.out.lower().endswith(".png"):
        raise Refused(f"--out {args.out} is no PNG: give a name that ends in .png")
    length = args.length if args.length is not None else 256 if args.all else 4096
    if not 1 <= length <= (1024 if args.all else LIMIT):
        raise Refused(f"--length {length} cannot be drawn: give 1 to {1024 if args.all else LIMIT}")
    if not 1 <= args.block <= FAR or args.layer < 0 or not 0 <= args.head < args.heads:
        raise Refused("--block must be at least 1, --layer at least 0, and --head less than --heads")
    if args.all:
        return gallery(args.out, length)
    rule = plugins.parse("attention", args.pattern)
    if not hasattr(rule.module, "allowed"):
        raise Refused(f"{rule.name} is not a pattern of positions, so there is nothing to draw: choose one of {', '.join(rules())}")
    rule = plugins.place(rule, layer=args.layer, n_layer=args.layer + 1, n_head=args.heads, n_kv_head=args.heads)
    found = layout(rule, (0, length), (0, length), args.block, head=args.head)
    print(text(found))
    print(numbers(rule, found, length, args.head))
    if args.out:
        one(args.out, rule, found, length, args.head)


# in the terminal


def text(found):
    """The blocks as characters: full █, partial ▒, empty ·; several blocks a character where there are more than COLUMNS."""
    grid = blocks(found)
    n = math.ceil(len(grid) / COLUMNS)
    lines = []
    for i in range(0, len(grid), n):
        parts = [grid[i : i + n, j : j + n] for j in range(0, i + n, n) if j < len(grid)]
        lines.append("".join("·" if not p.any() else "█" if (p == 2).all() else "▒" for p in parts))
    each = f"{found.block[0]} x {found.block[1]} tokens" if n == 1 else f"{n} x {n} blocks of {found.block[0]} x {found.block[1]} tokens"
    return "\n".join(lines) + f"\n█ full  ▒ partial  · empty; a character is {each}"


def blocks(found):
    """The layout as an array [query blocks, key blocks]: 0 empty, 1 partial, 2 full."""
    grid = np.zeros(found.shape, np.int8)
    grid[found.pairs >> 32, found.pairs & (1 << 31) - 1] = 1 + (found.pairs >> 31 & 1)
    return grid


def seen(rule, length, head, rows=slice(None)):
    """The pattern itself, bool [rows, length]."""
    at = np.arange(length)
    return np.broadcast_to(rule.module.allowed(at[rows, None], at, head, rule.options), (len(at[rows]), length))


def numbers(rule, found, length, head):
    """Density, blocks and work, as lines of text."""
    pairs = sum(int(seen(rule, length, head, slice(i, i + 256)).sum()) for i in range(0, length, 256))
    causal, size = length * (length + 1) // 2, found.block[0] * found.block[1]
    n = found.shape[0]
    visited, whole = (found.full + found.partial) * size, n * (n + 1) // 2 * size
    return (
        f"{rule}, {length} tokens, head {head}\n"
        f"density  {pairs / causal:.2%} of the pairs that full causal attention sees ({pairs / length:.0f} keys a query)\n"
        f"blocks   {found.full} full, {found.partial} partial, {n * found.shape[1] - found.full - found.partial} empty\n"
        f"work     {visited / whole:.2%} of the flops of full causal attention in such blocks, {whole / visited:.1f} times less"
    )


# as a picture


def pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Refused("a picture needs matplotlib: pip install matplotlib, or leave out --out") from None
    return plt


PAPER, INK, FUTURE, EMPTY = "#ffffff", "#30363d", "#f6f7f9", "#e4e8ee"
BOTH, FIRST, LAST = "#4c78a8", "#9ab8d6", "#e0a458"  # seen by all heads, by the first head only, by the last only


def colours(*names):
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(n) for n in names])


def picture(first, last):
    """What the first and the last head see, two masks [n, n] -> pixels [n, n, 3]."""
    background = np.where(np.tri(len(first), dtype=bool)[..., None], *colours(EMPTY, FUTURE))
    kinds = [(first & last)[..., None], (first & ~last)[..., None], (last & ~first)[..., None]]
    return np.select(kinds, list(colours(BOTH, FIRST, LAST)), background)


def save(figure, path):
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor=PAPER)
    except OSError as no:
        raise Refused(f"--out {path} cannot be written: {no.strerror}") from None
    print(f"drawn into {path}", file=sys.stderr)


def one(path, rule, found, length, head):
    """One pattern: every token up to 1024 of them, else every block, the partial ones lighter."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 5.2), dpi=120, layout="constrained")
    if length <= 1024:
        see = seen(rule, length, head)
        image = picture(see, see)
    else:
        full, partial = (blocks(found) == kind for kind in (2, 1))
        image = picture(full | partial, full)
    axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest" if len(image) <= 500 else "antialiased")
    axes.set_title(str(rule), fontsize=10, color=INK)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.tick_params(labelsize=8, colors=INK)
    save(figure, path)
    plt.close(figure)


def gallery(path, length):
    """All patterns, token by token, for the first and the last of four heads."""
    plt = pyplot()
    names = [*SHOWN, *(name for name in rules() if name not in SHOWN)]
    columns = min(5, len(names))
    figure, axes = plt.subplots(
        math.ceil(len(names) / columns), columns, figsize=(2 * columns, 0.3 + 2.25 * math.ceil(len(names) / columns)), dpi=144
    )
    for ax in np.ravel(axes):
        ax.axis("off")
    for ax, name in zip(np.ravel(axes), names):
        rule = plugins.place(plugins.parse("attention", SHOWN.get(name, name)), layer=0, n_layer=1, n_head=4, n_kv_head=4)
        ax.imshow(picture(seen(rule, length, 0), seen(rule, length, 3)), interpolation="nearest")
        ax.set_title(name, fontsize=10, color=INK, family="monospace")
    patches = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (BOTH, FIRST, LAST)]
    said = ["seen by every head", "by the first heads only", "by the last heads only"]
    figure.legend(patches, said, loc="lower right", ncols=3, frameon=False, fontsize=9, labelcolor=INK, handlelength=1, handleheight=1)
    figure.subplots_adjust(0.01, 0.07, 0.99, 0.94, 0.06, 0.16)
    save(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    errors.main(main)
