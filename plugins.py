"""Mechanisms by file name: the folder is the question, the file is the answer, and the file's name is the flag's value.

    name:key=value,key=value          one mechanism with options
    a/b:key=value/b                   a pattern, tiled over the layers
    a:key=value|b&c                   attention patterns joined: or, and; & binds tighter (in a shell, put it in quotes)

A mechanism's file may hold a plain `class Options` of annotated defaults; here it becomes a frozen dataclass, and it is
all that the parser needs, so a new option or a new file needs no other edit. A `budget` may also be given as a share of a text, as in
budget=0.25: a float until model.start() knows how long the text is, tokens from then on. Four fields are filled in by the model when
a mechanism declares them: `layer` (the layer's index), `n_layer`, and how many query and key heads there are.
"""

import dataclasses
import functools
import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from errors import Refused

ROOT = Path(__file__).parent
FOLDERS = {"attention": "--attn", "positions": "--pos", "memory": "--memory", "adapters": "--adapter"}
FILLED_IN = ("layer", "n_layer", "n_head", "n_kv_head")
FAR = 1 << 22  # no text is longer
# the modules of joined patterns; the loosest operator first
JOINED = {"|": "_either", "&": "_both"}


class Plugin(NamedTuple):
    """One mechanism as asked for: its name, its module, and its options (an instance of the module's Options).

    Joined patterns are a Plugin too: its module.OPERATOR is "|" or "&", and options.parts are its Plugins, in order.
    """

    name: str
    module: Any
    options: Any

    def __str__(self):
        """The canonical spelling: only the options that differ from their defaults."""
        if parts := getattr(self.options, "parts", None):
            return self.module.OPERATOR.join(map(str, parts))
        given = [
            f"{f.name}={spell(getattr(self.options, f.name))}"
            for f in dataclasses.fields(self.options)
            if f.name not in FILLED_IN and getattr(self.options, f.name) != f.default
        ]
        return self.name + (":" + ",".join(given) if given else "")

    def leaves(self):
        """The mechanisms that this one is joined of; itself alone if it is not joined."""
        parts = getattr(self.options, "parts", None)
        return [self] if parts is None else [leaf for part in parts for leaf in part.leaves()]

    def each(self, change):
        """The same with change(leaf) in the place of every leaf."""
        parts = getattr(self.options, "parts", None)
        return change(self) if parts is None else join(self.module.OPERATOR, [part.each(change) for part in parts])


