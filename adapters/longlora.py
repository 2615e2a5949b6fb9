"""LongLoRA (Chen et al. 2023, arXiv:2309.12307, section 3.3): LoRA on attention alone, and all norms and the embedding as they are.

In the paper LoRA by itself does not learn to read further, whatever its rank, and this nearly does what full fine-tuning does; norms and
embedding are few of a large model's parameters (of a small one's, the embedding is many). A head that is tied to the embedding trains with
it, one that is not stays. The paper's training pattern is --attn s2, which is full attention in use, with positions stretched:

    python train.py --attn s2 --pos pi:factor=4 --length 32k --adapter longlora
"""

import plugins

lora = plugins.load("adapters", "lora")
apply, initial, check, shake = lora.apply, lora.initial, lora.check, lora.shake
# what trains of the base wants little, what is new wants more
LR = 2e-4


class Options(lora.Options):
    targets: str = "q_proj+k_proj+v_proj+o_proj"


def trains(name, o):
    return lora.trains(name, o) or "norm" in name or "embed_tokens" in name
