"""Adapters: what trains and what does not, that nothing else changes, and that checkpoints are opened by others."""

import json
import re
import shutil
import zlib

import numpy as np
import pytest
from conftest import TINY, apart, loss_and_gradients, named, python, run, small, text, tiny, whole
from test_train import args, metrics, own_cache, refusal, uneven, weights, world  # noqa: F401

import convert
import ops
import plugins
import segments
import train
from adapters import lora
from errors import Refused
from model import Config, Llama, load, save

T = 24
LORAS = ["lora", "lora:rslora=true,rank=4,targets=q_proj+up_proj", "lora:dora=true,rank=4", "longlora"]
# what trains, by name; of an adapter that is not here: something, but not everything
TRAINS = {
    "full": "",
    "lora": r"lora_|\.memory\.",
    "longlora": r"lora_|norm|embed_tokens|\.memory\.",
    "prefix": r"\.memory\.",
    "memory": r"\.memory\.",
    "summary": r"lora_|\.memory\.|around\.",
}
REMEMBERS = ["tokens", "state", "melodi", "infini", "compressive"]
every = lambda what, specs: pytest.mark.parametrize(what, specs, ids=lambda x: named(x) if isinstance(x, str) else None)


def how(adapter):
    """A Config's fields with which an adapter can be."""
    memories = {"memory": "state:size=3", "summary": "summary:k=3,chunk=16"}
    name = adapter.partition(":")[0]
    return {"adapter": adapter, **({"memory": memories[name]} if name in memories else {})}


def trained(model, batch, segment=None):
    """(loss, gradients) of a batch as train.py has them, whole or in segments."""
    if segment:
        outs, grads = segments.accumulate(model, segments.cut(batch, segment), train.nats, {})
        return sum(out[0].item() for out in outs), grads
    out, grads = ops.accumulate(model, lambda: train.loss_and_seen(model, batch, 1), {})
    return out[0].item(), grads


def moved(model, std=0.1):
    """The model after some training, so to speak: all that trains is somewhere else, the same on every backend."""
    for name, p in sorted(ops.parameters(model).items()):
        if model.trains(name) and "magnitude" not in name:
            noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=p.shape) * std
            ops.set_parameters(model, {name: p + ops.array(noise.astype("float32"))})
        elif "magnitude" in name:
            ops.set_parameters(model, {name: p * 1.5})
    return model


def fresh(**changes):
    return Llama(Config(**{**TINY, "num_hidden_layers": 2, **changes})).init(seed=1, std=0.2)


def same(a, b):
    assert a.keys() == b.keys()
    for n in a:
        np.testing.assert_array_equal(a[n], b[n], err_msg=n)


@pytest.fixture
def base(tmp_path, tokenizer_files):
    """base(**changes): the folder of a plain tiny model."""

    def make(**changes):
        save(fresh(**changes), tmp_path / "base", tokenizer_files)
        return tmp_path / "base"

    return make


# ---------------------------------------------------------------- step 0, and what trains


@every("adapter", [*plugins.names("adapters"), *LORAS, "prefix:counted=true", "memory:rank=2", "summary:who=both"])
def test_step_0_is_the_base(adapter):
    spec = how(adapter)
    assert apart(run(tiny(**spec), text(T, 2)), run(tiny(), text(T, 2))) < 1e-5
    memory = "none" if "memory" in spec else "window:budget=9"
    model, plain = tiny(**{"memory": memory, **spec}), tiny(memory=memory)
    assert apart(run(model, text(T, 2), whole(T)), run(plain, text(T, 2), whole(T))) < 1e-5
    # or this test is blind
    if adapter != "full":
        model = moved(fresh(**{"memory": memory, **spec}))
        assert apart(run(model, text(T, 2), whole(T)), run(plain, text(T, 2), whole(T))) > 0.1


@every("memory", REMEMBERS)
def test_a_memory_trains_from_the_base_on(memory):
    """Gates are closed: a text is read as by a memory that has nothing of its own."""
    plain = tiny(memory="xl:length=512" if memory == "compressive" else "none")
    for rank in (0, 2):
        model = tiny(memory=memory, adapter=f"memory:rank={rank}")
        assert apart(run(model, text(T), whole(T)), run(plain, text(T), whole(T))) < 1e-5


