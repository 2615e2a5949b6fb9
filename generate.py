"""Text out, streaming, with a bounded cache.

python generate.py                                                    # the default model answers a default question
python generate.py --prompt "def fibonacci(n):"                       # goes on with a text
python generate.py --chat                                             # a conversation in the terminal
python generate.py --chat --prompt-file book.txt --prompt "Who is the narrator?" --memory sinks:budget=2048
python generate.py --prompt-file book.txt --cache book.cache --prompt "Who is the narrator?"    # the next question is read alone
cat notes.md | python generate.py --tokens 500 --memory sinks         # memory stays flat however long it writes
"""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from errors import Refused, main

QUESTION = "In two sentences: why is it hard for a language model to read a very long text?"


class Session:
    """A text that is being read and written: the model, its state and every token so far.

    chunk: tokens of the prompt read at once; segment: generated tokens between two closes, when a bounded memory forgets.
    A chunk is a segment of its own, so reading never holds more than the budget and one chunk.
    """

    def __init__(self, model, chunk=512, segment=64, graph=True):
        import ops

        self.ops, self.model, self.chunk, self.segment = ops, model, chunk, segment
        # elsewhere a step that knows its place on the host does less: it needs no mask
        self.fast, self.graph = graph, graph and ops.captures()
        self.memories = [block.self_attn.memory for block in model.model.layers]
        self.grows, self.forgets = (any(getattr(memory, what) for memory in self.memories) for what in ("grows", "forgets"))
        self.restart()

    def restart(self):
        self.tokens, self.state, self.run, self.since, self.room = [], None, None, 0, 0

    def resume(self, tokens, state):
        """Go on from a state that was left behind by these tokens."""
        self.restart()
        self.tokens, self.state = list(tokens), state

    def read(self, tokens, room=0):
        """Read tokens, with room for as many more to be written; returns the logits [V] after the last."""
        tokens = np.asarray(tokens, np.int32)
        if self.run:
            self.state, self.run = self.model.moving(self.run.state) if self.graph else self.run.state, None
        self.state = self.state or self.model.start(self.segment, read=len(tokens))
        self.model.settle(self.state)
        # what forgets nothing is allocated once for all that is to come
        around = self.model.around.size if self.model.around else 0
        layers = [memory.room(s, self.segment + around, len(tokens) + room) for memory, s in zip(self.memories, self.state["layers"])]
        self.state = {**self.state, "layers": layers}
        pieces = range(0, len(tokens), self.chunk)
        try:
            with self.ops.no_grad():
                for i in tqdm(pieces, "reading", unit="chunk", leave=False, disable=len(pieces) < 2 or not sys.stderr.isatty()):
                    piece = self.ops.array(tokens[None, i : i + self.chunk])
                    logits, self.state = self.model(piece, self.handed_over(), last=1)
                    self.ops.wait(logits, self.state)
        except BaseException:
            # the state is gone
            self.restart()
            raise
        self.tokens += tokens.tolist()
        self.since, self.room = 0, room
        return logits[0, -1]

    def handed_over(self):
        """The state, each layer's let go as it is read: what is remembered never exists twice."""
        state, self.state = self.state, None
        layers = state["layers"][::-1]
        state["layers"].clear()
        return {**state, "layers": (layers.pop() for _ in range(len(layers)))}

    def step(self, token):
        """Read one token that was just written, an int or an array of the backend; returns the logits [V] after it."""
        if self.grows and not self.room:
            # a static graph would write beyond its buffers
            raise Refused("the session has no room for another token: read() with a larger room, or use a bounded memory")
        self.room -= 1
        self.since += 1
        close = self.since >= self.segment and self.forgets
        self.since = 0 if close else self.since
        self.tokens.append(token)
        self.run = self.run or self.captured()
        return self.run(token, close)[0, -1]

    def captured(self):
        """The one-token step, as a static graph over the state where the backend makes one."""
        from kernels.step import fast_call, written_call

        model, ops = self.model, self.ops
        fast = fast_call() if self.graph else self.fast and written_call()
        if not fast:
            return ops.eager(lambda x, state, close: model(x, state, close=close), self.state)

        # a graph is made of blocks that are alike, what is written down each time of all of them
        together = 1 if self.graph else len(self.memories)

        def step(x, state, close):
            plain = model.run, model.model.run, model.model.together
            model.run, model.model.run, model.model.together = fast, fast, together
            try:
                return model(x, state, close=close)
            finally:
                model.run, model.model.run, model.model.together = plain

        if not self.graph:
            return ops.eager(step, self.state)
        return ops.static(step, model.still(self.state), (False, True) if self.forgets else (False,))

    def nbytes(self):
        """Bytes of everything that is remembered."""
        total = []
        self.ops.tree_map(lambda a: total.append(self.ops.nbytes(a)) or a, (self.run or self).state)
        return sum(total)


