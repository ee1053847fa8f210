"""Chat messages as text, through the tokenizer's Jinja template, with the characters of the answers.

An answer begins where the template, asked for a generation prompt, ends, and ends where the template with
the answer ends. The template comes from a file, so it runs in Jinja's sandbox.
"""

from functools import lru_cache
from typing import Any


def render_chat(messages: Any, template: str | None) -> tuple[str, tuple[tuple[int, int], ...]]:
    """(text, spans of the assistant's answers in it); ValueError says what is wrong with `messages`."""
    if template is None:
        raise ValueError("has chat messages, but the tokenizer has no chat template")
    if not isinstance(messages, list) or not messages:
        raise ValueError("has no list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError("has a message without the texts `role` and `content`")
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _render(template, messages[:index], prompt=True)
            stop = _render(template, messages[: index + 1], prompt=False)
            if not stop.startswith(start):
                raise ValueError("has an answer that the chat template does not put after its prompt")
            spans.append((len(start), len(stop)))
    return _render(template, messages, prompt=False), tuple(spans)


def _render(template: str, messages: list[dict[str, Any]], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = _compiled(template).render(
            messages=messages, add_generation_prompt=prompt, bos_token="", eos_token=""
        )
        return text
    except (TemplateError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"is refused by the chat template: {error}") from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(f"is refused by the chat template: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
