"""A run leaves as one GGUF file that transformers, gguf and this package read, or is refused by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from support.compare import assert_same
from support.quantized_models import write_gguf
from support.zoo.models import LLAMA, MOE, TEXT, ZOO, Tiny
from zo_offload import Engine, MeZO
from zo_offload.checkpoint.checkpoint import Checkpoint, save_pretrained
from zo_offload.checkpoint.gguf_config import rope_factors
from zo_offload.cli import main
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.quantized.gguf_file import GGUFFile

gguf = pytest.importorskip("gguf", reason="the package gguf names the tensors of these files")
pytestmark = pytest.mark.usefixtures("quiet_transformers")

IDS = torch.arange(3, 21).reshape(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}
WIDE = dict(LLAMA, hidden_size=64, intermediate_size=96)
NARROW = dict(LLAMA, intermediate_size=64)
SHARED = dict(moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=4, num_experts_per_tok=2)
"""Where transformers does not read a size in GGUF, it is transformers' default."""
FAMILIES = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", WIDE),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", dict(WIDE, sliding_window=None, head_dim=16)),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", dict(WIDE, tie_word_embeddings=True)),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", dict(WIDE, head_dim=128)),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(
        MOE, head_dim=8, num_experts=4, norm_topk_prob=True, moe_intermediate_size=768)),
    "qwen2-moe": Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", dict(NARROW, **SHARED)),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", dict(NARROW, vocab_size=32064)),
    "starcoder2": Tiny("Starcoder2ForCausalLM", "Starcoder2Config", dict(
        NARROW, vocab_size=49152, sliding_window=None)),
    "nemotron": Tiny("NemotronForCausalLM", "NemotronConfig", NARROW),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", dict(NARROW, head_dim=256, sliding_window=16)),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", dict(NARROW, head_dim=256, sliding_window=16)),
}  # fmt: skip

ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip


def built(family, folder, dtype=torch.float32):
    model = FAMILIES[family].build(dtype)
    model.save_pretrained(folder)
    return model


def loaded(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_is_read_by_transformers_and_by_us(family, tmp_path):
    """Bit for bit; norms that GGUF stores plus one are rounded by that once."""
    built(family, tmp_path / "base")
    with Engine(tmp_path / "base", method=MeZO(lr=1e-3), offload="disk", run_dir=tmp_path / "run") as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "out", scheme="gguf")
        trained = dict(engine.weights())
    if family.startswith(("gemma", "nemotron")):
        trained |= {name: value + 1 - 1 for name, value in trained.items() if "norm.weight" in name}
    model = loaded(tmp_path / "out")
    assert_same(dict(model.named_parameters()), trained)
    with Engine(tmp_path / "out", offload="none") as engine, torch.no_grad():
        assert_same(dict(engine.weights()), trained)
        assert_same(engine.run(BATCH).logits, model(**BATCH).logits)


