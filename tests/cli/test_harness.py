"""lm-eval-harness over an engine: the scores, texts and log-likelihoods are those of its own HFLM, to the last bit."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.texts import write_text_model
from zo_offload import ConfigError, Engine, MeZO

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval): it is optional")

ROWS = [{"question": f"{a} and {b} is", "choices": [str(a + b), str(a * b + 1), "no"], "answer": (a + b) % 3}
        for a in range(2) for b in range(2)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = write_text_model(tmp_path_factory.mktemp("base") / "model", positions=64)
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def tasks(base, cache):
    common = {
        "dataset_path": "json", "test_split": "test", "metadata": {"version": 1},
        "dataset_kwargs": {"data_files": {"test": str(base.parent / "rows.jsonl")}, "cache_dir": str(cache)},
    }  # fmt: skip
    text, first = "{{question}}", "{{choices[0]}}"
    return [
        {**common, "task": "choice", "output_type": "multiple_choice", "doc_to_text": text, "doc_to_choice": "choices",
         "doc_to_target": "answer"},
        {**common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": text,
         "metric_list": [{"metric": "bits_per_byte"}]},
        {**common, "task": "says", "output_type": "generate_until", "doc_to_text": text, "doc_to_target": first,
         "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}},
    ]  # fmt: skip


def scored(lm, base, cache):
    """(results, each request's response) of lm-eval."""
    found = lm_eval.simple_evaluate(model=lm, tasks=tasks(base, cache), bootstrap_iters=0, verbosity="ERROR")
    said = {name: [row["resps"] for row in rows] for name, rows in found["samples"].items()}
    return found["results"], said


def test_it_scores_as_lm_evals_own_class_does(base, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from zo_offload.cli.harness import StreamedLM

    model = AutoModelForCausalLM.from_pretrained(base)
    want = scored(HFLM(model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=2), base, tmp_path)
    assert {len(rows) for rows in want[1].values()} == {len(ROWS)}
    ways = (dict(offload="none"), dict(offload="disk", run_dir=str(tmp_path / "looked-at"), num_slots=2))
    for settings in ways:
        lm = StreamedLM(str(base), batch_size=2, **settings)
        assert scored(lm, base, tmp_path) == want, settings
        lm.engine.close()


def test_a_run_is_evaluated_where_it_is_and_at_an_earlier_step(base, tmp_path):
    from lm_eval.models.huggingface import HFLM

    from zo_offload.cli.harness import StreamedLM

    data = [{"text": row["question"]} for row in ROWS]
    with Engine(str(base), method=MeZO(lr=1e-2, batch_size=2), offload="disk", run_dir=tmp_path / "run") as engine:
        engine.fit(data, steps=2)
        engine.save_pretrained(tmp_path / "tuned")
    found = {}
    for step in (None, 0):
        lm = StreamedLM(tmp_path / "run", batch_size=2, step=step)
        found[step] = scored(lm, base, tmp_path)
        lm.engine.close()
    for step, path in ((None, tmp_path / "tuned"), (0, base)):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert found[step] == scored(
            HFLM(model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=2), base, tmp_path
        )
    assert found[None] != found[0]


@pytest.mark.parametrize(
    "settings, said",
    [(dict(offlod="disk"), "Did you mean offload"), (dict(batch_size="auto"), "give a number"),
     (dict(step=1), "is none"), (dict(parallelize=True), "no setting")],
)  # fmt: skip
def test_what_it_does_not_take_is_refused_by_name(base, settings, said):
    from zo_offload.cli.harness import StreamedLM

    with pytest.raises(ConfigError, match=said):
        StreamedLM(str(base), **settings)
