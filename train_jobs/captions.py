"""What is done to a caption each time its picture is trained on (after ai-toolkit's `dataloader_mixins.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CaptionRules:
    """`dropout_rate`: how often a sample is trained with `dropped` for its caption, usually nothing. Tokens are the
    parts between commas; the first `keep_tokens` stay in place and are never dropped. The trigger word is put in front
    of a caption without it, unless `trigger_in_front` is off."""

    dropout_rate: float = 0.0
    shuffle_tokens: bool = False
    token_dropout_rate: float = 0.0
    keep_tokens: int = 0
    trigger_word: str | None = None
    trigger_in_front: bool = True
    dropped: str = ""

    @property
    def varies(self) -> bool:
        """Whether a text other than the whole caption or none can come of it."""
        return self.shuffle_tokens or self.token_dropout_rate > 0


def with_trigger(text: str, trigger_word: str | None, *, in_front: bool = True) -> str:
    """`toolkit/prompt_utils.py: inject_trigger_into_prompt`: `[trigger]` becomes the word, and with `in_front` a text
    without the word gets it."""
    word = (trigger_word or "").strip()
    text = re.sub(r"\[(?:trigger|name)\]", lambda _: word, text)
    if in_front and word and word not in text:
        text = f"{word} {text}"
    return text.strip()


def varied(text: str, rules: CaptionRules, generator: torch.Generator) -> str:
    """One variant of a caption that has no trigger word put in front yet."""
    tokens = [token.strip() for token in text.split(",") if token.strip()]
    kept, rest = tokens[: rules.keep_tokens], tokens[rules.keep_tokens :]
    if rules.token_dropout_rate > 0:
        draws = torch.rand(len(rest), generator=generator).tolist()
        rest = [token for token, draw in zip(rest, draws, strict=True) if draw >= rules.token_dropout_rate]
    if rules.shuffle_tokens:
        rest = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
    return with_trigger(", ".join([*kept, *rest]), rules.trigger_word, in_front=rules.trigger_in_front)
