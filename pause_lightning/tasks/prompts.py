"""The prompt a question is put into. The default is the reference's (reference.md 1.2), to the letter."""

from __future__ import annotations

from pause_lightning.errors import UserError

DEFAULT_PROMPT = "### INPUT: {question}\n\n ### Answer:"


def format_prompt(template: str, question: str) -> str:
    """``template`` with ``{question}`` replaced. Raises: UserError if it has no ``{question}``."""
    if "{question}" not in template:
        raise UserError("data.prompt_template has no {question}")
    return template.replace("{question}", question)