def built(world, out, adapter, **more):  # noqa: F811
    """The model as train.py makes it."""
    flags = {"segment": 16, "memory": "state:size=3", **how(adapter), **more}
    a = train.settle(train.parse(args(world, out, **flags)))
    source = train.cli.model_folder(a)
    return train.build(a, train.config_of(a, source), source, True)[0]


@every("adapter", [*plugins.names("adapters"), *LORAS, "memory:rank=2", "summary:who=both"])
def test_three_steps_move_what_trains_and_nothing_else(adapter, world, tmp_path):  # noqa: F811
    model = built(world, tmp_path / "out", adapter, dtype="bfloat16")
    kinds = {n: str(p.dtype).split(".")[-1] for n, p in ops.parameters(model).items()}
    before, optimizer = weights(model), ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1)
    for _ in range(3):
        loss, norm, _ = train.train_step(model, optimizer, uneven(), 2, 1.0, 1e-2, 16)
        assert np.isfinite(loss) and norm > 0
    after = weights(model)
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    name = adapter.partition(":")[0]
    want = {n for n in before if re.search("lora_|" * (":rank" in adapter) + TRAINS[name], n)} if name in TRAINS else changed
    assert changed == want and changed and (name == "full" or len(changed) < len(before))
    assert {kinds[n] for n in changed} == {"float32"} and {kinds[n] for n in before.keys() - changed} <= {"bfloat16"}


def test_a_gradient_that_nothing_has_is_zero(world, tmp_path):  # noqa: F811
    """The first segment of a row uses nothing of a memory's own: with the gradient cut there, it has none."""
    model = built(world, tmp_path / "out", "memory", bptt=0)
    optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1)
    assert train.train_step(model, optimizer, uneven(), 2, 1.0, 1e-2, 16, 0)[1] > 0
    loss, grads = loss_and_gradients(model, uneven().tokens)
    assert loss > 0 and not any(g.any() for g in grads.values())


GRADIENTS = """
import sys, numpy as np
from test_adapters import fresh, how, moved, loss_and_gradients, text
for i, adapter in enumerate(sys.argv[2:]):
    loss, grads = loss_and_gradients(moved(fresh(**how(adapter), attention_bias=True)), text(25, 2))
    np.savez(f"{sys.argv[1]}/{i}.npz", **{"loss": loss, **grads})
"""


def test_gradients_agree_between_backends(tmp_path):
    pytest.importorskip("mlx"), pytest.importorskip("torch")
    specs = [*LORAS, "prefix", "prefix:counted=true"]
    python(GRADIENTS, "mlx" if ops.BACKEND == "torch" else "torch", tmp_path, *specs)
    for i, adapter in enumerate(specs):
        loss, grads = loss_and_gradients(moved(fresh(**how(adapter), attention_bias=True)), text(25, 2))
        other = np.load(tmp_path / f"{i}.npz")
        assert abs(other["loss"] - loss) < 1e-5 * abs(loss)
        assert other.keys() - {"loss"} == grads.keys() and any("lora_A" in n or "prefix_k" in n for n in grads)
        for n, g in grads.items():
            assert np.abs(other[n] - g).max() <= 1e-4 * np.abs(g).max() + 1e-7, (adapter, n)


# ---------------------------------------------------------------- the formulas


