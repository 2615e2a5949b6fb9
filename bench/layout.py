"""Milliseconds to find the blocks of each pattern, on one core of the CPU.

python bench/layout.py --lengths 128k,1m,4m
"""

import argparse

import common


def main():
    import plugins
    from cli import whole
    from kernels import layout as layouts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128k,1m", type=lambda text: [whole(part) for part in text.split(",")])
    parser.add_argument("--patterns", nargs="+", default=["window:window=4096", "longformer:window=4096", "local:block=4096", "bigbird"])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--name", default="layout")
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for spec in args.patterns:
        rule = plugins.place(plugins.parse("attention", spec), layer=0, n_layer=1, n_head=32, n_kv_head=8)
        for n in args.lengths:

            def find(rule=rule, n=n):
                # what was found before is remembered
                layouts.recent.clear()
                return layouts.layout(rule, (0, n), (0, n), args.block)

            found = find()
            rows.append({"pattern": spec, "length": n, "ms": round(common.seconds(find) * 1e3, 1), "blocks": found.partial + found.full})
    common.save(args.name, {"block": args.block, "layouts": rows}, args.out)


if __name__ == "__main__":
    main()
