"""Passkey retrieval: a number hidden in filler, asked for at the end (Mohtashami & Jaggi 2023, arXiv:2305.16300).

The prompt is plain text also for models that chat: that is how it was published, and a chat template gained nothing where tried
(SmolLM2-135M-Instruct, 512 and 1024 tokens: 12 keys of 12 in plain text, 11 through its template). The answer counts if its
first number is the key, digit for digit.
"""

import re
import sys

import numpy as np
from tqdm import tqdm

from errors import Refused
from generate import Session

# in the words of LongLoRA's test (Chen et al. 2023, arXiv:2309.12307); there the filler is cut by characters, here at a sentence
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = 12  # tokens


def prompt(tokenizer, length, depth, key):
    """(text, question): two lists of ids, together at most one sentence of filler shorter than length.

    depth: where in the filler the key stands, 0 to 1. Raises Refused for a length that leaves no room.
    """

    def ids(n):
        before = int(depth * n + 0.5)
        filler = [" ".join(FILLER[i % len(FILLER)] for i in range(m)) for m in (before, n - before)]
        text = "\n".join([TASK, filler[0], KEY.format(key=key), filler[1], ""])
        return tokenizer.encode(text).tolist(), tokenizer.encode(text + QUESTION).tolist()

    size = lambda n: len(ids(n)[1])
    if size(1) > length:
        raise Refused(f"a passkey prompt of {length} tokens has no room for its filler: --lengths must be {size(1)} or more")
    n = max(1, int((length - size(0)) * 50 / (size(50) - size(0))))
    while size(n) > length:
        n -= 1
    while size(n + 1) <= length:
        n += 1
    text, whole = ids(n)
    # tokens may reach over the seam: the question begins where the text with it parts from the text without it
    same = next((i for i, (a, b) in enumerate(zip(text, whole)) if a != b), len(text))
    return whole[:same], whole[same:]


def matches(answer, key):
    """The first number in the answer is the key, digit for digit."""
    found = re.search(r"[0-9]+", answer)
    return found is not None and found[0] == str(key)


def passkey(session, tokenizer, length, depth, key, seen=False):
    """One trial, greedy: a dict with the raw answer.

    seen: the question is read in one go with the text, and a memory that keeps what is attended to may choose by the question;
    else it comes as a segment of its own, after the memory has closed on the text.
    """
    import ops

    text, question = prompt(tokenizer, length, depth, key)
    session.restart()
    if seen:
        logits = session.read(text + question, ANSWER)
    else:
        session.read(text, len(question) + ANSWER)
        logits = session.read(question, ANSWER)
    out = [int(ops.argmax(logits))]
    while out[-1] not in tokenizer.eos_ids and len(out) < ANSWER:
        out.append(int(ops.argmax(session.step(out[-1]))))
    answer, tokens = tokenizer.decode(out), len(text) + len(question)
    trial = {"length": length, "tokens": tokens, "depth": depth, "key": key, "cache": session.nbytes()}
    return trial | {"answer": answer, "correct": matches(answer, key)}


def grid(model, tokenizer, lengths, depths, trials, seed=0, segment=512, seen=False):
    """Accuracies [lengths, depths] and every trial. A key depends on the seed, length, depth and trial alone."""
    # one graph is captured for each session: too dear for a short answer
    session, places, out = Session(model, segment, graph=False), np.linspace(0, 1, depths) if depths > 1 else np.full(1, 0.5), []
    every = [(n, d, t) for n in lengths for d in range(depths) for t in range(trials)]
    with tqdm(every, "passkey", leave=False, disable=not sys.stderr.isatty()) as bar:
        for n, d, t in bar:
            key = int(np.random.default_rng([seed, n, d, t]).integers(1, 50001))
            out.append(passkey(session, tokenizer, n, float(places[d]), key, seen))
            bar.set_postfix(correct=f"{np.mean([o['correct'] for o in out]):.2f}", length=n, refresh=False)
    accuracy = np.array([o["correct"] for o in out], float).reshape(len(lengths), depths, trials).mean(2)
    return {"lengths": lengths, "depths": places.tolist(), "accuracy": accuracy.tolist(), "trials": out}
