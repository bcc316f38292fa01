"""What happens when ``fit`` ends: test, export of the best model, ``summary.json`` and the last lines on the screen.

Lives here: ``finish_fit``. It runs once, after the loop, and needs nothing but the run folder and the trained module.
"""

from __future__ import annotations

import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pause_lightning.callbacks import PhaseReport, in_order
from pause_lightning.checkpoints import LAST, BestCheckpoints
from pause_lightning.files import write_json
from pause_lightning.module import say
from pause_lightning.stats import mcnemar, show_accuracy
from pause_lightning.strategies import FSDP2Strategy


def finish_fit(trainer: Any, module: Any, data: Any, started: float) -> dict[str, Any]:
    """Test (before the outer loops and after), export ``final/`` (and ``adapter/``), write ``summary.json``.

    The weights are those of the best validation; ``started`` is ``time.monotonic()`` of the start of fit. Returns the
    summary.
    """
    run = Path(trainer.default_root_dir)
    fit_seconds = time.monotonic() - started
    best, score = best_checkpoint(trainer)
    tested: dict[str, list[bool]] = {}
    if trainer.outer_loop.test_after_fit:
        begun = trainer.fit_loop.epoch_index > trainer.outer_loop.warmup_epochs
        before = trainer.fit_loop.start_checkpoint(needed=begun)
        if before.is_file():
            module.load_trained(before)
            tested["before"] = _test(trainer, module, data, "test_before_outer_loops")
        trainer.stop.check()
        module.load_trained(best or run / "checkpoints" / LAST)  # without validation the newest weights are the final ones
        tested["final"] = _test(trainer, module, data, "test")
        trainer.stop.check()
    else:
        module.load_trained(best or run / "checkpoints" / LAST)
    summary: dict[str, Any] = {
        "run": str(run),
        "steps": trainer.global_step,
        "best_checkpoint": None if best is None else str(best),
        "best_val_accuracy": score,
        "seconds": {"fit": round(fit_seconds, 1), "total": round(time.monotonic() - started, 1)},
        "phases": next((c.phases for c in trainer.callbacks if isinstance(c, PhaseReport)), []),
        "data": {"hash": data.hash, **{name: len(rows) for name, rows in data.splits.items()}},
        "seed": data.seed,
        "versions": {p: version(p) for p in ("torch", "lightning", "transformers", "peft")},
        "machine": platform.machine(),
    }
    summary |= {name: metrics for name, metrics in module.metrics_of.items() if name != "val"}
    if "before" in tested:
        lost, gained, p = mcnemar(tested["before"], tested["final"])
        summary["paired_test"] = {"lost": lost, "gained": gained, "p": p}
    state = trainer.strategy.gather(module.state_dict()) if isinstance(trainer.strategy, FSDP2Strategy) else None
    if trainer.is_global_zero:
        export(module, data, run, state)
        write_json(run / "summary.json", _plain(summary))
        _last_lines(summary, module)
    return summary


def best_checkpoint(trainer: Any) -> tuple[Path | None, float | None]:
    """(path, validation accuracy) of the best checkpoint of this fit, if any was written."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, BestCheckpoints) and callback.best_model_path:
            score = callback.best_model_score
            return Path(callback.best_model_path), None if score is None else float(score)
    return None, None


def export(module: Any, data: Any, run: Path, state: dict[str, Any] | None = None) -> None:
    """``final/``: the policy as a plain HF folder (LoRA merged); ``adapter/`` as well when it has LoRA.

    ``state``: the module's gathered state dict, where its own weights are sharded.
    """
    from pause_lightning.pause.load import save_model

    model = module.model
    if state is not None:
        model = module.build(weights=False)
        model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, assign=True)
        (model.get_base_model() if hasattr(model, "get_base_model") else model).tie_weights()
    if hasattr(model, "merge_and_unload"):
        save_model(model, module.tokenizer, run / "adapter", data.prompt_template)
        model = model.merge_and_unload()
    save_model(model, module.tokenizer, run / "final", data.prompt_template)


def _test(trainer: Any, module: Any, data: Any, name: str) -> list[bool]:
    module.test_name = name
    try:
        trainer.test(module, datamodule=data, verbose=False)
        return [row[f"{name}/accuracy"] for row in in_order(trainer, module.results)]
    finally:
        module.test_name = "test"


def _last_lines(summary: dict[str, Any], module: Any) -> None:
    def accuracy(m: dict[str, float]) -> str:
        pauses = f"{m['pauses']:.2f} / {m['pauses_correct']:.2f} / {m['pauses_incorrect']:.2f}"
        return f"{show_accuracy(m['accuracy'], m['accuracy_low'], m['accuracy_high'], int(m['n']))}   pauses {pauses}"

    say("")
    if "test_before_outer_loops" in summary:
        say(f"test, before the outer loops  {accuracy(summary['test_before_outer_loops'])}")
    if "test" in summary:
        say(f"test, final                   {accuracy(summary['test'])}")
        say("                              accuracy with its 95% interval; pauses per reply: all / correct / incorrect")
    if "paired_test" in summary:
        t = summary["paired_test"]
        gain = 100 * (summary["test"]["accuracy"] - summary["test_before_outer_loops"]["accuracy"])
        say(
            f"gain                          {gain:+.1f} points ({t['gained']} gained, {t['lost']} lost, "
            f"exact paired test p = {t['p']:.2g})"
        )
    if "test" in summary and module.pauses and summary["test"]["pauses"] == 0:
        say("no pauses under greedy decoding: a head that learned a low rate everywhere never wins the argmax (README)")
    say(f"time                          {summary['seconds']['fit']:.0f} s fit, {summary['seconds']['total']:.0f} s in all")
    say(f"model                         {summary['run']}/final")


def _plain(value: Any) -> Any:
    """JSON has no NaN: an empty group's mean becomes null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
