"""What is kept of the past (`--memory`). One file per answer; see plugins.py for how a file becomes a flag.

Training in segments, recurrence and pruned generation are one loop:

    for segment in segments:
        logits, state = model(segment, state)

Inside a segment a memory only appends; it forgets, compresses or folds only when a segment closes. So token by token, odd
pieces and whole segments agree at every budget, and the segment's length is the dial between faithful and cheap.
"""
