"""Passkey retrieval: a number hidden in filler, asked for at the end (Mohtashami & Jaggi 2023, arXiv:2305.16300).

The prompt is plain text also for models that chat: that is how it was published, and a chat template gained nothing where tried
(SmolLM2-135M-Instruct, 512 and 1024 tokens: 12 keys of 12 in plain text, 11 through its template). The answer counts if its
first number is the key, digit for digit.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

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

    def written(n):
        before = int(depth * n + 0.5)
        filler = [" ".join(FILLER[i % len(FILLER)] for i in range(m)) for m in (before, n - before)]
        return "\n".join([TASK, filler[0], KEY.format(key=key), filler[1], ""])

    size = lambda n: len(tokenizer.encode(written(n) + QUESTION))
    if size(1) > length:
        raise Refused(f"a passkey prompt of {length} tokens has no room for its filler: --lengths must be {size(1)} or more")
    n = max(1, int((length - size(0)) * 50 / (size(50) - size(0))))
    while size(n) > length:
        n -= 1
    while size(n + 1) <= length:
        n += 1
    text, whole = (tokenizer.encode(written(n) + more).tolist() for more in ("", QUESTION))
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


def spread(depths):
    """So many depths, evenly from 0 to 1."""
    return np.linspace(0, 1, depths) if depths > 1 else np.full(1, 0.5)


def places(lengths, depths, trials, seed=0):
    """(length, depth from 0 to 1, key) of every trial. A key depends on the seed, length, depth and trial alone."""
    at = spread(depths)
    key = lambda *which: int(np.random.default_rng([seed, *which]).integers(1, 50001))
    return [(n, float(at[d]), key(n, d, t)) for n in lengths for d in range(depths) for t in range(trials)]


def summed(out, lengths, depths):
    """Accuracies [lengths, depths], and every trial."""
    accuracy = np.array([o["correct"] for o in out], float).reshape(len(lengths), depths, -1).mean(2)
    return {"lengths": lengths, "depths": spread(depths).tolist(), "accuracy": accuracy.tolist(), "trials": out}


def grid(model, tokenizer, lengths, depths, trials, seed=0, segment=512, seen=False):
    """Accuracies [lengths, depths] and every trial, one after the other, read and answered as generate.py does."""
    # one graph is captured for each session: too dear for a short answer
    session, out = Session(model, segment, graph=False), []
    with tqdm(places(lengths, depths, trials, seed), "passkey", leave=False, disable=not sys.stderr.isatty()) as bar:
        for n, depth, key in bar:
            out.append(passkey(session, tokenizer, n, depth, key, seen))
            bar.set_postfix(correct=f"{np.mean([o['correct'] for o in out]):.2f}", length=n, refresh=False)
    return summed(out, lengths, depths)


def prompts(tokenizer, lengths, depths, trials, seed=0):
    """The trials of grid(), not yet read: dicts with length, depth, key and the whole prompt's ids."""

    def written(place):
        n, depth, key = place
        text, question = prompt(tokenizer, n, depth, key)
        return {"length": n, "depth": depth, "key": key, "ids": text + question}

    # the tokenizer works beside Python
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(written, places(lengths, depths, trials, seed)))


def read_together(model, tokenizer, asked, at_once):
    """The trials of prompts(), each read in one go and answered greedily, for a memory that keeps everything. Prompts of as many tokens
    stand side by side, `at_once` tokens of them or one prompt."""
    alike = {}
    for i, trial in enumerate(asked):
        alike.setdefault(len(trial["ids"]), []).append(i)
    out = [None] * len(asked)
    for size, which in alike.items():
        rows = max(1, at_once // size)
        for j in range(0, len(which), rows):
            here = which[j : j + rows]
            for i, answer in zip(here, answers(model, tokenizer, [asked[i]["ids"] for i in here])):
                trial = {k: asked[i][k] for k in ("length", "depth", "key")}
                out[i] = {**trial, "tokens": size, "answer": answer, "correct": matches(answer, trial["key"])}
    return out


def answers(model, tokenizer, rows):
    """What the model writes, greedily, after each row of ids [B, T]: texts, each to its eos, or until all have said a number."""
    import ops

    x, written = np.asarray(rows, np.int32), []
    state = model.start(x.shape[1], x.shape[1] + ANSWER)
    with ops.no_grad():
        while True:
            logits, state = model(ops.array(x), state, last=1)
            written.append(ops.numpy(ops.argmax(logits[:, -1], -1)).tolist())
            lives = [list(takewhile(lambda token: token not in tokenizer.eos_ids, row)) for row in zip(*written)]
            texts = [tokenizer.decode(ids) for ids in lives]
            ended = [len(ids) < len(written) or re.search(r"[0-9][^0-9]", text) for ids, text in zip(lives, texts)]
            if all(ended) or len(written) == ANSWER:
                return texts
            x = np.array(written[-1], np.int32)[:, None]
