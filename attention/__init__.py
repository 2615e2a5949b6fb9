"""Who may see whom (`--attn`). One file per pattern; see plugins.py for how a file becomes a flag.

A pattern is one function of integers, operators only:

    def allowed(q, k, h, o)     # positions of query and key (in their document), head index, options -> bool

It is read on numpy arrays (the oracle of the tests), on torch tensors and MLX arrays (masks), by Triton (inside the kernel)
and on intervals (block layouts, kernels/spans.py), so a pattern's file imports nothing; what it reckons stays below 2^31 at
positions up to 2^22, and divisors are positive. It may call functions of its own file. Besides `Options` and `check(o)`, a file may
say TRAINING_ONLY = True, or LINKS: that some links are random and how to list them (bigbird.py).

Patterns are joined in the flag, "|" for or, "&" for and: --attn "longformer:window=1|dilated". A joined pattern is a Plugin like any
other; its module (_either.py, _both.py) has an OPERATOR, its options have `parts`.

What is more than a rule of positions brings a `class Pattern(Memory)` instead, or beside it (PATTERN, see longformer.py): it is mixed
into the class of the layer's memory, so it overrides what it needs of memory/base.py: `attend`, `write`, `fields`. It is given
its Plugin, names the `memories` that it works with if these are not all, may have parameters (`initial`: their first values), and may learn
them without gradients (`observes`, `learn`). routing.py is one.

    python -m attention longformer:window=512 --length 4096     # draws a pattern
"""
