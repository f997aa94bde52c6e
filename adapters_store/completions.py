"""Prompts and completions as token ids: the same in training, in golden examples and in the server.

The tokenizer is whatever the backbone came with (a transformers tokenizer); nothing is imported for it here.
"""

from typing import Any


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued: with the tokenizer's own beginning, without an end of text."""
    ids: list[int] = list(tokenizer(prompt, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    is_ended = len(ids) > 1 and ids[-1] == end and list(tokenizer("")["input_ids"])[-1:] == [end]
    return ids[:-1] if is_ended else ids


def joined_ids(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Token ids of a prompt, its completion and the end of text, and where the completion starts (at least 1).

    The completion's tokens are those that it has behind the prompt. Where the prompt's last token would be another one
    in that company, the two are tokenized apart: the model will be asked with the prompt alone.
    """
    before, both = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + completion)
    if both[: len(before)] != before:
        both = before + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    ids = both if end is None else [*both, end]
    return ids, max(1, len(before))
