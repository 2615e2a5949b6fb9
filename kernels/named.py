"""Rules by name: a rule as a string that a node of a compiled graph can hold, where a module cannot stand."""

import dataclasses

import ops
import plugins

made = {}  # name -> rule, of those that were named or read


def named(rule):
    """The rule's name: all its options spelled out, filled-in ones too, so that no two rules share one. A compiler can follow."""
    name = f"{rule.name}:" + ",".join([f"{f.name}={getattr(rule.options, f.name)}" for f in dataclasses.fields(rule.options)])
    if rule.module.__name__ != f"attention.{rule.name}":
        # made by hand: nothing can be read from its name, so it must have been named outside of a compiled graph
        name = f"{name}@{id(rule.module)}"
    if not ops.tracing() and name not in made:
        made[name] = rule
    return name


def rule_of(name):
    """The rule of that name, a Plugin: it need not have been named in this process."""
    if name not in made:
        kind, _, rest = name.partition(":")
        module = plugins.load("attention", kind)
        fields = {f.name: f for f in dataclasses.fields(module.Options)}
        given = (item.split("=", 1) for item in rest.split(",") if item)
        options = module.Options(**{key: plugins.convert("--attn", kind, fields[key], text) for key, text in given})
        made[name] = plugins.Plugin(kind, module, options)
    return made[name]
