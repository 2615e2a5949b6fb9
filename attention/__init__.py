"""Who may see whom (`--attn`). One file per pattern; see plugins.py for how a file becomes a flag.

A pattern is one function of integers, operators only:

    def allowed(q, k, h, o)     # positions of query and key (in their document), head index, options -> bool

It is read on numpy arrays (the oracle of the tests), on torch tensors and MLX arrays (masks), by Triton (inside the kernel)
and on intervals (block layouts), so a pattern's file imports nothing.
"""