class Sampler:
    """The next token from logits: repetition penalty (Keskar et al. 2019, arXiv:1909.05858), temperature, then the filters
    top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p (Nguyen et al. 2024, arXiv:2407.01082), in HF's order.

    The draw inverts the cumulative distribution at a numpy random number: the same seed gives the same text on every backend.
    """

    def __init__(self, temperature=0.7, top_k=0, top_p=1.0, min_p=0.05, repetition_penalty=1.0, seed=None):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.penalty, self.random = repetition_penalty, np.random.default_rng(seed)

    def __call__(self, logits, tokens):
        """logits [V] float32 of the backend, tokens so far -> int."""
        return int(self.draw(logits, tokens))

    def draw(self, logits, tokens):
        """The same as an array of the backend, which nobody has waited for."""
        import ops

        if self.penalty != 1:
            seen = np.zeros(logits.shape[0], bool)
            seen[tokens] = True
            cooler = ops.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = ops.where(ops.array(seen), cooler, logits)
        if self.temperature == 0:
            return ops.argmax(logits)
        logits = logits / self.temperature
        if self.top_k:
            logits = ops.where(logits < ops.descending(logits)[min(self.top_k, logits.shape[0]) - 1], -1e30, logits)
        p = ops.softmax(logits, -1)
        if self.top_p < 1:
            # a token stays while those before it, in falling order, have not reached top_p
            order = ops.descending(p)
            least = -ops.amax(ops.where(ops.cumsum(order, -1) - order < self.top_p, -order, -2.0), -1)
            p = ops.where(p < least, 0.0, p)
        if self.min_p:
            p = ops.where(p < self.min_p * ops.amax(p, -1), 0.0, p)
        total = ops.cumsum(p, -1)
        return ops.minimum((total <= float(self.random.random()) * total[-1]).sum(), p.shape[0] - 1)