def test_its_own_reader_finds_what_the_converter_of_llama_cpp_would_write(tmp_path):
    """The names, shapes and row order of gguf's reader; a copy of the writer of the tests' files."""
    model = built("llama", tmp_path / "base")
    save_pretrained(tmp_path / "out", model=model, scheme="gguf-f16")
    kinds = dict.fromkeys(("attn_q", "attn_k"), "F16")
    write_gguf(tmp_path / "want.gguf", model, "llama", kinds, "F16")
    ours, want = (gguf.GGUFReader(path) for path in (tmp_path / "out" / "model.gguf", tmp_path / "want.gguf"))
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in want.tensors}
    for tensor in want.tensors:
        same = found[tensor.name]
        assert same.tensor_type == tensor.tensor_type and (same.data == tensor.data).all(), tensor.name
    for key in want.fields.keys() - {"general.name", "GGUF.tensor_count", "GGUF.kv_count"}:
        if key.startswith(("llama.", "general.")):
            assert ours.fields[key].contents() == want.fields[key].contents(), key


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_a_type_by_name_is_the_one_that_gguf_makes(kind, tmp_path):
    model = built("llama", tmp_path / "base", torch.bfloat16)
    assert main(["export", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--as", f"gguf-{kind}"]) == 0
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    wide = {"q4_0": "q8_0"}.get(kind, kind)
    for name, part, named in (("blk.1.ffn_down", "model.layers.1.mlp.down_proj", kind), ("output", "lm_head", wide)):
        number = gguf.GGMLQuantizationType[named.upper()]
        want = gguf.quantize(model.get_submodule(part).weight.detach().float().numpy(), number)
        assert found[f"{name}.weight"].tensor_type == number
        assert (found[f"{name}.weight"].data.reshape(-1) == want.reshape(-1)).all()
    with Engine(tmp_path / "out", offload="none") as engine, torch.no_grad():
        assert_same(engine.run(BATCH).logits, loaded(tmp_path / "out", dtype=torch.float32)(**BATCH).logits)


def test_what_came_as_gguf_and_is_frozen_leaves_as_the_bytes_that_came(tmp_path):
    """Of every type, beside norms that trained, and beside layers that an adapter was merged into."""
    tiny = ZOO["llama"]
    options = dict(hidden_size=256, intermediate_size=256, head_dim=64)
    kinds = {"attn_v": "Q6_K", "ffn_down": "Q5_K", "attn_q": "Q4_0", "ffn_up": "Q2_K", "token_embd": "Q8_0"}
    (tmp_path / "in").mkdir()
    write_gguf(
        tmp_path / "in" / "tiny.gguf", replace(tiny, options=tiny.options | options).build(), "llama", kinds, "Q4_K"
    )
    came = gguf.GGUFReader(tmp_path / "in" / "tiny.gguf")
    settings = dict(offload="disk", storage="kept", block_numel=1 << 15)
    method = MeZO(lr=1e-2)
    with Engine(tmp_path / "in", method=method, run_dir=tmp_path / "a", trainable="*norm*", **settings) as engine:
        engine.step(BATCH)
        logits = engine.run(BATCH).logits
        engine.save_pretrained(tmp_path / "norms", scheme="gguf")
    adapter = {"r": 2, "target_modules": ["q_proj"]}
    with Engine(tmp_path / "in", method=method, run_dir=tmp_path / "b", adapter=adapter, **settings) as engine:
        engine.step(BATCH)
        engine.save_pretrained(tmp_path / "merged", scheme="gguf", merge=True)
    for out, changed in (("norms", "norm"), ("merged", "attn_q.")):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / out / "model.gguf").tensors}
        for tensor in came.tensors:
            same = found[tensor.name]
            equal = same.tensor_type == tensor.tensor_type and (same.data == tensor.data).all()
            assert equal != (changed in tensor.name), (out, tensor.name)
    with torch.no_grad():
        assert_same(loaded(tmp_path / "norms")(**BATCH).logits, logits)
    ours = GGUFFile(tmp_path / "norms" / "model.gguf").values
    assert {k: v for k, v in ours.items() if k.startswith("tokenizer")} == {
        k: v for k, v in GGUFFile(tmp_path / "in" / "tiny.gguf").values.items() if k.startswith("tokenizer")
    }
    tokens = [transformers.AutoTokenizer.from_pretrained(tmp_path / "norms", **named)("ABCXYZ").input_ids
              for named in ({}, {"gguf_file": "model.gguf"})]  # fmt: skip
    assert tokens[0] == tokens[1]


def test_the_rotary_factors_of_llama_3_are_written_and_a_config_beside_the_file_is_used(tmp_path, caplog):
    model = replace(FAMILIES["llama"], options=dict(WIDE, rope_parameters=ROPE)).build()
    with caplog.at_level(logging.WARNING):
        save_pretrained(tmp_path / "out", model=model, scheme="gguf")
    assert "rope_parameters under llama.cpp's keys" in caplog.text
    file = GGUFFile(tmp_path / "out" / "model.gguf")
    factors = torch.empty(8)
    file.read_into("rope_freqs.weight", 0, factors)
    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert_same(factors, rope_factors(model.config))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with Engine(tmp_path / "out", offload="none") as engine, torch.no_grad():
        assert_same(engine.run(BATCH).logits, model(**BATCH).logits)
        assert_same(loaded(tmp_path / "out", config=config)(**BATCH).logits, model(**BATCH).logits)