@every("spec", LORAS[:3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_paper_s(spec, bias):
    o = plugins.parse("adapters", spec).options
    linear, draw = lora.Lora(6, 10, bias, o), np.random.default_rng(0)
    w = {n: draw.normal(size=p.shape).astype("float32") for n, p in ops.parameters(linear).items()}
    ops.set_parameters(linear, {n: ops.array(a) for n, a in w.items()})
    s = {"lora": 16 / 8, "lora:dora=true,rank=4": 16 / 4}.get(spec, 16 / 4**0.5)
    matrix = w["weight"] + s * w["lora_B.weight"] @ w["lora_A.weight"]
    if o.dora:
        matrix = w["lora_magnitude_vector.weight"] * matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    x = draw.normal(size=(3, 6)).astype("float32")
    with ops.no_grad():
        assert apart(ops.numpy(linear(ops.array(x))), x @ matrix.T + w.get("bias", 0)) < 1e-5
        assert apart(ops.numpy(linear.matrix()), matrix) < 1e-5


def test_lora_begins_as_peft_s():
    model = tiny(adapter="lora")
    for name, w in weights(model).items():
        if "lora_B" in name:
            assert not w.any()
        if "lora_A" in name:
            bound = w.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(w).max() <= bound and abs(w.mean()) < 0.2 * bound
    all_A = [w for n, w in weights(model).items() if "q_proj.lora_A" in n]
    assert len(all_A) == 2 and apart(*all_A) > 0.1


def test_dora_s_norm_is_a_constant_to_the_gradient():
    """Section 4.3: with m = ||W||, and so a ratio of 1, gradients of A and B are LoRA's."""
    plain, dora = (fresh(adapter=f"lora:dora={d}") for d in ("false", "true"))
    loss_of = lambda model: loss_and_gradients(model, text(T, 2))[1]
    want, got = loss_of(plain), loss_of(dora)
    for n in want:
        assert np.abs(got[n] - want[n]).max() <= 1e-4 * np.abs(want[n]).max(), n
    assert any(np.abs(g).max() > 1e-4 for n, g in got.items() if "magnitude" in n)


@every("pos", ["rope", "alibi", "xl:width=8", "none"])
@pytest.mark.parametrize("begin", [0, 5], ids=["whole", "packed"])
def test_a_counted_prefix_is_tokens_that_stand_before_the_text(pos, begin):
    """Open, it is what a memory of the same keys and values would be, at positions 0 to size - 1. Packed behind another document too."""
    n, model = 3, moved(fresh(pos=pos, adapter="prefix:size=3,counted=true,closed=false"), 0.5)
    plain = fresh(pos=pos)
    ops.set_parameters(plain, {name: p for name, p in ops.parameters(model).items() if "prefix" not in name})
    at = ops.array(np.arange(n, dtype="int32")[None, None])
    layers = []
    for block, i in zip(model.model.layers, model.model.feels):
        memory, position = block.self_attn.memory, model.model.positions[i]
        k, v = (ops.swap(p.weight.reshape(1, n, -1, 8), 1, 2) for p in (memory.prefix_k, memory.prefix_v))
        k = k if position.late else position.keys(k, position.turn(lora_places(at)))
        layers.append({"k": k, "v": v, "pos": at, "n": n, "first": 0, "capacity": 0})
    with ops.no_grad():
        want, _ = plain(ops.array(text(T)), {"next": n, "layers": layers})
    documents = np.where(np.arange(T + begin) < begin, 0, begin)[None].astype("int32")
    got = run(model, np.concatenate([text(begin, seed=9), text(T)], 1), begin=documents if begin else None)
    assert apart(got[:, begin:], ops.numpy(want)) < 1e-4


def lora_places(at):
    from kernels import Places

    return Places(at, 0)


def test_a_prefix_without_positions_is_as_near_to_any_token():
    """Read alone, token by token, the same token gives the same logits wherever it stands; counted, it does not."""
    for spec, moves in (("prefix:closed=false", False), ("prefix:closed=false,counted=true", True)):
        model = moved(fresh(adapter=spec, memory="none"), 0.5)
        y = run(model, text(1).repeat(T, 1), whole(T, 1))
        assert (apart(y[:, :1], y[:, -1:]) > 1e-3) == moves


@every("memory", plugins.names("memory"))
@every("adapter", ["prefix:closed=false", "prefix:counted=true,closed=false"])
def test_a_prefix_stands_before_every_memory(memory, adapter):
    spec = {"memory": small("memory", memory), "adapter": adapter}
    if not tiny(memory=spec["memory"]).model.layers[0].self_attn.memory.looks:
        with pytest.raises(Refused, match="a prefix is none of them"):
            fresh(**spec)
        return
    model = moved(fresh(**spec), 0.5)
    exact = 5e-3 if memory == "quantised" else 1e-4
    want = run(model, text(T, 2), whole(T))
    assert apart(want, run(tiny(memory=spec["memory"]), text(T, 2), whole(T))) > 0.1
    assert apart(run(model, text(T, 2), [[1] * 8] * 3), want) < exact
    # shorter rows, padded
    tokens = text(T, 2)
    tokens[1, 5:8] = tokens[1, 20:] = -1
    alone = tokens[1:, tokens[1] >= 0]
    assert apart(run(model, tokens, whole(T))[1:, tokens[1] >= 0], run(model, alone, [[5], [8], [4]])) < exact


@every("adapter", ["lora:dora=true", "prefix:counted=true", "prefix"])
@every("memory", ["full", "h2o:budget=9", "state:size=3,closed=false"])
def test_adapters_in_a_static_graph(memory, adapter):
    model, n = moved(fresh(memory=memory, adapter=adapter), 0.5), 8
    want = run(model, text(T), [[n], [1] * n, [1] * n], room=T)
    with ops.no_grad():
        y, state = model(ops.array(text(T)[:, :n]), model.start(n, T))
    step, got = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True)), [ops.numpy(y)]
    for t in range(n, T):
        got.append(ops.numpy(step(int(text(T)[0, t]), (t + 1) % n == 0)))
    assert apart(np.concatenate(got, 1), want) < 1e-4