class Until:
    """Hold back text that may be the beginning of a stop string, and end at the first one."""

    def __init__(self, stops):
        self.stops, self.held, self.done = [s for s in stops if s], "", False

    def push(self, text):
        """The text that is safe to show."""
        self.held += text
        found = [(i, s) for s in self.stops if (i := self.held.find(s)) >= 0]
        if found:
            self.done, self.held = True, self.held[: min(found)[0]]
        keep = 0 if self.done else max((k for s in self.stops for k in range(1, len(s)) if self.held.endswith(s[:k])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def flush(self):
        out, self.held = self.held, ""
        return out


def generate(session, tokenizer, tokens, n, sampler, stops=(), show=lambda text: None):
    """Read tokens, then write up to n more, showing text as soon as it is certain. Returns (text, statistics)."""
    start, until, stream, text = time.perf_counter(), Until(stops), tokenizer.stream(), ""
    logits = session.read(tokens, n)
    drawn, wrote = sampler.draw(logits, session.tokens), 0
    session.ops.wait(drawn)
    read = time.perf_counter()

    def emit(piece):
        nonlocal text
        text += piece
        show(piece)

    while True:
        if wrote == 1:
            # the first step compiles and captures: it is not what a token costs
            session.ops.wait(drawn)
            first = time.perf_counter()
        # the next step is under way while the host looks at the token: if the text ends with it, it has been read all the same
        known = session.ops.later(drawn)
        logits = session.step(drawn) if wrote + 1 < n else None
        token = known()
        if logits is not None:
            session.tokens[-1] = token
        if token in tokenizer.eos_ids:
            break
        wrote += 1
        piece = until.push(stream.push(token))
        if logits is not None and not until.done:
            drawn = sampler.draw(logits, session.tokens)
        emit(piece)
        if logits is None or until.done:
            break
    if not until.done:
        emit(until.push(stream.flush()) + until.flush())
    end = time.perf_counter()
    decode = (wrote - 2) / (end - first) if wrote > 2 else float("nan")
    return text, {
        "read": len(tokens),
        "read_speed": len(tokens) / (read - start),
        "wrote": wrote,
        "speed": decode,
        "cache": session.nbytes(),
    }


def report(stats):
    speed = f" at {stats['speed']:.1f} tokens/s" if stats["wrote"] > 2 else ""
    return (
        f"[read {stats['read']} tokens at {stats['read_speed']:.0f} tokens/s, wrote {stats['wrote']}{speed}, "
        f"cache {stats['cache'] / 2**20:.1f} MiB]"
    )


def converse(session, tokenizer, args, sampler, first=None):
    """A conversation: one message if there is nobody at the terminal, else until the end of input."""
    messages, question = [], first
    while True:
        if question is None:
            try:
                question = input("\n> ")
            except EOFError:
                return
        messages.append({"role": "user", "content": question})
        tokens = tokenizer.chat(messages).tolist()
        # what was read already need not be read again, unless the template or the tokenizer sees the text differently now
        if not session.tokens or tokens[: len(session.tokens)] != session.tokens:
            session.restart()
        text, stats = generate(session, tokenizer, tokens[len(session.tokens) :], args.tokens, sampler, args.stop, show)
        messages.append({"role": "assistant", "content": text})
        print(flush=True)
        cli.say(report(stats))
        if first is not None:
            return
        question = None


def show(text):
    print(text, end="", flush=True)


def given(args):
    """The text of the file or of standard input, and the prompt from its flag; "" where there is none."""
    if args.prompt_file:
        try:
            with open(args.prompt_file, encoding="utf-8") as f:
                return f.read(), args.prompt or ""
        except OSError as no:
            raise Refused(f"--prompt-file {args.prompt_file} cannot be read: {no.strerror}") from None
        except UnicodeDecodeError:
            raise Refused(f"--prompt-file {args.prompt_file} is not text in UTF-8: convert it first") from None
    return "" if args.prompt is not None or sys.stdin.isatty() else sys.stdin.read(), args.prompt or ""


def join(*parts):
    return "\n\n".join(p for p in parts if p.strip())


def remember(session, tokenizer, args, encode, file, question):
    """The session as the prompt cache leaves it; what is not there yet is read and written. encode(text) -> the prompt's tokens."""
    import cache

    tokens = encode(join(file, question))
    if args.cache.exists():
        n = cache.resume(args.cache, session, tokenizer, tokens)
        return cli.say(f"[{args.cache}: {n} of {len(tokens)} tokens need not be read]")
    # tokens may reach over the seam: the file's are those that stay whatever is asked after it
    others = [encode(join(file, x)) for x in ("", "A")]
    n = min(cache.common(tokens, *others), len(others[0]) - 1)
    if n < 1:
        raise Refused(f"--prompt-file {args.prompt_file} is too short to be worth a cache: leave --cache out")
    session.read(tokens[:n], len(tokens) - n + args.tokens)
    cache.save(args.cache, session, tokenizer)
    cli.say(f"[{args.cache}: {n} tokens written]")


def arguments():
    parser = cli.Parser(description=__doc__)
    cli.add_model_flags(parser)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", help="the text to go on with, or the message of --chat; after the file's text if both are given")
    add("--prompt-file", metavar="FILE", help="a text file to begin with (default: standard input, if it is not a terminal)")
    add("--chat", action="store_true", help="use the model's chat template; without a prompt: a conversation in the terminal")
    add("--tokens", type=cli.whole, default=256, help="the most tokens to write (default 256; 4k is 4096)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end where the model writes this (may be given more than once)")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default 0.7)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens only (default 0: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this much probability (default 1: all)")
    add("--min-p", type=float, default=0.05, help="leave out tokens below this share of the likeliest one's probability (default 0.05)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1, tokens that have appeared are less likely (default 1)")
    add("--seed", type=int, help="the same seed gives the same text (default: a new one each time)")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--chunk", type=cli.whole, help="tokens of the prompt read at once (default: as trained, or 512 on a CPU, 2048 on a GPU)")
    add("--segment", type=cli.whole, help="a bounded memory forgets after so many written tokens (default: as trained, or 64)")
    add("--cache", type=Path, metavar="FILE", help="keep what is remembered of --prompt-file there, or take it from there: read once")
    add("--no-graph", action="store_true", help="on a GPU, run each step as written instead of as one compiled graph")
    args = parser.parse_args()
    wrong = [
        (args.tokens < 1, f"--tokens {args.tokens} writes nothing: give at least 1"),
        (any(n is not None and n < 1 for n in (args.chunk, args.segment)), "--chunk and --segment must be at least 1"),
        (args.temperature < 0, f"--temperature {args.temperature} is negative: give 0 or more"),
        (args.top_k < 0, f"--top-k {args.top_k} is negative: give 0 (all) or more"),
        (not 0 < args.top_p <= 1, f"--top-p {args.top_p} is no probability above 0: give a number up to 1"),
        (not 0 <= args.min_p <= 1, f"--min-p {args.min_p} is no share: give a number from 0 to 1"),
        (args.repetition_penalty <= 0, f"--repetition-penalty {args.repetition_penalty} must be above 0"),
        (args.cache and not args.prompt_file, "--cache keeps what was read of a file: give --prompt-file too"),
        (args.cache and not args.cache.absolute().parent.is_dir(), f"--cache {args.cache} cannot be written: its folder is not there"),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise Refused(sentence)
    return args


def run():
    args = arguments()
    file, question = given(args)
    text = join(file, question) or None
    ops = cli.use_backend(args.backend)
    cli.check_spelling(args.attn, args.pos, args.memory, args.adapter)
    model, tokenizer = cli.load(args)
    sampler = Sampler(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    chunk = args.chunk or model.segment or (2048 if ops.on_gpu() else 512)
    session = Session(model, chunk, args.segment or model.segment or 64, not args.no_graph)
    if text is None and not args.chat:
        args.chat, text = tokenizer.has_chat, QUESTION if tokenizer.has_chat else "Once upon a time"
        cli.say(f"> {text}")
    message = lambda text: tokenizer.chat([{"role": "user", "content": text}])
    encode = lambda text: (message(text) if args.chat else tokenizer.encode(text)).tolist()
    if args.cache:
        remember(session, tokenizer, args, encode, file, question)
    if args.chat:
        return converse(session, tokenizer, args, sampler, text)
    show(text if len(text) < 2000 else "")
    _, stats = generate(session, tokenizer, encode(text)[len(session.tokens) :], args.tokens, sampler, args.stop, show)
    print(flush=True)
    cli.say(report(stats))


if __name__ == "__main__":
    main(run)
