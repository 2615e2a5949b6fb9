"""How distance is felt (`--pos`). One file per scheme; see plugins.py for how a file becomes a flag.

A file has a class Position (base.py) that overrides what it needs:

    frequencies()                  # a rotary scheme: radians a token for each pair of channels; base.Rotary does the rest
    queries(q, turn), keys(k, turn)    # what else positions do to queries and keys, which may become wider
    bias()                         # what distance adds to the logits: a kernels.Bias, computed by attention, never an array of N x N
    turn(at, begin), again(pos, turn)  # what these need of the positions, computed once a call for all layers
    temperature, late              # what multiplies the logits; whether keys are remembered as they are

and may say by per_layer(o) that each layer has an instance, with weights of its own. Its weights are saved in nanolong.safetensors. What
other libraries know of a scheme is read from config.json and written there by _hf.py.
"""
