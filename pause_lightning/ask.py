"""``python -m pause_lightning ask``: type a question, see the reply stream with its pauses visible.

Lives here: the command. It loads an exported folder (``runs/<name>/final``) or a run folder, and nothing of Lightning.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pause_lightning.errors import UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m pause_lightning ask", description=__doc__.splitlines()[0])
    p.add_argument("question", nargs="*", help="the question; without it, questions are read from standard input")
    p.add_argument("--model", required=True, help="run folder, exported folder (final/, adapter/) or hub name")
    p.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy (default)")
    p.add_argument("--pause_temperature", type=float, default=1.0, help="multiplies the odds of pausing; 0 forbids them")
    p.add_argument("--gate_temperature", type=float, default=1.0, help="p(pause) = sigmoid(gate logit / this)")
    p.add_argument("--max_new_tokens", type=int, default=400, help="longest reply")
    p.add_argument("--seed", type=int, default=0, help="seed of sampling")
    p.add_argument("--show", default="…", help="how a pause is shown (default: …)")
    return p


def main(argv: list[str]) -> int:
    """Answer questions until there are no more; returns the exit code."""
    args = parser().parse_args(argv)
    folder = Path(args.model)
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"--model: {folder} holds no exported model (no final/ and no config.json)")
    from pause_lightning.rollouts.sampler import SamplingSettings

    settings = SamplingSettings(
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        pause_temperature=args.pause_temperature,
        gate_temperature=args.gate_temperature,
    )
    settings.check("ask")
    ask = _load(str(folder), args.show)
    if args.question:
        ask(" ".join(args.question), settings, args.seed)
        return 0
    while (question := _read()) is not None:
        if question:
            ask(question, settings, args.seed)
    return 0


def _read() -> str | None:
    if sys.stdin.isatty():
        print("question> ", end="", flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _load(path: str, shown: str) -> Any:
    from pause_lightning.__main__ import _quiet

    _quiet()
    import torch

    from pause_lightning.pause.load import load_model, load_tokenizer
    from pause_lightning.pause.model import context_length
    from pause_lightning.rollouts.hf import HFSampler
    from pause_lightning.tasks.prompts import DEFAULT_PROMPT, format_prompt

    saved = Path(path) / "config.json"
    config = json.loads(saved.read_text()) if saved.exists() else {}
    pause_token = config.get("pause_token")
    tokenizer = load_tokenizer(path, pause_token)
    model = load_model(
        path=path,
        from_scratch=None,
        tokenizer=tokenizer,
        dtype=torch.float32,
        pause_token=pause_token or "",
        head="gate",
        detach_head=True,
        init_pause_rate=None,
        lora=None,
    ).eval()
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    room = context_length(model.config)

    def ask(question: str, settings: Any, seed: int) -> None:
        ids = tokenizer(format_prompt(config.get("prompt_template", DEFAULT_PROMPT), question))["input_ids"]
        if room is not None and len(ids) >= room:
            print(f"the question is too long: {len(ids)} tokens, the model holds {room}", file=sys.stderr)
            return
        stream = _Stream(tokenizer, shown)
        reply = HFSampler(batch_size=1).sample(
            model,
            [ids],
            settings,
            seed,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            on_token=stream.take,
        )[0]
        stream.end()
        if reply.finish_reason == "length":
            print("(cut off: no EOS within the room for a reply)")

    return ask


class _Stream:
    """Prints ids as text while they come: only what cannot change any more (a character may need several tokens)."""

    def __init__(self, tokenizer: Any, shown: str) -> None:
        self.tokenizer, self.shown = tokenizer, shown
        self.ids: list[int] = []
        self.printed = ""

    def take(self, token: int) -> None:
        if token == self.tokenizer.eos_token_id:
            return
        if token == self.tokenizer.pause_id:
            self._flush(self.tokenizer.decode(self.ids))
            print(self.shown, end="", flush=True)
            return
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self._flush(text)

    def _flush(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text

    def end(self) -> None:
        self._flush(self.tokenizer.decode(self.ids))
        print()
