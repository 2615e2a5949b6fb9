"""Sliding window: a token sees itself and the window - 1 tokens before it (Mistral 7B, arXiv:2310.06825; HF `sliding_window`)."""


class Options:
    window: int = 1024  # tokens seen, the token itself included


def allowed(q, k, h, o):
    return (k <= q) & (q - k < o.window)


def check(o):
    if o.window < 1:
        raise ValueError(f"window={o.window} sees nothing: it must be at least 1")
