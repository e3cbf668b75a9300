"""Public LTG-BERT and GPT-BERT state dicts: our model computes what their layout computes, or they are refused."""

import argparse
import json
import math

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from antlm_fast.cli import main
from antlm_fast.models import GptBertConfig, LtgBertConfig, build_model
from antlm_fast.models.public_checkpoints import convert_state_dict, load_public_checkpoint
from antlm_fast.pipeline import open_model
from antlm_fast.types import InputError

VOCAB, SIZE, WIDTH, LAYERS, HEADS, BUCKETS, LONGEST = 30, 24, 20, 3, 4, 8, 40
SETTINGS = {"num_attention_heads": HEADS, "max_position_embeddings": LONGEST, "hidden_dropout_prob": 0.25}
LAYOUTS = ("ltg_bert", "gpt_bert", "gpt_bert_plain")


def attention_name(layout, i):
    return f"layers.{i}.attention" if layout == "ltg_bert" else f"attention_layers.{i}"


def feed_forward_name(layout, i):
    return f"layers.{i}.mlp.mlp" if layout == "ltg_bert" else f"mlp_layers.{i}.mlp"


def public_state(layout, seed=0):
    """Random weights under the names and shapes of the public training code, body prefix `transformer.`."""
    shapes = {
        "embedding.word_embedding.weight": (VOCAB, SIZE),
        "embedding.relative_embedding": (2 * BUCKETS - 1, SIZE),
        "embedding.relative_layer_norm.weight": (SIZE,),
        "embedding.relative_layer_norm.bias": (SIZE,),
        "classifier.nonlinearity.1.weight": (SIZE, SIZE),
        "classifier.nonlinearity.1.bias": (SIZE,),
        "classifier.nonlinearity.5.bias": (VOCAB,),
    }
    for i in range(LAYERS):
        values = {"ltg_bert": ("v", SIZE), "gpt_bert": ("vg", 2 * SIZE), "gpt_bert_plain": ("v", SIZE)}[layout]
        for part, rows in (("in_proj_qk", 2 * SIZE), (f"in_proj_{values[0]}", values[1]), ("out_proj", SIZE)):
            name = f"transformer.{attention_name(layout, i)}.{part}"
            shapes |= {f"{name}.weight": (rows, SIZE), f"{name}.bias": (rows,)}
        if layout == "ltg_bert":
            name = f"transformer.{attention_name(layout, i)}.post_layer_norm"
            shapes |= {f"{name}.weight": (SIZE,), f"{name}.bias": (SIZE,)}
        name = f"transformer.{feed_forward_name(layout, i)}"
        shapes |= {f"{name}.1.weight": (2 * WIDTH, SIZE), f"{name}.4.weight": (SIZE, WIDTH)}
        if layout == "gpt_bert":
            shapes |= {f"transformer.dwa_modules.alphas.{n}": (n + 2,) for n in (2 * i, 2 * i + 1)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["classifier.nonlinearity.5.weight"] = state["embedding.word_embedding.weight"]
    for i in range(LAYERS):
        state[f"transformer.{attention_name(layout, i)}.position_indices"] = public_rows(LONGEST)
    return state


def public_rows(length):
    """Row of the relative table for every query and key, with floating-point logarithms as the public code has them."""
    mid = BUCKETS // 2

    def row(distance):
        far = abs(distance)
        if far > mid:
            ratio = math.log(far / mid) / math.log((LONGEST - 1) / mid)
            far = math.ceil(ratio * (mid - 1) - 1e-9) + mid
        return BUCKETS - 1 + (far if distance > 0 else -far)

    return torch.tensor([[row(i - j) for j in range(length)] for i in range(length)])


def public_logits(layout, state, ids, visible, eps):
    """What the public layouts compute for one sequence, in float64: heads and layers one at a time.

    ids (length,), visible bool (length, length).
    """
    s = {name.removeprefix("transformer."): tensor.double() for name, tensor in state.items()}
    length, dim = len(ids), SIZE // HEADS
    rows = public_rows(length)

    def norm(x, name=None):
        affine = (s[f"{name}.weight"], s[f"{name}.bias"]) if name else ()
        return F.layer_norm(x, x.shape[-1:], *affine, eps=eps)

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def attend(x, name):
        y = norm(x)
        table = norm(s["embedding.relative_embedding"], "embedding.relative_layer_norm")
        q, k = linear(y, f"{name}.in_proj_qk").split(SIZE, dim=-1)
        q_rel, k_rel = linear(table, f"{name}.in_proj_qk").split(SIZE, dim=-1)
        gated = f"{name}.in_proj_vg.weight" in s
        v = linear(y, f"{name}.in_proj_{'vg' if gated else 'v'}")
        out = []
        for h in range(HEADS):
            cut = slice(h * dim, (h + 1) * dim)
            score = q[:, cut] @ k[:, cut].T
            score = score + (q[:, None, cut] * k_rel[rows][:, :, cut]).sum(-1)
            score = score + (k[None, :, cut] * q_rel[rows][:, :, cut]).sum(-1)
            score = (score / math.sqrt(3 * dim)).masked_fill(~visible, -math.inf)
            out.append(score.softmax(-1) @ v[:, cut])
        out = torch.cat(out, dim=-1)
        if layout == "ltg_bert":
            return norm(linear(out, f"{name}.out_proj"), f"{name}.post_layer_norm")
        return linear(norm(out * F.gelu(v[:, SIZE:]) if gated else out), f"{name}.out_proj")

    def feed(x, name):
        a, g = (norm(x) @ s[f"{name}.1.weight"].T).split(WIDTH, dim=-1)
        return norm(a * F.gelu(g, approximate="tanh")) @ s[f"{name}.4.weight"].T

    def summed(outputs):
        weights = s.get(f"dwa_modules.alphas.{len(outputs) - 2}")
        return outputs[-1] if weights is None else sum(w * x for w, x in zip(weights, outputs, strict=True))

    x = norm(s["embedding.word_embedding.weight"][ids])
    outputs = [x]
    for i in range(LAYERS):
        outputs.append(x + attend(x, attention_name(layout, i)))
        x = summed(outputs)
        outputs.append(x + feed(x, feed_forward_name(layout, i)))
        x = summed(outputs)
    x = norm(F.gelu(linear(norm(x), "classifier.nonlinearity.1")))
    return x @ s["embedding.word_embedding.weight"].T + s["classifier.nonlinearity.5.bias"]


def our_model(state, **arguments):
    config, tensors = convert_state_dict(state, **({"settings": SETTINGS} | arguments))
    model = build_model(config)
    model.load_state_dict(tensors)
    return model.double().eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_our_model_computes_what_the_public_layout_computes(layout):
    state = public_state(layout)
    model = our_model(state)
    ids = torch.randint(VOCAB, (LONGEST,), generator=torch.Generator().manual_seed(1))
    full = torch.ones(LONGEST, LONGEST, dtype=torch.bool)
    for causal, visible in ((False, full), (True, full.tril())):
        expected = public_logits(layout, state, ids, visible, model.config.layer_norm_eps)
        # without a gate ours is gelu of a constant in float32, 6e-8 off 1
        tolerance = 1e-5 if layout == "gpt_bert_plain" else 1e-9
        torch.testing.assert_close(model(ids[None], causal=causal)[0], expected, rtol=0, atol=tolerance)
        assert expected.std() > 0.5


def test_sizes_are_read_off_the_shapes_and_the_rest_off_the_settings():
    config, _ = convert_state_dict(public_state("ltg_bert"), settings=SETTINGS | {"layer_norm_eps": 1e-3})
    assert config == LtgBertConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LONGEST,
        position_bucket_size=BUCKETS,
        hidden_dropout=0.25,
        layer_norm_eps=1e-3,
    )
    config, _ = convert_state_dict(public_state("gpt_bert"), num_attention_heads=2)
    assert (config.num_attention_heads, config.max_position_embeddings) == (2, LONGEST)  # of the stored buckets
    assert config.layer_norm_eps == GptBertConfig().layer_norm_eps


