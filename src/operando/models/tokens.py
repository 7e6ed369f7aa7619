"""Between text and ids: which tokenizer a folder means, and whether a text survives it.

A tokenizer that changes a text does so in silence, and the model answers another question than the
one asked. So every prompt, stop text and training text is decoded again before it is used.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from operando.errors import UserError
from operando.text import encodable, lone_surrogate


def load_tokenizer(where: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id: what its tokenizer.json says, where it has one.

    AutoTokenizer goes by the model's type: for "qwen2" it builds Qwen2's own normaliser, splitter
    and decoder around the file's vocabulary, whatever the file asks for. OSError and ValueError are
    transformers' own.
    """
    file = cached_file(
        where, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    kind = AutoTokenizer if file is None else PreTrainedTokenizerFast
    tokenizer = kind.from_pretrained(where, revision=revision or "main")
    assert isinstance(tokenizer, PreTrainedTokenizerBase), type(tokenizer)
    return tokenizer


# --- text to ids ---------------------------------------------------------------------------------


def text_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str
) -> list[list[int]]:
    """Return the ids of texts as they stand, no special token added.

    A text that the ids don't hold is a UserError, which names `what`; see `lost_in_ids`.
    """
    for text in texts:
        if lone_surrogate(text) is not None:
            raise UserError(f"{what}: a lone surrogate, which is not a character: {text[:200]!r}")
    rows: list[list[int]] = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    )
    for text, ids in zip(texts, rows, strict=True):
        lost = lost_in_ids(tokenizer, text, ids)
        if lost is not None:
            raise UserError(
                f"{what}: the tokenizer ({type(tokenizer).__name__}) does not hold this text. "
                f"{lost}. Expected a tokenizer whose ids decode to the text; see tokenizer.json "
                "and tokenizer_config.json of the model"
            )
    return rows


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str
) -> list[list[int]]:
    """Return the ids of raw texts that a model will continue: one beginning, no end of sequence.

    Beginning-of-sequence stands first where the tokenizer adds it or the text spells it, never
    twice. What the tokenizer would append (end-of-sequence) is left out.
    """
    start = list(start_ids(tokenizer))
    rows = text_ids(tokenizer, texts, what)
    return [row if row[: len(start)] == start else start + row for row in rows]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text: beginning-of-sequence, or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    raise UserError(
        f"the tokenizer ({type(tokenizer).__name__}) reads 'a' as {plain}, and as {whole} with its "
        "special tokens: expected the same ids between them"
    )


def lost_in_ids(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> str | None:
    """Return what ids lose of their text, in words, or None.

    Not lost: accents that are composed (NFC), spaces that the tokenizer adds between pieces, and
    whitespace beside an added token that is declared to take it (lstrip, rstrip): Phi-3's
    "<|user|>\\n" is one id, in vLLM as here.
    """
    back = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(back, str), type(back)
    if back == text:
        return None
    asked, got = (
        _without_taken(tokenizer, unicodedata.normalize("NFC", one)) for one in (text, back)
    )
    at = 0
    for char in got:
        if at < len(asked) and char == asked[at]:
            at += 1
        elif char != " ":
            break
    else:
        if at == len(asked):
            return None
    lost, added = Counter(asked) - Counter(got), Counter(got) - Counter(asked)
    told = [
        f"{verb} {', '.join(f'{char!r} x {n}' for char, n in list(chars.items())[:8])}"
        for verb, chars in (("Lost:", lost), ("In their place:", added))
        if chars
    ]
    near = f"{asked[max(0, at - 20) : at + 20]!r} comes back as {got[max(0, at - 20) : at + 20]!r}"
    return ". ".join([*told, near])


def _without_taken(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text without the whitespace that its added tokens take with them."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.content in text and (token.lstrip or token.rstrip):
            before, after = (r"\s*" if taken else "" for taken in (token.lstrip, token.rstrip))
            spelled = re.compile(before + re.escape(token.content) + after)
            text = spelled.sub(lambda _, content=token.content: content, text)
    return text


# --- ids to text ---------------------------------------------------------------------------------


def completion_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text that a model wrote, as rewards, stops and verifiers read it.

    Without beginning, end and padding tokens. Every other special token stands as it is spelled:
    a <think> that is registered as special is part of the answer. So do control characters, which
    a report spells out; a lone surrogate, which a decoder in Python may leave, is U+FFFD.
    """
    hidden = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    shown = [i for i in ids if i not in hidden]
    text = tokenizer.decode(shown, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), type(text)
    return encodable(text)


def check_stop(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], stop: Sequence[str]
) -> None:
    """Raise for a stop text that no completion could hold.

    A stop text is an end token as it is spelled, or a text that makes the round trip and holds no
    beginning, end or padding token.
    """
    ends = {str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids}
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    never = sorted(ends | {str(token) for token in special if token is not None})
    for text in stop:
        if text in ends:
            continue
        for token in never:
            if token in text:
                raise UserError(
                    f"rollout.stop = {text!r} can't be found: {token!r} is never part of a "
                    f"completion's text. Completions end at {', '.join(sorted(ends))} without "
                    "being told to; another end token belongs into eos_token_id of the model's "
                    "generation_config.json"
                )
        text_ids(tokenizer, [text], f"rollout.stop = {text!r}")
