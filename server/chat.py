"""From the messages of a chat to the prompt's text, by the chat template of the backbone's tokenizer and no other."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from server.completions_schema import HALF_A_CHARACTER, Message, is_whole
from server.errors import BadInputError

# A template is a program.
_TEMPLATE_FAILURES = (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


def prompt_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The prompt, special tokens written out in it, up to where the assistant begins to speak.

    Raises BadInputError if the tokenizer has no template, or its template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise BadInputError(
            "this backbone's tokenizer has no chat template, so nobody knows how it was taught to converse; "
            "send the text to continue to /v1/completions"
        )
    told = [message.for_template() for message in messages]
    if "developer" not in str(tokenizer.chat_template):  # what OpenAI called system before
        told = [one | {"role": "system"} if one["role"] == "developer" else one for one in told]
    try:
        text: str = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    except _TEMPLATE_FAILURES as error:
        raise BadInputError(f"the backbone's chat template refuses these messages: {error}") from error
    if not is_whole(text):
        raise BadInputError(f"messages: {HALF_A_CHARACTER}")
    return text
