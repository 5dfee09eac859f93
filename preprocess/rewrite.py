"""The trigger put into captions by a small chat model, as an option; what it says counts only if it can be checked.

The model is asked to say a caption again so that it names the trigger. An answer is taken when it is one line, names
the trigger once, is not much longer, and keeps most of the caption's words in their order; else the rules of
`preprocess.trigger` stand in. Captions that name the trigger are not asked about.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from preprocess.captioners import model
from preprocess.captioners.fitting import Fitting
from preprocess.captionfiles import tidy
from preprocess.stagecache import StageKey, remembered_all
from preprocess.trigger import PEOPLE, Rewrites, lacks, named
from preprocess.types import Item, PreprocessError
from trainer.args import DataArgs, TriggerModelArgs
from trainer.rundir import RunDir

VERSION = 1  # raise it when the same model would be asked, or its answers judged, in another way
_NAMED = 5  # pictures that a note names
_LONGER = 8  # words that an answer may have more than the caption

Answer = str | None  # None where it was cut off
Ask = Callable[[Sequence[str]], Sequence[Answer]]

_log = logging.getLogger(__name__)


def rewritten(items: Sequence[Item], root: Path, data: DataArgs) -> tuple[Rewrites, list[str]]:
    """(the captions with the trigger, where the model's answer can be used; notes on the others).

    Raises:
        PreprocessError: there is no such model.
    """
    wanted: dict[tuple[str, str, str], tuple[DataArgs, str]] = {}  # with the first picture that has it
    for item in items:
        own = data.of(item.folder)
        for caption in item.captions or (item.caption,):
            if caption and lacks(caption, own):
                wanted.setdefault((caption, own.trigger, own.mode), (own, item.source))
    if not wanted:
        return {}, []
    questions = [question(caption, own) for (caption, _, _), (own, _) in wanted.items()]
    answers = _answered(questions, root, data.trigger_model)
    found: dict[tuple[str, str, str], str] = {}
    refused: list[str] = []
    for (key, (own, source)), answer in zip(wanted.items(), answers, strict=True):
        reason = objection(key[0], answer, own, data.trigger_model.keeps)
        if reason is None and answer is not None:
            found[key] = tidy(bare(answer))
        else:
            refused.append(source)
            _log.info("%s: %r is no rewrite of %r: %s", source, answer, key[0], reason)
    return found, [_note(refused)] if refused else []


def _note(refused: Sequence[str]) -> str:
    sources = list(dict.fromkeys(refused))
    more = f" and {len(sources) - _NAMED} more" if len(sources) > _NAMED else ""
    return (
        f"rules were used for {len(refused)} captions, since the trigger model's answers could not be: "
        f"{', '.join(sources[:_NAMED])}{more}"
    )


def question(caption: str, data: DataArgs) -> str:
    """What the model is asked about a caption, by the mode of its concept."""
    words = ", ".join(data.class_words or PEOPLE)
    where = {
        "prefix": f"It must name {data.trigger}, which is what the picture shows.",
        "object": f"It must call the thing ({words}) {data.trigger}.",
        "face": f"It must call the person ({words}) {data.trigger}, which is a name.",
        "style": f"It must say that the picture is in the style of {data.trigger}.",
    }[data.mode]
    kept = " Keep the word for what it is, right after it." if data.keep_class else ""
    return (
        f"Rewrite this caption of a picture. {where}{kept} Write {data.trigger} once, exactly so. Change nothing "
        f"else. Answer with the new caption alone, on one line.\nCaption: {caption}"
    )


def bare(answer: str) -> str:
    """Without what chat models put around an answer: quotes, and the word that stood before the question's."""
    text = re.sub(r"(?i)^(new )?caption:\s*", "", answer.strip())
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" else text


def objection(caption: str, answer: str | None, data: DataArgs, keeps: float) -> str | None:
    """Why an answer is not used; None where it is.

    Args:
        answer: None where it was cut off.
        keeps: share of the caption's words, without articles and class words, that must be in it in their order.
    """
    if answer is None:
        return "it was cut off"
    answer = bare(answer)
    if len(answer.splitlines()) > 1:
        return "it has several lines"
    times = len(re.findall(rf"(?<!\w){re.escape(data.trigger)}(?!\w)", answer))
    if times != 1:
        return f"it names {data.trigger} {times} times"
    if len(answer.split()) > len(caption.split()) + _LONGER:
        return "it is much longer"
    called = data.class_words or PEOPLE
    if data.keep_class and not any(named(answer.lower(), word.lower()) for word in called):
        return "it leaves the class word out"
    may_go = {"a", "an", "the", *(part for word in called for part in _words(word))}
    old = [word for word in _words(caption) if word not in may_go]
    same = difflib.SequenceMatcher(None, old, _words(answer), autojunk=False).get_matching_blocks()
    kept = sum(block.size for block in same)
    return f"it keeps {kept} of {len(old)} words" if kept < keeps * len(old) else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _answered(questions: Sequence[str], root: Path, options: TriggerModelArgs) -> list[Answer]:
    place = _place(options)
    key = StageKey("trigger", VERSION, {"model": place.fingerprint(), "tokens": options.tokens})
    answers: list[Answer] = []
    with ExitStack() as stack:
        ask: Ask | None = None
        fitting = Fitting(options.batch_size, "data.trigger_model")

        def make(part: Sequence[str]) -> Callable[[list[int]], Sequence[Answer]]:
            def missing(indices: list[int]) -> Sequence[Answer]:
                nonlocal ask
                if ask is None:
                    _log.info("a model puts the trigger into %d captions", len(questions))
                    ask = stack.enter_context(_loaded(place, options))
                asked = ask
                return fitting(len(indices), lambda here: asked([part[i] for i in indices[here]]))

            return missing

        for start in range(0, len(questions), options.batch_size):
            part = questions[start : start + options.batch_size]
            wanted = [(text.rpartition("Caption: ")[2], key.of(text)) for text in part]
            answers += remembered_all(RunDir(root).cache / "captions", wanted, make(part))
    return answers


def _place(options: TriggerModelArgs) -> model.Place:
    return model.find(
        options,
        "Qwen/Qwen2.5-0.5B-Instruct",
        "7ae557604adf67be50417f59c2c2f167def9a775",
        (),
        "data.trigger_model",
    )


@contextmanager
def _loaded(place: model.Place, options: TriggerModelArgs) -> Generator[Ask]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Mapping[str, Any] = {
        "pretrained_model_name_or_path": place.base,
        "revision": place.revision or "main",
        "trust_remote_code": False,
    }
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, use_safetensors=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PreprocessError(f"data.trigger_model.base {place.base!r} cannot be loaded: {reason}") from error
    if not tokenizer.chat_template:
        raise PreprocessError(f"data.trigger_model.base {place.base!r} has no chat template; take an instruct model")
    with model.on_device(network, model.device_of(options.device, "data.trigger_model")) as network:
        yield _asker(network, tokenizer, options.tokens)


def _asker(network: Any, tokenizer: Any, tokens: int) -> Ask:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stops = model.stops(network)

    def ask(questions: Sequence[str]) -> list[Answer]:
        chats = [[{"role": "user", "content": text}] for text in questions]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
            network.device
        )
        ids = network.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            **model.GREEDY,
        )
        said = ids[:, inputs.input_ids.shape[1] :].tolist()
        return [tokenizer.decode(row, skip_special_tokens=True) if stops.intersection(row) else None for row in said]

    return ask