@every("attn", [small("attention", n) for n in plugins.names("attention")] + ["longformer:window=5,n_global=4,own_projections=true"])
def test_a_prefix_stands_before_every_pattern(attn):
    if attn.startswith("routing"):
        with pytest.raises(Refused, match="take another --attn"):
            fresh(attn=attn, adapter="prefix")
        return
    model = moved(fresh(attn=attn, adapter="prefix:closed=false"), 0.5)
    want = run(model, text(T), whole(T))
    assert apart(want, run(tiny(attn), text(T), whole(T))) > 0.1
    assert apart(run(model, text(T), [[3, 5], [7, 1], [1, 2, 5]]), want) < 1e-4


# ---------------------------------------------------------------- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    linear = lora.Lora(50, 1, False, plugins.parse("adapters", "lora:dropout=0.25,rank=1").options)
    linear.seed = 7
    x = ops.numpy(linear.dropped(ops.full((40, 50), 3.0, ops.float32)))
    np.testing.assert_allclose(np.unique(x), [0, 4], rtol=1e-6)
    assert abs((x == 0).mean() - 0.25) < 0.04 and (x == 0).any(0).all() and not (x == 0).all(0).any()
    assert (ops.numpy(linear.dropped(ops.full((40, 50), 3.0, ops.float32))) == x).all()
    linear.seed = 8
    assert (ops.numpy(linear.dropped(ops.full((40, 50), 3.0, ops.float32))) != x).any()
    linear.seed = None
    assert (ops.numpy(linear.dropped(ops.full((40, 50), 3.0, ops.float32))) == 3).all()


def test_dropout_is_for_training_and_is_the_same_when_it_is_computed_again(world, tmp_path):  # noqa: F811
    """Recomputed activations, segments that are read twice, and a run that goes on: one pattern for one part of a batch."""
    found = {}
    for adapter in ("lora", "lora:dropout=0.5"):
        for again in (ops.call, ops.checkpoint):
            for segment in (None, 16):
                model = moved(built(world, tmp_path / "out", adapter, lr=1e-9))
                model.model.run = again
                optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.0)
                for _ in range(2):
                    found[adapter, again, segment] = train.train_step(model, optimizer, uneven(), 2, 1.0, 0.0, segment)[:2]
        tokens = uneven().tokens
        found[adapter] = ops.numpy(model(ops.array(tokens)))
    for segment in (None, 16):
        loss, norm = found["lora:dropout=0.5", ops.call, segment]
        np.testing.assert_allclose(found["lora:dropout=0.5", ops.checkpoint, segment], (loss, norm), rtol=1e-5)
        assert abs(loss - found["lora", ops.call, segment][0]) > 1e-4
    # out of training nothing is dropped
    assert apart(found["lora:dropout=0.5"], found["lora"]) < 1e-5


# ---------------------------------------------------------------- merging