# ---- tokenizers ------------------------------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(pattern=None):
    """A tokenizer with all bytes and a merge, and two more tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: index for index, text in enumerate([*alphabet, "th", "the"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        from tokenizers import Regex

        level = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>")


def pieces(merges=(("▁", "a"), ("b", "c"), ("▁a", "bc"))):
    """A tokenizer as Llama 2's."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c"]
    vocab = {text: i for i, text in enumerate(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def exported(tokenizer, out, vocab=300):
    model = replace(FAMILIES["llama"], options=dict(WIDE, vocab_size=vocab)).build()
    save_pretrained(out, model=model, tokenizer=tokenizer, scheme="gguf")
    return GGUFFile(out / "model.gguf").values


@pytest.mark.parametrize(("pattern", "name"), [(None, "gpt-2"), (LLAMA3, "llama-bpe")])
def test_a_tokenizer_on_bytes_is_read_again_as_it_is(tmp_path, caplog, pattern, name):
    tokenizer = byte_level(pattern)
    with caplog.at_level(logging.WARNING):
        values = exported(tokenizer, tmp_path / "out")
    assert "reads the tokenizer" not in caplog.text
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert values["tokenizer.ggml.tokens"] == 300 and values["tokenizer.ggml.eos_token_id"] == 258
    assert values["tokenizer.ggml.add_bos_token"] is False  # llama.cpp's default for llama-bpe is to add one
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "the <think>other</think><|end|> naïve 1234"
    assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_tokenizer_on_pieces_has_scores_in_the_order_of_its_merges(tmp_path):
    exported(pieces(), tmp_path / "out", vocab=320)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "scores", "token_type"))
    score = dict(zip(tokens, scores, strict=True))
    assert score["▁a"] > score["bc"] > score["▁abc"] > score["a"]
    by_token = dict(zip(tokens, kinds, strict=True))
    assert [by_token[t] for t in ("<unk>", "<s>", "<0x0A>", "a", "[PAD319]")] == [2, 3, 6, 1, 5]
    tokenizer, again = pieces(), transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in ("a abc", "bca é"):
        own, read = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, again))
        assert own == read, text


def words():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (words, "is of type WordLevel, and GGUF has a place for BPE"),
        (lambda: byte_level(r"\d+"), r"splits texts by .*which has no name in GGUF known here"),
        (lambda: pieces((("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c"))), "merges 'abc' at two places of its order"),
    ],
    ids=["words", "split", "order"],
)
def test_a_tokenizer_without_a_place_in_gguf_is_refused_by_name(tmp_path, make, said):
    with pytest.raises(CheckpointError, match=f"the tokenizer .TokenizersBackend. {said}"):
        exported(make(), tmp_path / "out", vocab=320)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [*FAMILIES, "llama3"])
