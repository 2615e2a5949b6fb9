"""Rules by name: a rule as a string that a node of a compiled graph can hold, where a module cannot stand."""

import dataclasses

import ops
import plugins

made = {}  # name -> rule, of those that were named or read


def named(rule):
    """The rule's name: all its options spelled out, filled-in ones too, so that no two rules share one. A compiler can follow, and
    makes another graph for another rule."""
    parts = getattr(rule.options, "parts", None)
    if parts is not None:
        return rule.module.OPERATOR.join([named(part) for part in parts])
    name = rule.name + ":" + ",".join([f"{f.name}={settled(getattr(rule.options, f.name))}" for f in dataclasses.fields(rule.options)])
    if rule.module.__name__ != f"attention.{rule.name}":
        # made by hand: nothing can be read from its name, so it must have been named outside of a compiled graph
        name = f"{name}@{id(rule.module)}"
    if not ops.tracing() and name not in made:
        made[name] = rule
    return name


def settled(x):
    """The number itself, where a compiler would like it to vary: the length of a range must be known."""
    return len(range(x)) - len(range(-x)) if type(x) is int else x


def rule_of(name):
    """The rule of that name, a Plugin: it need not have been named in this process."""
    if name not in made:
        made[name] = read(name)
    return made[name]


def read(name):
    for operator in "|&":
        if operator in name:
            return plugins.join(operator, [rule_of(part) for part in name.split(operator)])
    kind, _, rest = name.partition(":")
    module = plugins.load("attention", kind)
    fields = {f.name: f for f in dataclasses.fields(module.Options)}
    given = (item.split("=", 1) for item in rest.split(",") if item)
    options = module.Options(**{key: plugins.convert("--attn", kind, fields[key], text) for key, text in given})
    return plugins.Plugin(kind, module, options)
