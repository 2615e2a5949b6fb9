"""a|b: a key is seen where any part sees it. plugins.py reads the spelling; the parts are ordinary patterns."""

OPERATOR = "|"


class Options:
    parts: tuple = ()  # Plugins


def allowed(q, k, h, o):
    see = o.parts[0].module.allowed(q, k, h, o.parts[0].options)
    for part in o.parts[1:]:
        see = see | part.module.allowed(q, k, h, part.options)
    return see
