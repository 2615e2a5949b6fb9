"""What trains (`--adapter`). One file per answer; see plugins.py for how a file becomes a flag.

LR                           # the learning rate unless --lr says otherwise
def apply(model, o)          # put in what the adapter needs, shapes alone: weights come later. ValueError: it cannot be
def initial(model, name, o)  # the array that a parameter begins with that apply() has put in (its name has ".lora_" in it)
def trains(name, o) -> bool  # does this parameter, which the base or apply() has, train?
def shake(model, seed)       # optional: what is random in training is a function of this int; None: nothing is random
def flags(memory, segment, length) -> (memory, segment)   # optional: what stands in their flags' place (None: not given). ValueError
class Beside(Memory)         # optional: works each layer's memory as an attention pattern does (model.remember)

The base is what other libraries know of the model, and stays as it is but for what trains() says. What mechanisms have of their own
(model.own: gates, memory vectors, bias tables) is not the base's and trains with every adapter. At step 0 the model is the base.

A checkpoint of an adapter holds what trains, and where the base is: see _peft.py.
"""