def test_llama_cpp_computes_what_transformers_does(family, tmp_path):
    """The next token's log probabilities, and the number of a text's tokens. llama.cpp's gelu is a table in float16."""
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp for Python) is not installed")
    tiny, tokenizer = FAMILIES.get(family, FAMILIES["llama"]), pieces() if "gemma" in family else byte_level()
    options = tiny.options | dict(vocab_size=max(320, tiny.options["vocab_size"]), max_position_embeddings=256)
    options |= {"rope_parameters": ROPE} if family == "llama3" else {}
    model = replace(tiny, options=options).build()
    save_pretrained(tmp_path / "out", model=model, tokenizer=tokenizer, scheme="gguf")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = (
        str(tmp_path / "out" / "model.gguf"), 256, 1, False
    )  # fmt: skip
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, ids = llama.Server(settings), list(range(60, 100))
    asked = {"n_predict": 1, "n_probs": options["vocab_size"], "temperature": 0.0, "ignore_eos": True}
    found = server.handle_completions({"prompt": ids, **asked})["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.no_grad():
        want = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
    got = torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])
    gelu = family.startswith(("gemma", "starcoder2"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 if gelu else 1e-5)
    for text in ("the quick the 1234  tabs\n\nnaïve", "abc a bc  a"):
        count = server.handle_completions({"prompt": text, "n_predict": 1})["usage"]["prompt_tokens"]
        assert count == len(tokenizer(text).input_ids)


# ---- refusals, and what was there before -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiny", "said"),
    [
        (ZOO["opt"], "type 'opt' is not exported as gguf; those of type llama, "),
        (ZOO["mixtral"], "type 'mixtral' is not exported as gguf"),
        (replace(FAMILIES["llama"], options=dict(WIDE, attention_bias=True)), "attention_bias=True has no place"),
        (replace(FAMILIES["llama"], options=dict(WIDE, hidden_act="gelu")), "hidden_act='gelu' has no place"),
        (replace(FAMILIES["mistral"], options=dict(WIDE, sliding_window=8)), "sliding_window=8 has no place"),
        (Tiny("Gemma2ForCausalLM", "Gemma2Config", dict(WIDE, head_dim=16)), "query_pre_attn_scalar=256 has no place"),
        (Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(MOE, norm_topk_prob=False)), "norm_topk_prob=False has no"),
    ],
    ids=["opt", "mixtral", "bias", "act", "window", "scale", "topk"],
)
def test_what_gguf_cannot_say_is_refused_by_name(tmp_path, tiny, said):
    with pytest.raises(ConfigError, match=said):
        save_pretrained(tmp_path / "out", model=tiny.build(), scheme="gguf")
    assert not (tmp_path / "out").exists()


def test_values_that_a_type_does_not_hold_are_refused(tmp_path):
    model = FAMILIES["llama"].build()
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    for scheme in ("gguf-f16", "gguf-q8_0"):
        with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' has values .*too large for"):
            save_pretrained(tmp_path / "out", model=model, scheme=scheme)
    with pytest.raises(
        ConfigError,
        match="an export as 'gguf-q3' is not known; safetensors, safetensors-f32, peft, merged, fp8, kept, gguf, ",
    ):
        save_pretrained(tmp_path / "out", model=model, scheme="gguf-q3")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--as", "int4"]) == 2


def test_gguf_and_safetensors_take_each_others_place_and_never_mix(tmp_path):
    model = built("llama", tmp_path / "base")
    for scheme in (None, "gguf", None):
        save_pretrained(tmp_path / "out", model=model, scheme=scheme, overwrite=True)
        (tmp_path / "out" / "mine.txt").write_text("x")
        weights = {path.suffix for path in (tmp_path / "out").glob("model*")}
        assert weights == {".safetensors" if scheme is None else ".gguf"}
    (tmp_path / "out" / "model.gguf").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        save_pretrained(tmp_path / "out", model=model, overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_memory_of_an_export_is_a_chunk_whatever_the_tensor(tmp_path, monkeypatch):
    """Elements are asked for a chunk at a time, of the expert stacks too."""
    from zo_offload.checkpoint import as_gguf, weights

    for module in (as_gguf, weights):
        monkeypatch.setattr(module, "CHUNK", 512)
    model, asked = FAMILIES["qwen3-moe"].build(), []
    real = as_gguf._encoded
    monkeypatch.setattr(as_gguf, "_encoded", lambda one, values: asked.append(len(values)) or real(one, values))
    save_pretrained(tmp_path / "out", model=model, scheme="gguf-q8_0")
    assert max(asked) == 512 and len(asked) > 100
    values = GGUFFile(tmp_path / "out" / "model.gguf").values
    assert json.loads(values["zo_offload.files"]) == ["config.json", "generation_config.json"]
    assert TEXT["vocab_size"] == values["qwen3moe.vocab_size"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert set(dict(checkpoint.build_model().named_parameters())) == set(checkpoint.names)