def spell(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def names(folder):
    """The mechanisms of a folder, by listing it. Files that start with an underscore, and base.py, are not mechanisms."""
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_") and p.stem != "base")


def load(folder, name):
    """The module of one mechanism, its Options made a frozen dataclass."""
    module = importlib.import_module(f"{folder}.{name}")
    options = vars(module).get("Options") or type("Options", (), {"__module__": module.__name__})
    if not dataclasses.is_dataclass(options) or "__dataclass_fields__" not in vars(options):
        options = dataclasses.dataclass(frozen=True)(options)
    module.Options = options
    return module


def parse(folder, spec):
    """`name:key=value,...` -> Plugin. Raises Refused, naming the valid choices."""
    for operator in JOINED if folder == "attention" else ():
        if operator in spec:
            return join(operator, [parse(folder, part) for part in spec.split(operator)])
    flag = FOLDERS[folder]
    name, _, rest = spec.strip().partition(":")
    if name not in names(folder):
        raise Refused(f"{flag} {name!r} is not known: choose one of {', '.join(names(folder))}")
    module = load(folder, name)
    fields = {f.name: f for f in dataclasses.fields(module.Options) if f.name not in FILLED_IN}
    given = {}
    for item in filter(None, (s.strip() for s in rest.split(","))):
        key, equals, text = item.partition("=")
        if key not in fields:
            valid = ", ".join(f"{f.name}={spell(f.default)}" for f in fields.values()) or "none"
            raise Refused(f"{flag} {name} has no option {key!r}: its options and defaults are {valid}")
        if not equals:
            raise Refused(f"{flag} {name}: option {key!r} needs a value, as in {key}={spell(fields[key].default)}")
        if key in given:
            raise Refused(f"{flag} {name}: option {key!r} is given twice: give it once")
        given[key] = convert(flag, name, fields[key], text)
    try:
        options = module.Options(**given)
        check(dataclasses.replace(options, budget=FAR) if is_share(options) else options)
    except ValueError as no:
        raise Refused(f"{flag} {name}: {no}") from None
    return Plugin(name, module, options)


def join(operator, parts):
    """Patterns joined by "|" or "&" -> the Plugin of what any of them sees, or what all of them see."""
    for part in parts:
        if pattern(part) or not all(hasattr(leaf.module, "allowed") for leaf in part.leaves()):
            raise Refused(f"--attn {part} is more than a rule of positions and cannot be joined by {operator}: give it layers of its own")
    module = load("attention", JOINED[operator])
    return Plugin(operator.join(part.name for part in parts), module, module.Options(tuple(parts)))


def pattern(rule):
    """The class that works a layer's memory for an attention pattern that is more than a rule of positions, else None.

    It is the file's own class Pattern, or that of another file which an option asks for: PATTERN = (option, file).
    """
    option, file = getattr(rule.module, "PATTERN", (None, None))
    wanted = load("attention", file) if option and getattr(rule.options, option) else rule.module
    return getattr(wanted, "Pattern", None)


def check(options):
    """Ask the mechanism's file whether its options go together: it raises ValueError where they do not."""
    getattr(sys.modules[type(options).__module__], "check", lambda o: None)(options)


def is_share(options):
    """Is the budget a share of a text, whose tokens are not known yet?"""
    return type(getattr(options, "budget", 0)) is float


@functools.lru_cache
def in_tokens(options, read):
    """The options with a budget that is a share as that many tokens of a text of `read`; at least what the others allow."""
    if not is_share(options):
        return options

    def allowed(budget):
        try:
            check(dataclasses.replace(options, budget=budget))
        except ValueError:
            return False
        return True

    wanted = max(1, int(options.budget * read + 0.5))
    return dataclasses.replace(options, budget=next(filter(allowed, itertools.count(wanted))))


def convert(flag, name, field, text):
    """The text of an option as the type of its default; 4k and 1m are 4096 and 1048576. A budget may be a share instead: 0.25."""
    kind = type(field.default)
    if field.name == "budget" and "." in text:
        return share(flag, name, text)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return number(text) if kind is int else kind(text)
    except (KeyError, ValueError):
        want = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        want += " of tokens, or a share of the text as in 0.25" if field.name == "budget" else ""
        raise Refused(f"{flag} {name}: {field.name} takes {want}, not {text!r}") from None


def share(flag, name, text):
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise Refused(f"{flag} {name}: a budget with a point takes a share above 0 and up to 1, not {text!r}: all of a text is 1.0")
    return value


def number(text):
    """A whole number; the suffixes k and m mean 1024 and 1024*1024."""
    text = text.strip().lower()
    unit = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:], 1)
    return int(text[:-1] if unit > 1 else text) * unit


def layers(folder, spec):
    """The parts of a pattern over depth, between slashes; but those in the name of a file, heads=some/file.tsv, are its own."""
    parts = []
    for piece in spec.split("/"):
        if parts and re.search("heads=[^,]*$", parts[-1]) and piece.partition(":")[0] not in names(folder):
            parts[-1] += "/" + piece
        else:
            parts.append(piece)
    return parts


def tile(folder, spec, n_layer, **heads):
    """A pattern tiled over depth: one Plugin a layer, with `layer`, `n_layer` and heads (n_head, n_kv_head) filled in where a
    mechanism declares them."""
    pattern = [parse(folder, part) for part in layers(folder, spec)]
    if len(pattern) > n_layer:
        raise Refused(f"{FOLDERS[folder]} {spec} names {len(pattern)} layers, but the model has {n_layer}: give at most that many")
    return [place(pattern[i % len(pattern)], layer=i, n_layer=n_layer, **heads) for i in range(n_layer)]


def place(plugin, **here):
    """The mechanism where it stands: of FILLED_IN what it declares, or what each part of a joined one declares."""

    def placed(leaf):
        declared = {f.name for f in dataclasses.fields(leaf.options)} & here.keys()
        return leaf._replace(options=dataclasses.replace(leaf.options, **{k: here[k] for k in declared}))

    return plugin.each(placed)
