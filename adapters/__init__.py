"""What trains (`--adapter`). One file per answer; see plugins.py for how a file becomes a flag.

def apply(model, o)         # insert what the adapter needs; nothing for `full`
def trains(name, o) -> bool # does the parameter of this name train?
"""
