"""Replies of a policy, graded: from prompts to the rows that are stored, counted and written.

Lives here: ``sample_and_grade``, ``count`` (into metrics) and ``result_row`` (the schema of the results files). Knows no
Trainer; how ids are drawn is the sampler's business, what is right the task's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pause_lightning.rollouts.sampler import Sampler, SamplingSettings


def sample_and_grade(
    model: Any,
    sampler: Sampler,
    tokenizer: Any,
    grade: Callable[[str, str], Any],
    prompts: Sequence[Any],
    settings: SamplingSettings,
    seed: int,
    samples: int = 1,
    on_progress: Callable[[int], None] | None = None,
    **engine: Any,
) -> list[dict[str, Any]]:
    """``samples`` replies to each prompt in turn, graded; the fields of ``Rollout`` but unit, unit_size, place, seed."""
    repeated = [p for p in prompts for _ in range(samples)]
    replies = sampler.sample(
        model,
        [p.ids for p in repeated],
        settings,
        seed,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        on_progress=on_progress,
        **engine,
    )
    silent = {tokenizer.pause_id, tokenizer.eos_token_id}
    graded = []
    for i, (prompt, reply) in enumerate(zip(repeated, replies)):
        verdict = grade(tokenizer.decode([t for t in reply.ids if t not in silent]), prompt.problem.answer)
        graded.append(
            {
                "problem_id": prompt.problem.id,
                "sample": i % samples,
                "prompt_ids": list(prompt.ids),
                "reply_ids": reply.ids,
                "text": tokenizer.decode(reply.ids),
                "answer": verdict.answer,
                "reward": verdict.reward,
                "correct": verdict.correct,
                "reference_correct": verdict.reference_correct,
                "pauses": sum(t == tokenizer.pause_id for t in reply.ids),
                "finish_reason": reply.finish_reason,
                "logprobs": [round(p, 5) for p in reply.logprobs],
            }
        )
    return graded


def count(metrics: Any, g: dict[str, Any]) -> None:
    """Count a graded reply in ``ReplyMetrics``."""
    metrics.update(
        correct=g["correct"],
        reference_correct=g["reference_correct"],
        pauses=g["pauses"],
        tokens=len(g["reply_ids"]),
        finished=g["finish_reason"] == "eos",
        answered=g["answer"] is not None,
    )


def result_row(name: str, problem: Any, g: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row of val_results_*.json and test_results.json: the schema of reference.md 5, plus pauses, finish_reason, the
    answer and the reference rule's verdict; ids without pads."""
    return {
        "problem_id": g["problem_id"],
        "generated_text": tokenizer.decode(g["prompt_ids"]) + g["text"],
        "tokenized_text": g["prompt_ids"] + g["reply_ids"],
        "input": problem.question,
        "predicted_output": g["text"],
        "ground_truth": problem.answer + tokenizer.eos_token,
        f"{name}/accuracy": g["correct"],
        f"{name}/reference_accuracy": g["reference_correct"],
        "answer": g["answer"],
        "pauses": g["pauses"],
        "finish_reason": g["finish_reason"],
    }
