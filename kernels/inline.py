"""A rule as a Triton function: its own source, with the options written into it as constants.

    allowed(q, k, h, o): (k <= q) & (q - k < o.window)    becomes, for window=512,    allowed(q, k, h, layer): (k <= q) & (q - k < 512)

So a kernel carries no options, constants fold (a division by a power of two is a shift), and functions that a rule calls (bigbird's
link) come along. Only the layer's index stays an argument, so that all layers share one kernel. Nothing is rewritten by hand: a new
file in attention/ is a new kernel.
"""

import ast
import functools
import inspect
import linecache
import textwrap
import types

import triton
import triton.language as tl

import plugins


@functools.lru_cache(maxsize=1024)
def compiled(rule):
    """The rule of a Plugin, with its options, as a triton.jit function (q, k, h, layer) -> bool."""
    return _compiled(plugins.place(rule, layer=0))


@functools.lru_cache(maxsize=256)
def _compiled(rule):
    lines, made = [], {}
    name = written(rule, "", lines, made)
    source = "\n\n".join(lines) + "\n"
    # compilers ask Python for a function's source: this is where it looks
    path = f"<{rule} {rule.options}>"
    linecache.cache[path] = len(source), None, source.splitlines(True), path
    # the interpreter wants the language in sight
    space = {"__name__": "nanolong.rules", "tl": tl}
    exec(compile(source, path, "exec"), space)
    # in order of definition, so that each finds those that it calls
    for f in made:
        space[f] = triton.jit(space[f])
    return space[name]


def written(rule, prefix, lines, made):
    """Writes the functions of a rule into `lines`, their names into `made`; returns the name of the rule's own."""
    parts = getattr(rule.options, "parts", None)
    if parts is None:
        return folded(rule.module.allowed, rule, prefix, lines, made)
    names = [written(part, f"{prefix}p{i}_", lines, made) for i, part in enumerate(parts)]
    joined = f" {rule.module.OPERATOR} ".join(f"{n}(q, k, h, layer)" for n in names)
    lines.append(f"def {prefix}both(q, k, h, layer):\n    return {joined}")
    made[f"{prefix}both"] = None
    return f"{prefix}both"


def folded(f, rule, prefix, lines, made):
    """Writes one function of a rule's file, its last argument being the options. Returns its new name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]
    tree.name = name = prefix + f.__name__
    options = tree.args.args[-1].arg
    tree.args.args[-1].arg = "layer"
    space = vars(rule.module)
    negates = any(isinstance(x, ast.Invert | ast.Not) for x in ast.walk(tree))

    class Fold(ast.NodeTransformer):
        def visit_Attribute(self, node):
            if isinstance(node.value, ast.Name) and node.value.id == options:
                new = ast.Name("layer", ast.Load()) if node.attr == "layer" else ast.Constant(getattr(rule.options, node.attr))
                return ast.copy_location(new, node)
            return self.generic_visit(node)

        def visit_Call(self, node):
            called = space.get(node.func.id) if isinstance(node.func, ast.Name) else None
            self.generic_visit(node)
            if isinstance(called, types.FunctionType):
                if prefix + called.__name__ not in made:
                    folded(called, rule, prefix, lines, made)
                node.func.id = prefix + called.__name__
            return node

        def visit_BinOp(self, node):
            # the kernels see to causality themselves, so where it is one condition among others the rule need not
            self.generic_visit(node)
            causal = ast.unparse(node.left) == "k <= q" and isinstance(node.op, ast.BitAnd) and not negates
            return node.right if causal else node

        def visit_Name(self, node):
            if node.id == options:
                return ast.copy_location(ast.Name("layer", ast.Load()), node)
            return ast.copy_location(ast.Constant(space[node.id]), node) if isinstance(space.get(node.id), int) else node

    tree = ast.fix_missing_locations(Fold().visit(tree))
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        tree.body.pop(0)
    lines.append(ast.unparse(tree))
    made[name] = None
    return name