@every("adapter", [*LORAS, "memory:rank=2"])
def test_merged_and_taken_out_again(adapter):
    model = moved(fresh(**how(adapter), attention_bias=True, mlp_bias=True))
    before, want = weights(model), run(model, text(T, 2), whole(T))
    lora.merge(model)
    assert apart(run(model, text(T, 2), whole(T)), want) < 2e-5
    assert any(np.abs(w - before[n]).max() > 0.01 for n, w in weights(model).items())
    lora.merge(model)
    lora.unmerge(model)
    assert apart(run(model, text(T, 2), whole(T)), want) < 2e-5
    for n, w in weights(model).items():
        np.testing.assert_allclose(w, before[n], atol=2e-6, err_msg=n)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@every("adapter", [*LORAS, "memory:rank=2", "memory", "summary:who=both"])
def test_convert_makes_a_plain_model_of_it(adapter, tied, base, tmp_path):
    model, _ = load(base(tie_word_embeddings=tied), **how(adapter), pos="pi:factor=2", dtype="float32")
    save(moved(model), tmp_path / "adapted", tmp_path / "base")
    convert.main([str(tmp_path / "adapted"), str(tmp_path / "out")])
    merged, _ = load(tmp_path / "out", dtype="float32")
    assert apart(run(merged, text(T, 2), whole(T)), run(model, text(T, 2), whole(T))) < 2e-5
    assert (
        merged.config.adapter == "full"
        and merged.config.pos == model.config.pos
        and not (tmp_path / "out" / "adapter_config.json").exists()
    )
    assert ("lm_head.weight" in weights(merged)) == (not tied)


def test_a_folder_of_peft_s_own_is_merged_too(base, tmp_path):
    """It has no config.json: that of the base counts."""
    model, _ = load(base(), adapter="lora:alpha=3,rank=5", pos="pi:factor=2", dtype="float32")
    save(moved(model), tmp_path / "adapted", tmp_path / "base")
    for path in (tmp_path / "adapted").iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    merged, tokenizer = load(convert.convert(tmp_path / "adapted", tmp_path / "out"), pos="pi:factor=2", dtype="float32")
    assert apart(run(merged, text(T)), run(model, text(T))) < 2e-5 and tokenizer.vocab_size == 256
    assert load(tmp_path / "out")[0].config.pos == "rope"


def test_a_merge_keeps_the_base_s_dtype(base, tmp_path):
    convert.convert(base(), tmp_path / "low", "bfloat16")
    model, _ = load(tmp_path / "low", adapter="lora", dtype="float32")
    save(moved(model), tmp_path / "adapted", tmp_path / "base")
    out = ops.read_safetensors(convert.convert(tmp_path / "adapted", tmp_path / "out") / "model.safetensors")
    assert {str(a.dtype).split(".")[-1] for a in out.values()} == {"bfloat16"}
    for linear, name in ((model.model.layers[0].mlp.up_proj, "mlp.up_proj"), (model.model.layers[1].self_attn.o_proj, "self_attn.o_proj")):
        name = f"model.layers.{'01'[name[0] == 's']}.{name}.weight"
        want = ops.cast(linear.matrix(), ops.bfloat16)
        assert (ops.numpy(out[name]) == ops.numpy(want)).mean() > 0.99


# ---------------------------------------------------------------- checkpoints


@every("adapter", [n for n in plugins.names("adapters") if n != "full"] + LORAS[1:3] + ["memory:rank=2", "summary:who=both"])
def test_saved_and_loaded(adapter, base, tmp_path):
    model, _ = load(base(), **how(adapter), attn="window:window=9", dtype="float32")
    save(moved(model), tmp_path / "adapted", tmp_path / "base")
    again, tokenizer = load(tmp_path / "adapted", dtype="float32")
    same(weights(model), weights(again))
    np.testing.assert_array_equal(run(again, text(T), whole(T)), run(model, text(T), whole(T)))
    assert again.config.adapter == adapter and again.config.attn == "window:window=9" and tokenizer.vocab_size == 256
    # the base is elsewhere, and nothing of it is here
    names = {p.name for p in (tmp_path / "adapted").iterdir()}
    assert "model.safetensors" not in names and "adapter_config.json" in names
    saved = [n for p in (tmp_path / "adapted").glob("*.safetensors") for n in ops.read_safetensors(p)]
    assert saved and not any("lm_head" in n or n.endswith("q_proj.weight") for n in saved)
    said = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str((tmp_path / "base").absolute())
    # and again, from the loaded one
    save(again, tmp_path / "two", tmp_path / "adapted")
    for path in (tmp_path / "adapted").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() or path.suffix == ".json", path


