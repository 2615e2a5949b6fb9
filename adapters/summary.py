"""Token compression, trained end to end: the model itself learns to squeeze each chunk of a long text into a few vectors, and to read on
from those alone. What they are, and how they pile up, is --memory summary's (memory/summary.py); here they train, and a LoRA with them.

    python train.py --adapter summary --length 16k --segment 2k --data books
    python generate.py --model OUT/step-N --prompt-file book.txt --prompt "Who ...?"

who=vectors: the LoRA acts where the rows are summary vectors, as they are written and as they are read, and nowhere else: tokens are read
    and answered by the base as it was, in the manner of ICAE (Ge et al. 2023, arXiv:2307.06945: a LoRA encoder, a frozen decoder). There
    the encoder reads the chunk too, so that it passes two models, once to be squeezed and once to be predicted; here it passes the base
    alone, whose keys and values the vectors look at, and the vectors pass by themselves behind it: k rows a chunk, written, and k, read.
    A text's first segment is the base's to the bit. PEFT and mlx-lm would put such a LoRA on every row, so it is not in their files:
    nanolong.safetensors holds it, and convert.py does not merge it.
who=both: AutoCompressor's (Chevalier et al. 2023, arXiv:2305.14788): one adapted model writes, reads and answers. It is in PEFT's files.

The paper cuts the gradient behind every second segment: --bptt 1. At step 0 the memory's gates are closed, and each segment stands alone.
"""

import ops
import plugins
from ops import Module, ModuleList

lora, summary = plugins.load("adapters", "lora"), plugins.load("memory", "summary")
LR = lora.LR
NEEDS_SEGMENTS = True


class Options(lora.Options):
    who: str = "vectors"  # whom the LoRA works on: vectors, or both them and tokens


def check(o):
    lora.check(o)
    if o.who not in ("vectors", "both"):
        raise ValueError(f"who={o.who} is not known: choose vectors or both")
    if o.who == "vectors" and o.dora:
        raise ValueError("dora=true scales whole matrices, and who=vectors leaves them to the tokens: take who=both")


def flags(memory, segment, length):
    """--memory and --segment, each where it was not given (None) as the other says, for rows of `length`."""
    if memory is None:
        n = segment or min(summary.Options.chunk, max(1, length // 4))
        memory = str(plugins.Plugin("summary", summary, summary.Options(chunk=n)))
    asked = [plugins.parse("memory", part) for part in plugins.layers("memory", memory)]
    chunks = [p.options.chunk for p in asked if p.name == "summary"]
    if chunks and segment not in (None, *chunks):
        raise ValueError(f"--segment {segment} is not the chunk of --memory {memory}, as which it would be read: say chunk={segment} there")
    return memory, segment or next(iter(chunks), None)


def apply(model, o):
    c = model.config
    asked = plugins.tile("memory", c.memory, c.num_hidden_layers)
    if any(p.name != "summary" for p in asked):
        raise ValueError(f"--memory {c.memory} has no summaries to train: take summary, as in --memory summary:k=32,chunk=2048")
    if o.who == "both":
        return lora.apply(model, o)
    if any(p.options.keep == "xl" for p in asked):
        raise ValueError("keep=xl projects what it keeps again, as the vectors' LoRA would: take keep=window, or who=both")
    model.around.workers = ModuleList([Worker(block, o) for block in model.model.layers])


def trains(name, o):
    return lora.trains(name, o)


initial = lora.initial


def shake(model, seed):
    lora.shake(model, seed)
    products = [p for worker in model.around.workers or () for part in (worker.self_attn, worker.mlp) for p in part.all()]
    for i, product in enumerate(products):
        product.seed = None if seed is None else seed + (i << 32)


class Product(lora.Lora):
    """s B A x, without the matrix beside which it stands."""

    def __init__(self, n_in, n_out, o):
        Module.__init__(self)
        self.scale, self.dropout, self.seed = lora.scale(o.alpha, o.rank, o.rslora), o.dropout, None
        self.lora_A, self.lora_B = ops.Linear(n_in, o.rank), ops.Linear(o.rank, n_out)

    def forward(self, x):
        return self.more(x)


class Products(Module):
    """Those of the linears of an attention or an MLP, by their names."""

    def __init__(self, part, o):
        super().__init__()
        for name in lora.targets(o):
            if linear := getattr(part, name, None):
                setattr(self, name, Product(*linear.weight.shape[::-1], o))

    def all(self):
        return [p for name in lora.LINEARS if (p := getattr(self, name, None))]


class Worker(Module):
    """Block.forward with LoRA beside its linears. The block's own modules are not this one's: it is given the block as it works."""

    def __init__(self, block, o):
        super().__init__()
        self.self_attn, self.mlp = Products(block.self_attn, o), Products(block.mlp, o)

    def forward(self, x, seg, s, block):
        return type(block).forward(Parts(block, With(block.self_attn, self.self_attn), With(block.mlp, self.mlp)), x, seg, s)


class Parts:
    """A block with this attention and this MLP."""

    def __init__(self, block, attn, mlp):
        self.self_attn, self.mlp, self.tile = attn, mlp, None
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm


class With:
    """An attention or an MLP whose linears have products beside them."""

    def __init__(self, part, products):
        self.part, self.products = part, products

    def __getattr__(self, name):
        found, product = getattr(self.part, name), getattr(self.products, name, None) if name in lora.LINEARS else None
        return found if product is None else lambda x: found(x) + product(x)

    def __call__(self, *args):
        return type(self.part).forward(self, *args)

    def kv(self, x):
        return type(self.part).kv(self, x)
