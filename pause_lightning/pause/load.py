"""Reading and writing a policy: tokenizer and model, from a HF folder, the hub, a PEFT adapter folder or from scratch.

Lives here: ``load_tokenizer``, ``load_config``, ``load_model``, ``save_model``. What ``save_model`` writes is an ordinary
HF folder: ``AutoModelForCausalLM.from_pretrained(folder)`` loads it (a pause model needs ``import pause_lightning``).
"""

from __future__ import annotations

import hashlib
import json
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pause_lightning.errors import UserError
from pause_lightning.files import check_sums, new_folder
from pause_lightning.pause.freeze import LoRA, add_lora
from pause_lightning.pause.model import add_pause, is_pause_model, reply_loss_terms
from pause_lightning.pause.modules import HeadKind

ASSETS = Path(__file__).parents[1] / "assets"
QUICKSTART_TOKENIZER = "quickstart"


def load_tokenizer(path: str, pause_token: str | None) -> Any:
    """A HF fast tokenizer, with ``pause_token`` as an ordinary special token (it strips nothing around it).

    Sets ``pause_id`` (or None) and ``sha256`` (of the tokenizer before the pause token was added) on it. pad falls
    back to unk, then EOS; labels never depend on the pad id.

    Raises:
        UserError: nothing loadable at ``path``, a slow tokenizer, or one without an EOS token.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    folder = str(ASSETS / "quickstart_tokenizer") if path == QUICKSTART_TOKENIZER else path
    _check_path(folder, "model.tokenizer")
    if Path(folder).is_dir():
        check_sums(Path(folder), "model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(f"model.tokenizer: cannot load a tokenizer from {path}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"model.tokenizer: {path} has no fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.tokenizer: {path} has no EOS token, so no reply could ever end")
    tokenizer.sha256 = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.pause_id, tokenizer.pause_token_text = None, pause_token
    if pause_token is not None:
        if pause_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(pause_token, special=True)]})
        tokenizer.pause_id = tokenizer.convert_tokens_to_ids(pause_token)
    return tokenizer


def load_config(path: str | None, from_scratch: dict[str, Any] | None, tokenizer: Any) -> Any:
    """The HF configuration of the model that ``load_model`` starts from, without its weights.

    Raises:
        UserError: unknown path or architecture, or neither or both of the two given.
    """
    from transformers import AutoConfig

    if (path is None) == (from_scratch is None):
        raise UserError("give either model.path (a HF folder or hub name) or model.from_scratch (a model configuration)")
    if from_scratch is not None:
        settings = {"vocab_size": len(tokenizer) - (tokenizer.pause_id == len(tokenizer) - 1), **from_scratch}
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise UserError("model.from_scratch needs a model_type, e.g. llama")
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        try:
            return AutoConfig.for_model(model_type, **{"bos_token_id": tokenizer.bos_token_id, **ids, **settings})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model.from_scratch: {_first_line(error)}") from None
    base, _ = _base_of(str(path))
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path: cannot load a causal LM from {path}: {_first_line(error)}") from None


def load_model(
    *,
    path: str | None,
    from_scratch: dict[str, Any] | None,
    tokenizer: Any,
    dtype: torch.dtype,
    pause_token: str,
    head: HeadKind,
    detach_head: bool,
    init_pause_rate: float | None,
    lora: LoRA | None,
    weights: bool = True,
) -> Any:
    """The policy: a HF causal LM, or a PEFT model around one; with pause modules when the tokenizer has a pause id.

    A folder with ``adapter_config.json`` is loaded on its base model and its adapter goes on training. Without
    ``weights`` the same model on the meta device: names, shapes, dtypes and freeze groups, no memory, no file read.

    Raises:
        UserError: unknown path or architecture, an adapter together with ``lora``, settings the model cannot have, a
            file that differs from its SHA256SUMS.
    """
    config = load_config(path, from_scratch, tokenizer)
    base, adapter = (None, None) if path is None else _base_of(path)
    if adapter is not None and lora is not None:
        raise UserError(f"model.lora: {path} is an adapter already and goes on training; set model.lora to null")
    with torch.device("meta") if not weights else nullcontext():
        model = _plain_model(config, base, dtype, weights)
        _check_pauses(model, tokenizer, base, pause_token)
        if tokenizer.pause_id is not None and not is_pause_model(model):
            pause = {"head": head, "detach_head": detach_head}
            if adapter is not None:
                saved = json.loads((Path(adapter) / "config.json").read_text())
                pause = {"head": saved["pause_head"], "detach_head": saved["pause_detach_head"]}
            add_pause(
                model, tokenizer.pause_id, pause_token=pause_token, init_pause_rate=init_pause_rate, **pause  # type: ignore[arg-type]
            )  # fmt: skip
        model.reply_loss_terms = types.MethodType(reply_loss_terms, model)
        if adapter is not None:
            return _with_adapter(model, adapter, weights)
        return add_lora(model, lora, base or "") if lora is not None else model


def _base_of(path: str) -> tuple[str, str | None]:
    """(folder or name of the base model, adapter folder or None) of ``model.path``."""
    _check_path(path, "model.path")
    settings = Path(path) / "adapter_config.json"
    if not settings.exists():
        return path, None
    try:
        base = json.loads(settings.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"model.path: {settings} is damaged ({type(error).__name__})") from None
    _check_path(base, f"the base model of the adapter {path}")
    return base, path


def _plain_model(config: Any, base: str | None, dtype: torch.dtype, weights: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        if base is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        if weights:
            if Path(base).is_dir():
                check_sums(Path(base), "model.path")
            return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (Path(base) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(base)
        return model
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        where = "model.from_scratch" if base is None else f"model.path: cannot load a causal LM from {base}"
        raise UserError(f"{where}: {_first_line(error)}") from None


def _check_pauses(model: Any, tokenizer: Any, base: str | None, pause_token: str) -> None:
    if not is_pause_model(model):
        return
    if tokenizer.pause_id is None:
        raise UserError(f"model.pauses is false, but {base} is a model with pauses")
    if model.config.pause_token_id != tokenizer.pause_id:
        raise UserError(
            f"{base} pauses with id {model.config.pause_token_id}, the tokenizer has {tokenizer.pause_id} for "
            f"{pause_token}: use the tokenizer of that folder"
        )


def _with_adapter(model: Any, adapter: str, weights: bool) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model

    try:
        if weights:
            check_sums(Path(adapter), "model.path")
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        settings = PeftConfig.from_pretrained(adapter)
        settings.inference_mode = False
        return get_peft_model(model, settings)
    except UserError:
        raise
    except Exception as error:  # PEFT and safetensors have no common base class
        raise UserError(f"model.path: cannot load the adapter {adapter}: {_first_line(error)}") from None


def save_model(model: Any, tokenizer: Any, folder: Path, prompt_template: str) -> None:
    """Write an HF model as a folder with tokenizer and SHA256SUMS, atomically. A PEFT model becomes an adapter folder.

    ``config.json`` carries ``prompt_template``, and the tokenizer a chat template that applies it to a question.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.prompt_template = prompt_template
    before, after = prompt_template.split("{question}", 1)
    # generate() is to do what its caller says: no sampling defaults of the base model travel along.
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.chat_template = "{{ " + json.dumps(before) + " + messages[-1]['content'] + " + json.dumps(after) + " }}"
    with new_folder(folder) as new:
        if base is model:
            model.save_pretrained(new)
        else:
            trained = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
            model.save_pretrained(new, save_embedding_layers=any(w.requires_grad for w in trained))
            base.config.save_pretrained(new)
        tokenizer.save_pretrained(new)


def _check_path(path: str, key: str) -> None:
    """A name that can only be a local path must exist: asking the hub for it would be a slow, unclear error."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")
    if not Path(path).expanduser().is_dir() and (looks_local or not path):
        raise UserError(f"{key}: no folder {path}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
