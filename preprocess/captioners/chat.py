"""Captions that a chat model writes when it is shown a picture and asked: Qwen-VL and JoyCaption, through transformers.

`data.caption_model.prompt` is a style of the model's table or a question in one's own words. Search is greedy. An
answer that `data.caption_model.tokens` cuts off ends with its last whole sentence, or else its last whole tag.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from preprocess.captioners import Write, model
from preprocess.captioners.generated import Generated
from preprocess.types import Item, PreprocessError
from trainer.args import CaptionModelArgs


class _Chat(Generated):
    """Asks `styles[prompt]`, or the prompt itself where it is no style."""

    large = True
    styles: Mapping[str, str]

    def _question(self) -> str:
        prompt = self._options.prompt or "descriptive"
        if re.fullmatch(r"[\w-]+", prompt) and prompt not in self.styles:
            raise PreprocessError(
                f"data.caption_model.prompt {prompt!r} is no style (styles: {', '.join(self.styles)}); a question of "
                "your own has several words"
            )
        return self.styles.get(prompt, prompt)

    def parameters(self) -> Mapping[str, Any]:
        return {**super().parameters(), "prompt": self._question()}

    def _answers(self, network: Any, tokenizer: Any, inputs: Mapping[str, Any]) -> list[str]:
        ids = network.generate(
            **inputs,
            max_new_tokens=self._options.tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **model.GREEDY,
        )
        said = ids[:, inputs["input_ids"].shape[1] :].tolist()
        stops = model.stops(network)
        return [
            whole(tokenizer.decode(row, skip_special_tokens=True), ended=bool(stops.intersection(row))) for row in said
        ]


class QwenVL(_Chat):
    """Qwen2.5-VL and Qwen3-VL (arXiv:2502.13923).

    Their processors need torchvision for videos, which nobody has here: the picture's part of them is used alone.
    """

    styles: Mapping[str, str] = {
        "descriptive": "Describe this picture in one or two plain sentences: what is in it, how it looks, and what is "
        "behind it. Begin with the subject itself. Answer with the description alone.",
        "short": "Say in one short phrase of at most twelve words what this picture shows. Answer with it alone.",
        "tags": "List what this picture shows as short lowercase tags with commas between them. Answer with the list "
        "alone.",
    }

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options,
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "66285546d2b821cf421d4f5eb2576359d3770cd3",
            ("qwen2_5_vl", "qwen3_vl"),
        )
        super().__init__(options, "qwen-vl", place)
        self._asked = self._question()

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

        qwen = self._network(AutoModelForImageTextToText)
        images_of, tokenizer = self._read(Qwen2VLImageProcessorPil), self._read(AutoTokenizer)
        asked = [{"type": "image"}, {"type": "text", "text": self._asked}]
        pad = tokenizer.convert_ids_to_tokens(qwen.config.image_token_id)
        text = _templated(tokenizer, [{"role": "user", "content": asked}], pad)
        with model.on_device(qwen, self._device()) as qwen:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                seen = images_of(images=list(images), return_tensors="pt")
                counts = (seen.image_grid_thw.prod(-1) // images_of.merge_size**2).tolist()
                # Left, so that every answer starts where the text ends.
                words = tokenizer(
                    [text.replace(pad, pad * count) for count in counts],
                    padding=True,
                    padding_side="left",
                    add_special_tokens=False,
                    return_tensors="pt",
                )
                seen.update(input_ids=words.input_ids, attention_mask=words.attention_mask)
                seen["mm_token_type_ids"] = (words.input_ids == qwen.config.image_token_id).int()
                return self._answers(qwen, tokenizer, seen.to(qwen.device, qwen.dtype))

            yield write


class JoyCaption(_Chat):
    """JoyCaption: a Llava of SigLIP and Llama, made to caption pictures that diffusion models are trained on.

    It was trained on these very questions, and answers others less well.
    """

    styles: Mapping[str, str] = {
        "descriptive": "Write a descriptive caption for this image in a formal tone.",
        "casual": "Write a descriptive caption for this image in a casual tone.",
        "short": "Write a short descriptive caption for this image in a formal tone.",
        "prompt": "Write a stable diffusion prompt for this image.",
        "tags": "Write a list of Booru tags for this image.",
    }

    def __init__(self, options: CaptionModelArgs) -> None:
        place = model.find(
            options,
            "fancyfeast/llama-joycaption-beta-one-hf-llava",
            "ebf414ea497a020da0f82df3913e5b6cb8e9663a",
            ("llava",),
        )
        super().__init__(options, "joycaption", place)
        self._asked = self._question()

    @contextmanager
    def loaded(self) -> Generator[Write]:
        from transformers import LlavaForConditionalGeneration, LlavaProcessor

        joy = self._network(LlavaForConditionalGeneration)
        processor = self._read(LlavaProcessor, backend="pil")
        tokenizer = processor.tokenizer
        text = self._text(processor)
        # A template that writes the first token itself must not get a second one.
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        with model.on_device(joy, self._device()) as joy:

            def write(items: Sequence[Item], images: Sequence[Image.Image]) -> list[str]:
                texts = [text] * len(images)
                inputs = processor(
                    images=list(images), text=texts, add_special_tokens=special, padding=True, return_tensors="pt"
                )
                return self._answers(joy, tokenizer, inputs.to(joy.device, joy.dtype))

            yield write

    def _text(self, processor: Any) -> str:
        """JoyCaption's template puts the picture in itself; that of another Llava is told where."""
        system = {"role": "system", "content": "You are a helpful image captioner."}
        told = [{"type": "image"}, {"type": "text", "text": self._asked}]
        try:
            return _templated(processor, [system, {"role": "user", "content": self._asked}], processor.image_token)
        except PreprocessError:
            return _templated(processor, [{"role": "user", "content": told}], processor.image_token)


def _templated(of: Any, chat: list[dict[str, Any]], picture: str) -> str:
    """The chat as the model is used to see it, up to where its answer starts.

    Args:
        of: the processor or tokenizer that has the chat template.
        picture: the token that stands for the picture, which must be in it once.
    """
    if not of.chat_template:
        raise PreprocessError("the captioner's model has no chat template, so it cannot be asked; take another")
    try:
        text = of.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if not isinstance(error, TypeError) and type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise PreprocessError(f"the captioner's chat template cannot be used: {error}") from error
    if text.count(picture) != 1:
        raise PreprocessError(
            f"the captioner's chat template and data.caption_model.prompt hold {text.count(picture)} places for a "
            f"picture ({picture}), and it needs one"
        )
    return text


def whole(text: str, *, ended: bool) -> str:
    """The answer, up to its last whole sentence or else tag where it was cut off."""
    text = text.strip()
    if ended:
        return text
    sentence = re.match(r"(?s).*[.!?](?=[\s\"']|$)", text)
    if sentence:
        return sentence[0]
    return text.rpartition(",")[0].strip() or text
