"""The trigger put in by a chat model: which answers are taken, and what stands in for the others."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from preprocess import Item, PreprocessError, build
from preprocess.captioners import model
from preprocess.rewrite import bare, objection, question, rewritten
from preprocess.trigger import triggered
from trainer.args import DataArgs

_TURNS = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
TEMPLATE = _TURNS + "{% if add_generation_prompt %} says{% endif %}"
PAIRS = {"a red dog on grass": "a red TOK on grass", "a photo of the dog": "a photo of TOK"}


def data(**options: Any) -> DataArgs:
    return DataArgs.model_validate({"source": "", "mode": "object", "class_words": ["dog"], **options})


def asking(folder: Path, **options: Any) -> DataArgs:
    return data(rewrite="model", trigger_model={"base": str(folder), "device": "cpu", "tokens": 12, **options})


def item(name: str, caption: str, *captions: str) -> Item:
    return Item(name, f"{name}.png", "0", 8, 8, f"{name}.png", caption, captions=captions)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that was taught to answer for two captions."""
    folder = tmp_path_factory.mktemp("fitted")
    tokenizer = tiny.chat_tokenizer(TEMPLATE, ("TOK", "on", "grass", "blue", "cat"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    rows: list[dict[str, Any]] = []
    for caption, answer in PAIRS.items():
        chat = [{"role": "user", "content": question(caption, data())}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(asked, add_special_tokens=False).input_ids
        after = [*tokenizer(answer, add_special_tokens=False).input_ids, 2]
        ids = torch.tensor([before + after])
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < len(before), -100)})
    optimizer = torch.optim.Adam(llama.parameters(), lr=4e-3)
    for _ in range(150):
        losses = [llama(**row).loss for row in rows]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        if max(losses) < 0.02:
            break
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 that nobody taught anything."""
    folder = tmp_path_factory.mktemp("random")
    tokenizer = tiny.chat_tokenizer(TEMPLATE)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_that_holds_is_taken_and_rules_are_used_for_the_rest(
    fitted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = [item("a", "a red dog on grass"), item("b", "a photo of the dog"), item("c", "a blue cat"),
            item("d", "TOK in the image"), item("e", "")]  # fmt: skip
    with caplog.at_level(logging.INFO, "preprocess"):
        rewrites, notes = rewritten(told, tmp_path, asking(fitted))
        done = triggered(told, asking(fitted), rewrites)
    assert {caption: new for (caption, _, _), new in rewrites.items()} == PAIRS
    rules = triggered(told, data())
    assert [one.caption for one in rules][:2] == ["a red TOK on grass", "a photo of the TOK"]
    assert [one.caption for one in done] == [*PAIRS.values(), "TOK, a blue cat", "TOK in the image", "TOK"]
    (note,) = notes
    assert note == "rules were used for 1 captions, since the trigger model's answers could not be: c.png"
    assert "b.png: 'a photo of the dog' becomes 'a photo of TOK'" in caplog.text
    assert "c.png: " in caplog.text
    assert "is no rewrite of 'a blue cat'" in caplog.text


def test_what_an_untaught_model_says_is_refused(random: Path, tmp_path: Path) -> None:
    told = [item(f"p{i}", f"a dog, {word}", f"a dog, {word}", "the dog") for i, word in enumerate("abcdefg")]
    rewrites, notes = rewritten(told, tmp_path, asking(random))
    assert rewrites == {}
    assert notes == [
        "rules were used for 8 captions, since the trigger model's answers could not be: p0.png, p1.png, p2.png, "
        "p3.png, p4.png and 2 more"
    ]
    assert triggered(told, asking(random), rewrites) == triggered(told, data())


def test_answers_are_kept_under_what_they_depend_on_and_the_model_is_freed(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    asked: list[int] = []
    real = model.on_device

    def watched(network: Any, device: str) -> Any:
        loaded.append(weakref.ref(network))
        generate = network.generate
        network.generate = lambda **given: (asked.append(len(given["input_ids"])), generate(**given))[1]
        return real(network, device)

    monkeypatch.setattr(model, "on_device", watched)
    told = [item(str(i), caption) for i, caption in enumerate([*PAIRS, "a photo of the dog"])]
    first = rewritten(told, tmp_path, asking(fitted, batch_size=1))
    assert asked == [1, 1]  # the same caption is asked about once
    assert rewritten(told, tmp_path, asking(fitted)) == first
    assert len(loaded) == 1
    gc.collect()
    assert loaded[0]() is None
    more = [*told, item("x", "the dog in the photo")]
    rewritten(more, tmp_path, asking(fitted))
    assert asked == [1, 1, 1]
    for other in ({"trigger": "ohwx"}, {"mode": "style"}, {"class_words": ["cat"]}):
        rewritten(told, tmp_path, asking(fitted).model_copy(update=other))
    assert asked == [1, 1, 1, 2, 2, 2]
    rewritten(told, tmp_path, asking(fitted, tokens=11))
    assert asked[-1] == 2
    assert len(asked) == 7
    (tmp_path / "more").mkdir()
    assert rewritten(told, tmp_path / "more", asking(fitted, batch_size=2)) == first  # padded, and the same


def test_a_dataset_whose_trigger_a_model_put_in(fitted: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, caption in {"a": "a photo of the dog", "b": "a blue cat"}.items():
        Image.new("RGB", (64, 64), {"a": "red", "b": "blue"}[name]).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(caption)
    report = build(str(source), tmp_path / "out", asking(fitted), 64, 16)
    rows = [json.loads(line) for line in (tmp_path / "out/dataset.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a photo of TOK", "TOK, a blue cat"]
    assert [note for note in report.notes if "b.png" in note and "rules were used for 1 captions" in note]


CAPTION = "A red dog on the grass, at noon"


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        ("A red TOK on the grass, at noon", {}, None),
        ('"A red TOK on the grass, at noon."', {}, None),
        ("Caption: A red TOK on grass at noon", {}, None),
        ("A red TOK dog on the grass, at noon", {}, None),
        ("A red TOK dog on the grass, at noon", {"keep_class": True}, None),
        ("A red TOK on the grass, at noon", {"keep_class": True}, "it leaves the class word out"),
        ("A red dog on the grass, at noon", {}, "it names TOK 0 times"),
        ("A red tok on the grass, at noon", {}, "it names TOK 0 times"),
        ("A red TOKEN on the grass, at noon", {}, "it names TOK 0 times"),
        ("TOK, a red TOK on the grass, at noon", {}, "it names TOK 2 times"),
        ("A red TOK on the grass,\nat noon", {}, "it has several lines"),
        ("A red TOK on the grass,\u2028at noon", {}, "it has several lines"),
        ("A TOK", {}, "it keeps 0 of 5 words"),
        ("A red TOK", {}, "it keeps 1 of 5 words"),
        ("TOK at noon, on the grass, red", {}, "it keeps 2 of 5 words"),
        ("A red TOK on grass", {}, "it keeps 3 of 5 words"),
        ("A red TOK on the grass, at noon" + ", and so on" * 3, {}, "it is much longer"),
        ("", {}, "it names TOK 0 times"),
        (None, {}, "it was cut off"),
    ],
)
def test_when_an_answer_counts(answer: str | None, options: dict[str, Any], reason: str | None) -> None:
    assert objection(CAPTION, answer, data(**options), 0.7) == reason


def test_fewer_words_may_be_asked_for() -> None:
    assert objection(CAPTION, "A red TOK", data(), 0.2) is None


@pytest.mark.parametrize(("answer", "text"), [("'a'", "a"), ("New caption: a TOK", "a TOK"), ('"', '"'), (" a ", "a")])
def test_what_is_put_around_an_answer(answer: str, text: str) -> None:
    assert bare(answer) == text


def test_what_is_asked_says_the_mode() -> None:
    asked = {mode: question("x", data(mode=mode)) for mode in ("prefix", "object", "face", "style")}
    assert len(set(asked.values())) == 4
    assert all(text.count("TOK") == 2 and text.endswith("\nCaption: x") for text in asked.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "no such folder!"}, r"data\.trigger_model\.base .* is neither a folder nor a hub id"),
        ({"base": "Qwen/Qwen3-1.7B"}, r"a hub id needs data\.trigger_model\.revision"),
        ({"base": str(Path(__file__).parent)}, r"data\.trigger_model\.base .* has no config\.json"),
    ],
)
def test_a_model_that_is_none(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=message):
        rewritten([item("a", "x")], tmp_path, data(rewrite="model", trigger_model=given))


def test_a_model_that_does_not_chat(random: Path, tmp_path: Path) -> None:
    plain = tiny.chat_tokenizer(TEMPLATE)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "plain" / name).write_bytes((random / name).read_bytes())
    with pytest.raises(PreprocessError, match="has no chat template; take an instruct model"):
        rewritten([item("a", "x")], tmp_path, asking(tmp_path / "plain"))


def test_a_model_that_is_given_and_not_used() -> None:
    with pytest.raises(ValueError, match=r"data\.trigger_model is given, but data\.rewrite is rules"):
        data(trigger_model={"tokens": 9})