def test_peft_s_names(base, tmp_path):
    """As PEFT 0.21 writes them for the same LoraConfig."""
    model, _ = load(base(tie_word_embeddings=True), adapter="longlora:dora=true,rank=4", dtype="float32")
    save(model, tmp_path / "out", tmp_path / "base")
    got = {n: tuple(a.shape) for n, a in ops.read_safetensors(tmp_path / "out" / "adapter_model.safetensors").items()}
    want = {"base_model.model.model.embed_tokens.weight": (61, 32), "base_model.model.model.norm.weight": (32,)}
    want["base_model.model.lm_head.weight"] = (61, 32)
    for i in range(2):
        block = f"base_model.model.model.layers.{i}"
        want |= {f"{block}.{n}.weight": (32,) for n in ("input_layernorm", "post_attention_layernorm")}
        for n, out in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
            at = f"{block}.self_attn.{n}_proj"
            want |= {f"{at}.lora_A.weight": (4, 32), f"{at}.lora_B.weight": (out, 4), f"{at}.lora_magnitude_vector": (out,)}
    assert got == want
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["task_type"] == "CAUSAL_LM" and (said["r"], said["lora_alpha"]) == (4, 16.0)
    assert said["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and said["use_dora"] and not said["use_rslora"]
    assert said["modules_to_save"] == ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"]
    assert said["ensure_weight_tying"] and not (tmp_path / "out" / "adapters.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@every("adapter", LORAS)
def test_peft_opens_it(adapter, tied, base, tmp_path):
    peft, transformers, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    model, _ = load(base(tie_word_embeddings=tied), adapter=adapter, dtype="float32")
    save(moved(model), tmp_path / "out", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")
    assert apart(theirs(torch.as_tensor(text(T)).long()).logits.detach().numpy(), run(model, text(T))) < 1e-4


@every("adapter", LORAS[:3])
def test_mlx_lm_opens_it(adapter, base, tmp_path):
    if ops.BACKEND != "mlx":
        pytest.skip("mlx-lm is MLX's")
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load(base(), adapter=adapter, dtype="float32")
    save(moved(model), tmp_path / "out", tmp_path / "base")
    theirs = load_adapters(load_model(tmp_path / "base")[0], str(tmp_path / "out"))
    assert apart(ops.numpy(theirs(ops.array(text(T)))), run(model, text(T))) < 1e-4


# ---------------------------------------------------------------- runs


@every("adapter", ["lora:dora=true,dropout=0.1", "longlora", "prefix", "memory"])
def test_a_resumed_run_equals_one_that_never_stopped(adapter, world, tmp_path, monkeypatch):  # noqa: F811
    real, out, steps = train.train_step, tmp_path / "run", []
    flags = {"steps": 4, "save-every": 2, "adapter": adapter, "dtype": "float32", "segment": 16, "memory": "infini"}
    assert train.main(args(world, tmp_path / "whole", **flags)) == 0
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 4 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, **flags))
    monkeypatch.setattr(train, "train_step", real)
    if "dropout" in adapter:
        # tiles would drop other entries
        with pytest.raises(Refused, match="--mlp-tile 8 would change the run"):
            train.main(["--resume", str(out), "--mlp-tile", "8"])
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out, "loss", "valid_loss") == metrics(tmp_path / "whole", "loss", "valid_loss")
    files = [{p.name: p.read_bytes() for p in (folder / "step-000004").glob("*.safetensors")} for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1] and ("model.safetensors" not in files[0])