def renamed(state, *changes):
    for old, new in changes:
        state = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in state.items()}
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda state: renamed(state, ("", "module.")),  # data parallelism
        lambda state: renamed(state, ("", "_orig_mod.model.")),
        # the BabyLM 2025 baselines: no `transformer.`, a body `model.`, a head `lm_head.`
        lambda state: renamed(
            state, ("transformer.", "model."), ("embedding.", "model.embedding."), ("classifier.", "lm_head.")
        ),
        lambda state: {name: t for name, t in state.items() if not name.endswith(("position_indices", ".5.weight"))},
    ],
    ids=["data-parallel", "compiled", "babylm-2025", "no-buffers-no-decoder"],
)
def test_prefixes_buffers_and_the_tied_decoder_do_not_matter(change):
    state = public_state("gpt_bert")
    expected = convert_state_dict(state, settings=SETTINGS)
    config, tensors = convert_state_dict(change(state), settings=SETTINGS)
    assert config == expected[0]
    assert tensors.keys() == expected[1].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected[1].items())


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_tensor(name, *shape):
    return lambda state: state | {name: torch.zeros(shape)}


QK = "transformer.layers.0.attention.in_proj_qk"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("ltg_bert", without(f"{QK}.bias"), r"no others; got layers.0.attention.in_proj_qk.bias missing$"),
        ("ltg_bert", without("transformer.layers.1.mlp.mlp.1.weight"), r"layers.1.mlp.mlp.1.weight missing"),
        ("ltg_bert", with_tensor("head.1.weight", 2), r"got head.1.weight unknown$"),
        ("ltg_bert", with_tensor("transformer.layers.7.scale", 2), r"missing; layers.7.scale unknown"),
        ("ltg_bert", with_tensor(f"{QK}.weight", SIZE, SIZE), r"in_proj_qk.weight \(24, 24\) instead of \(48, 24\)"),
        ("ltg_bert", with_tensor("embedding.relative_embedding", 14, SIZE), "2 \\* buckets - 1 rows; got 14"),
        ("ltg_bert", with_tensor("embedding.relative_embedding", 15), "must be a matrix; got shape"),
        ("ltg_bert", with_tensor("next_sentence_classifier.nonlinearity.1.weight", 2, 2), "head by head"),
        ("ltg_bert", with_tensor("classifier.nonlinearity.5.weight", VOCAB, SIZE), "must be the word embedding"),
        ("ltg_bert", with_tensor("module.embedding.relative_embedding", 3, 3), "under two prefixes"),
        ("ltg_bert", lambda _: {"encoder.weight": torch.zeros(2)}, "must be of LTG-BERT .* got encoder.weight"),
        ("ltg_bert", lambda _: {}, "must be of LTG-BERT .* got none"),
        ("ltg_bert", lambda state: state | {"step": 3}, "must map names to tensors; got 'step': int"),
        ("gpt_bert", without("transformer.dwa_modules.alphas.3"), r"dwa_modules.alphas.3 missing"),
        ("gpt_bert", with_tensor("transformer.dwa_modules.alphas.3", 4), r"alphas.3 \(4,\) instead of \(5,\)"),
        ("gpt_bert", with_tensor(f"{QK}.weight", 2), "must be of LTG-BERT .* or of GPT-BERT"),
        ("gpt_bert", without("transformer.attention_layers.0.in_proj_vg.weight"), "in_proj_vg.weight missing"),
        (
            "gpt_bert_plain",
            with_tensor("transformer.attention_layers.2.in_proj_v.weight", 3, 3),
            r"in_proj_v.weight \(3, 3\) instead of",
        ),
        ("gpt_bert", lambda s: s | {"classifier.nonlinearity.1.bias": torch.zeros(SIZE).long()}, "torch.int64"),
        ("gpt_bert", lambda s: s | {"transformer.attention_layers.1.position_indices": public_rows(9)}, "at least"),
        (
            "gpt_bert",
            lambda s: s | {"transformer.attention_layers.1.position_indices": public_rows(LONGEST).T},
            "another rule",
        ),
    ],
)
def test_what_our_models_cannot_compute_is_refused(layout, change, message):
    with pytest.raises(InputError, match=message):
        convert_state_dict(change(public_state(layout)), settings=SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_attention_heads must be given"),
        (SETTINGS | {"num_hidden_layers": 4}, "num_hidden_layers must be 3, .* the config has 4"),
        (SETTINGS | {"vocab_size": 31}, "vocab_size must be 30"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads"),
        (SETTINGS | {"layer_norm_eps": -1.0}, "layer_norm_eps must be above 0"),
        ({"num_attention_heads": "2"}, "num_attention_heads must be a whole number; got '2'"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        convert_state_dict(public_state("ltg_bert"), settings=settings)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hub_is_read(tmp_path, name):
    state = public_state("ltg_bert")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"model_type": "bert", "vocab_size": VOCAB}))
    if name.endswith("bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        model = load_public_checkpoint(path)
        assert torch.equal(model.head_weight, state["embedding.word_embedding.weight"])
        assert model.config.num_attention_heads == HEADS


def test_a_checkpoint_cut_into_several_files_is_read_or_told_apart(tmp_path):
    state = {name: tensor.clone() for name, tensor in public_state("ltg_bert").items()}
    names = sorted(state)
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(
        InputError, match="got neither; its pytorch_model.bin.index.json names parts, which are read as"
    ):
        load_public_checkpoint(tmp_path)
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = load_public_checkpoint(tmp_path, num_attention_heads=HEADS)
    assert torch.equal(model.head_weight, state["embedding.word_embedding.weight"])
    assert not model.training  # its dropout would make the logits others than the public model's


def test_the_command_line_makes_a_model_folder_with_its_tokenizer(tmp_path, capsys):
    state = public_state("ltg_bert")
    vocabulary = {token: index for index, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"])}
    vocabulary |= {f"##{index}": index for index in range(len(vocabulary), VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    source, folder = tmp_path / "public", tmp_path / "ours"
    source.mkdir()
    save_file({name: tensor.clone() for name, tensor in state.items()}, source / "model.safetensors")
    arguments = ["import", str(source), "--output", str(folder), "--heads", str(HEADS)]
    assert main(arguments) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert not folder.exists()
    tokenizer.save(str(source / "tokenizer.json"))
    assert main(arguments) == 0
    assert "ours: ltg_bert, 0.01M parameters" in capsys.readouterr().out
    model, own = open_model(folder)
    assert torch.equal(model.head_weight, state["embedding.word_embedding.weight"])
    assert own.mask_id == 3
    assert main(arguments) == 2
    assert "output must be a folder that does not exist" in capsys.readouterr().err


def test_a_training_state_gives_its_average_unless_told_not_to(tmp_path):
    now, average = public_state("gpt_bert"), public_state("gpt_bert", seed=1)
    path = tmp_path / "run_state_dict.bin"
    command_line = argparse.Namespace(seed=42, output_dir="x", device=torch.device("cpu"))
    torch.save({"model": renamed(now, ("", "module.")), "ema_model": average, "epoch": 3, "args": command_line}, path)
    for ema, state in ((True, average), (False, now)):
        model = load_public_checkpoint(path, num_attention_heads=HEADS, ema=ema)
        assert torch.equal(model.head_weight, state["embedding.word_embedding.weight"])


class Junk:
    """Unpickled carelessly, it would run."""

    def __reduce__(self):
        return print, ("code of a stranger ran",)


def test_files_that_are_not_weights_are_refused_and_never_run(tmp_path, capsys):
    path = tmp_path / "pytorch_model.bin"
    torch.save(public_state("ltg_bert") | {"extra": Junk()}, path)
    with pytest.raises(InputError, match="pytorch_model.bin must hold tensors and plain values alone"):
        load_public_checkpoint(path)
    assert "stranger" not in capsys.readouterr().out
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="pytorch_model.bin (is damaged|must hold tensors)"):
            load_public_checkpoint(path)
    torch.save(public_state("ltg_bert"), path)
    whole = path.read_bytes()
    for length in (len(whole) // 4, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="pytorch_model.bin is damaged"):
            load_public_checkpoint(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(InputError, match="must hold a table of tensors; got list"):
        load_public_checkpoint(path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        load_public_checkpoint(tmp_path)
    for missing in ("other.bin", "other.safetensors"):
        with pytest.raises(InputError, match=f"{missing} does not exist"):
            load_public_checkpoint(tmp_path / missing)
    with pytest.raises(InputError, match="must end in .safetensors"):
        load_public_checkpoint(tmp_path / "weights.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="must hold model.safetensors or pytorch_model.bin"):
        load_public_checkpoint(tmp_path / "empty")