def test_the_bare_command_with_an_adapter(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    lines = args(world, None, adapter="lora", lr=None, steps=30, dtype="float32")
    assert train.main(lines) == 0
    (out,) = (tmp_path / "out").iterdir()
    valid = [v for _, _, v in metrics(out, "valid_loss")]
    assert valid[-1] < valid[0] - 0.05 and max(v for *_, v in metrics(out, "lr")) == 1e-3
    model, _ = load(out / "step-000030", dtype="float32")
    n = sum(w.size for name, w in weights(model).items() if "lora_" in name)
    total = sum(w.size for w in weights(model).values())
    assert f"--adapter lora trains {n:,} of {total:,} parameters" in capsys.readouterr().out
    # on from there without saying so, and nothing else can be put on it
    assert train.main(args(world, tmp_path / "more", model=out / "step-000030", steps=1, warmup=0)) == 0
    assert load(tmp_path / "more" / "step-000001")[0].config.adapter == "lora"
    assert "merge that first" in refusal(args(world, tmp_path / "no", model=out / "step-000030", adapter="longlora"), monkeypatch, capsys)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"adapter": "lora:rank=0"}, "rank=0 trains nothing"),
        ({"adapter": "lora:alpha=0"}, "alpha=0.0 scales"),
        ({"adapter": "lora:dropout=1"}, "dropout=1.0 is no share"),
        ({"adapter": "lora:targets=q_proj+head"}, "head is no linear.*q_proj"),
        ({"adapter": "lora:targets="}, "nothing is no linear"),
        ({"adapter": "memory:rank=-1"}, "rank=-1"),
        ({"adapter": "memory"}, "--memory full has no parameters of its own.*tokens, state"),
        ({"adapter": "prefix:size=0"}, "size=0 is no prefix"),
        ({"adapter": "prefix:gain=0"}, "gain=0.0 moves no gate"),
        ({"adapter": "prefix", "attn": "routing"}, "--attn"),
    ],
    ids=lambda x: str(x),
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises(Refused, match=says) as no:
        fresh(**changes)
    assert "\n" not in str(no.value)


def test_flags_that_do_not_fit_are_refused(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    say = lambda **flags: refusal(args(world, tmp_path / "run", **flags), monkeypatch, capsys)
    assert "--segment" in say(adapter="memory", memory="infini")
    assert "trained base" in say(adapter="lora", init=tmp_path / "c.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: shutil.rmtree(f.parent / "base"),
            r"the base model of .* is not in .*base: put it back, or correct base_model_name_or_path",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "is not in None"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "does not hold readable JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks 28 of the model's weights"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"nonsense"), "not a readable safetensors file"),
        (lambda f: (f / "config.json").write_text((f.parent / "base" / "config.json").read_text()), "merge it with convert.py"),
    ],
    ids=["base gone", "no base named", "no JSON", "no weights", "torn", "plain config"],
)
def test_a_broken_folder_is_refused(spoil, says, base, tmp_path):
    model, _ = load(base(), adapter="lora")
    save(model, tmp_path / "out", tmp_path / "base")
    spoil(tmp_path / "out")
    with pytest.raises(Refused, match=says) as no:
        load(tmp_path / "out")
    assert "\n" not in str(no.value)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "adapter, spoil, says",
    [
        ("prefix", lambda f: None, "cannot be merged into them"),
        ("summary", lambda f: None, "works on summary vectors alone"),
        ("lora", lambda f: shutil.rmtree(f.parent / "base"), "names a base that cannot be had"),
        ("lora", lambda f: edit(f, peft_type="IA3"), "LORA can be merged"),
        ("lora", lambda f: edit(f, rank_pattern={"q_proj": 2}), "rank_pattern"),
        ("lora", lambda f: edit(f, bias="all"), "bias 'all'"),
        ("lora", lambda f: edit(f, r=0), "r is 0"),
        ("lora", lambda f: edit(f, base_model_name_or_path=str(f)), "is an adapter too"),
        ("lora", lambda f: save(fresh(num_hidden_layers=1), f.parent / "base"), "made for another model"),
        ("lora", lambda f: save(fresh(hidden_size=16), f.parent / "base"), "made for another model"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(adapter, spoil, says, base, tmp_path):
    model, _ = load(base(), **how(adapter))
    save(model, tmp_path / "adapted", tmp_path / "base")
    spoil(tmp_path / "adapted")
    with pytest.raises(Refused, match=says):
        convert.convert(tmp_path / "adapted", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_base_nothing_is_saved(tmp_path):
    with pytest.raises(Refused, match="without its base"):
        save(fresh(adapter="lora"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
