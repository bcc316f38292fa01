"""A plan of memory and time per GPU for any configuration, by number of GPUs and strategy. Nothing is run on a GPU.

    python scripts/estimate.py --config mistral7b_gsm8k [--devices 1 8] [--strategy ddp fsdp2] [any option of `fit`]

Lives here: the model of memory and time that docs/scaling.md explains. The policy is built by the package on the meta
device; activations are counted by running its backbone on fake tensors: no weights are read, none are allocated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import urllib.request
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch

from pause_lightning.__main__ import _quiet
from pause_lightning.errors import UserError, as_user_error

GB = 1e9
NODE = 8  # GPUs in a node
CHOICES = {"gpu": ("a100", "h100", "h200"), "strategy": ("ddp", "fsdp2", "fsdp2_sharded")}  # last: generate_sharded: true


class GPU(NamedTuple):
    """Bytes of memory, and peaks per second: FLOP, bytes of memory, bytes one way to a GPU of its node, of another."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float


# NVIDIA's data sheets: memory, dense bf16, plain float32 (torch's default for matmul is no TF32), HBM; NVLink is stated
# for both ways together (A100 600, H100 and H200 900 GB/s), so half of it here. The network is that of DGX systems: an
# InfiniBand card per GPU, HDR 200 Gbit/s (A100) or NDR 400 Gbit/s (H100, H200).
GPUS = {
    "a100": GPU(80 * GB, 312e12, 19.5e12, 2.0e12, 300 * GB, 25 * GB),
    "h100": GPU(80 * GB, 989e12, 67e12, 3.35e12, 450 * GB, 50 * GB),
    "h200": GPU(141 * GB, 989e12, 67e12, 4.8e12, 450 * GB, 50 * GB),
}


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": vocab}
    ids = {"num_attention_heads": heads, "num_key_value_heads": kv, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return {"model_type": "llama", "tie_word_embeddings": False, **shape, **ids, **more}


# config.json of models of the hub, as published; ``pieces``: the tokenizer's, where the embedding table is longer.
SMOLLM2 = _llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, tie_word_embeddings=True)
KNOWN = {
    "mistralai/Mistral-7B-v0.1": _llama(
        4096, 14336, 32, 32, 8, 32000, max_position_embeddings=32768, model_type="mistral", sliding_window=4096
    ),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8, 128256, max_position_embeddings=131072),
    "Qwen/Qwen2.5-7B": _llama(
        3584, 18944, 28, 28, 4, 152064, max_position_embeddings=131072, model_type="qwen2", pieces=151665
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "models/smollm2-135m": SMOLLM2,  # where scripts/get_smollm2.py puts it
}
# GSM8K's training split with the default prompt, in tokens of SmolLM2, EOS included, without pauses: measured by us.
GSM8K = SimpleNamespace(problems=7473, prompt=68.0, longest=231, reply=126.0)


@dataclass
class Options:
    """What is assumed; every field is an option of the same name. None of it was measured on a GPU by us."""

    gpu: str = "h100"
    devices: list[int] = field(default_factory=lambda: [1, 4, 8, 64])
    strategy: list[str] = field(default_factory=lambda: ["ddp", "fsdp2"])
    device_memory_gb: float = 0.0  # 0: the data sheet's
    reserve_gb: float = 4.0  # assumption: CUDA context, NCCL, fragmentation of the allocator
    mfu: float = 0.35  # assumption: share of the peak FLOP/s in SFT and in reading prompts
    bandwidth_share: float = 0.6  # assumption: share of the memory's bandwidth in decoding
    link_share: float = 0.7  # assumption: share of the links' bandwidth in collectives
    layer_overhead_us: float = 800.0  # assumption: Python and kernel launches of one layer, once
    useful_share: float = 0.55  # mean reply / longest of a batch; .53 to .64 measured on a CPU (generate, SmolLM2, GSM8K)
    padding: float = 1.06  # tokens with padding per token; 5.6% measured with batches of 8 by length
    kept: float = 0.4  # assumption: share of the replies that an outer loop keeps
    problems: int = 0  # 0, here and below: of the data, if they are on this machine, else of GSM8K
    prompt_tokens: float = 0.0
    reply_tokens: float = 0.0
    longest_prompt: int = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """(our options, what is left for the package's command line). Raises: UserError."""
    parser = _Parser(prog="estimate.py", description=f"{__doc__}".split("\n")[0], allow_abbrev=False)
    for f in fields(Options):
        default = getattr(Options(), f.name)
        first, many = (default[0], "+") if isinstance(default, list) else (default, None)
        text, kind = f"default {default}", type(first)
        parser.add_argument(f"--{f.name}", type=kind, default=default, nargs=many, choices=CHOICES.get(f.name), help=text)
    known, rest = parser.parse_known_args(argv)
    for name, value in vars(known).items():
        if name in ("mfu", "bandwidth_share", "link_share", "useful_share", "kept") and not 0 < value <= 1:
            raise UserError(f"--{name} must be in (0, 1], got {value}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name} must not be negative, got {value}")
    if min(known.devices) < 1:
        raise UserError(f"--devices must be at least 1, got {min(known.devices)}")
    return Options(**vars(known)), rest


def configured(arguments: list[str]) -> Any:
    """The package's command line for ``fit``, parsed, with its module and data module; nothing is run."""
    from pause_lightning.cli import PauseCLI

    class Plan(PauseCLI):
        def before_instantiate_classes(self) -> None: ...

        def instantiate_trainer(self, **_: Any) -> None: ...

        def _set_seed(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return Plan(["fit", *arguments])


def stand_in(module: Any, folder: str) -> str:
    """Give ``module`` the published architecture of its hub name, in ``folder``. Returns what the model is."""
    path = module.path
    if path is None or Path(path).is_dir():
        return path or "a model from scratch"
    if path not in KNOWN:
        import huggingface_hub.constants as hub

        try:
            urllib.request.urlopen(hub.ENDPOINT, timeout=5).close()
        except OSError:
            hub.HF_HUB_OFFLINE = True  # its client would go on trying for most of a minute
        try:
            _ = module.tokenizer, module.context_length
        except UserError:
            known = ", ".join(KNOWN)
            raise UserError(f"model.path: {path} is no folder, the hub does not give it; known here are {known}") from None
        return f"{path}, from the hub"
    settings = dict(KNOWN[path])
    pieces = settings.pop("pieces", settings["vocab_size"])
    Path(folder, "config.json").write_text(json.dumps(settings))
    module.tokenizer = SimpleNamespace(pause_id=pieces if module.pauses else None)
    module.path = folder
    return f"{path}, as published (a table of this script)"


def settings(cli: Any, o: Options) -> SimpleNamespace:
    """What of the configuration and of the data matters here; lengths in tokens."""
    module, data, trainer = cli.model, cli.datamodule, cli.config["fit"]["trainer"]
    c, outer = SimpleNamespace(**vars(GSM8K), source="GSM8K's, in SmolLM2's tokens"), trainer["outer_loop"]
    if isinstance(module.tokenizer, SimpleNamespace) or not Path(getattr(data.task, "path", ".")).is_dir():
        c.val = math.ceil(c.problems * data.val_fraction)
        c.problems = min(c.problems - c.val, data.problems_per_loop or math.inf)
    else:
        data.use(module.tokenizer, module.context_length)
        data.setup()
        prompts = [len(p.ids) for unit in data.rollout_units(0) for p in unit.prompts]
        replies = [len(e.reply_ids) for e in data.warmup_examples(0)]
        c.problems, c.val, c.longest, c.source = len(prompts), len(data.splits["val"]), max(prompts), "the data's"
        c.prompt, c.reply = sum(prompts) / len(prompts), sum(replies) / len(replies)
    c.problems, c.prompt = o.problems or c.problems, o.prompt_tokens or c.prompt
    c.reply, c.longest = o.reply_tokens or c.reply, o.longest_prompt or c.longest
    c.mixed, c.checkpointing = "mixed" in str(trainer["precision"]), module.gradient_checkpointing
    c.samples, c.sft_epochs, c.accumulate = outer.samples_per_problem, outer.sft_epochs, trainer.accumulate_grad_batches
    c.batch, c.unit, c.eval_batch = data.batch_size, data.problems_per_unit, data.eval_batch_size
    c.refills = hasattr(module.sampler, "slots")  # the continuous engine; of other engines batches are assumed
    c.slots = getattr(module.sampler, "slots", getattr(module.sampler, "batch_size", 64))
    c.slots = min(c.slots, max(c.unit * c.samples, c.eval_batch))
    room = (module.context_length or math.inf) - c.longest
    if room < 1:
        raise UserError(f"--longest_prompt {c.longest} leaves no room in the model's context of {module.context_length}")
    c.max_new = int(min(module.rollout_sampling.max_new_tokens, room))
    c.width = c.longest + c.max_new
    return c


def policy(module: Any, c: SimpleNamespace) -> SimpleNamespace:
    """What the policy of ``module`` holds, and keeps for the backward pass of the largest SFT batch. Raises: UserError."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pause_lightning.pause.freeze import named_groups, trainable_table
    from pause_lightning.strategies import decoder_layers

    model = module.build(weights=False)
    hf = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [list(layer.parameters()) for layer in decoder_layers(hf)]
    groups = [(group, p.numel(), p.requires_grad) for _, p, group in named_groups(model)]
    p = SimpleNamespace(table=trainable_table(model), layers=len(layers), weights={})
    for w in model.parameters():
        p.weights[w.dtype] = p.weights.get(w.dtype, 0) + w.nbytes
    p.whole, p.trained = sum(p.weights.values()), sum(n for _, n, trains in groups if trains)
    p.adamw = 8 * p.trained + 4 * sum(trains for *_, trains in groups)  # two moments, and a step count per tensor
    p.layer = max(sum(w.nbytes for w in layer) for layer in layers)
    p.layer_gradients = max(sum(4 * w.numel() for w in layer if w.requires_grad) for layer in layers)
    p.root = p.whole - sum(w.nbytes for layer in layers for w in layer)
    # autocast keeps a bf16 copy of every float32 matrix that trains until the forward pass is over, under FSDP2 too
    p.casts = c.mixed * sum(2 * w.numel() for layer in layers for w in layer if w.requires_grad and w.ndim > 1)
    p.body = sum(n for group, n, _ in groups if group in ("body", "lora"))
    head = hf.get_output_embeddings().weight
    p.head, p.vocabulary = head.numel(), head.shape[0]
    p.backward = any(trains and group not in ("pause_head", "lm_head") for group, _, trains in groups)
    with FakeTensorMode():
        _fake(model)
        p.cache, p.half = _cache(hf.eval(), c)
        hf.gradient_checkpointing_disable()
        p.saved = {False: _saved(model.train(), hf, c)}
        hf.gradient_checkpointing_enable({"use_reentrant": False})
        p.saved[True] = _saved(model, hf, c)
    p.layer_saved = p.saved[False] / p.layers
    return p


def _fake(model: Any) -> None:
    """Replace the tensors of ``model`` by fake ones on the CPU, in place; tied ones stay tied."""
    made: dict[Any, Any] = {None: None}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p not in made:
                made[p] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            module._parameters[name] = made[p]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype)


def _cache(hf: Any, c: SimpleNamespace) -> tuple[int, bool]:
    """(bytes of keys and values per token in rollouts; whether they are bf16)."""
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if c.mixed else nullcontext()
    with torch.no_grad(), autocast:
        cache = hf(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.nbytes for t in tensors), tensors[0].dtype == torch.bfloat16


def _saved(model: Any, hf: Any, c: SimpleNamespace) -> int:
    """Bytes that the backbone's forward pass keeps for the backward pass, parameters not counted."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its number is not given away again
        return tensor

    ids = torch.zeros(c.batch, c.width, dtype=torch.long)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if c.mixed else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(hf, hf.base_model_prefix)(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(storage.nbytes() for storage in kept.values())


def memory(p: Any, c: Any, devices: int, strategy: str) -> dict[str, float]:
    """Bytes per GPU. ``SFT`` and ``rollouts`` are the peaks, ``SFT*`` with gradient checkpointing the other way round."""
    shards = devices if strategy != "ddp" else 1
    gathered = 0 if shards == 1 else p.root + 2 * p.layer + p.layer_gradients  # a layer in use, the next on its way
    buckets = 4 * p.trained if shards == 1 < devices else 0
    use = {"weights": p.whole / shards + gathered, "gradients": 4 * p.trained / shards + buckets, "AdamW": p.adamw / shards}
    static = sum(use.values())
    # float32 logits of the label positions: all, those that are no pause, and their log-softmax or its gradient
    logits = 12 * p.vocabulary * c.batch * c.max_new
    # recomputing a layer: what it keeps, and about a third more for the gradients in it
    peaks = {False: p.saved[False] + logits, True: p.saved[True] + max(logits + p.casts, 1.33 * p.layer_saved)}
    use |= {"activations": peaks[c.checkpointing] - logits, "logits": logits}
    use |= {"SFT": static + peaks[c.checkpointing], "SFT*": static + peaks[not c.checkpointing]}
    whole = p.whole if shards == 1 else p.whole / shards + (gathered if strategy == "fsdp2_sharded" else p.whole)
    use |= {"weights, rollouts": whole + p.casts, "KV cache": p.cache * c.slots * c.width}
    prompts = p.layer_saved / (c.batch * c.width) * c.slots * c.longest  # at most: what one layer would keep
    use["rollouts"] = whole + p.casts + use["AdamW"] + buckets + use["KV cache"] + prompts + 16 * c.slots * p.vocabulary
    return use


def times(p: Any, c: Any, o: Options, n: int, strategy: str) -> dict[str, float]:
    """Seconds of one outer loop's phases and of a decoding step, and optimiser steps of its SFT, on ``n`` GPUs."""
    gpu = GPUS[o.gpu]
    moved = (n - 1) / n / (o.link_share * (gpu.link if n <= NODE else gpu.network))  # seconds a byte, gathered in a ring
    overhead = p.layers * o.layer_overhead_us * 1e-6
    rate, rollout_rate = (o.mfu * (gpu.bf16 if half else gpu.fp32) for half in (c.mixed or p.half, p.half))
    # forward, gradients of activations, recomputation; and gradients of the weights that train
    passes = 1 + p.backward * (1 + c.checkpointing)
    tokens, labels = c.batch * (c.prompt + c.reply) * o.padding, c.batch * c.reply
    flop = tokens * 2 * (p.body * passes + p.trained) + labels * 2 * p.head * (1 + p.backward)
    talk = moved * (8 * p.trained if strategy == "ddp" else passes * p.whole + 4 * p.trained)
    update = 28 * p.trained / (1 if strategy == "ddp" else n) / gpu.bandwidth  # reads and writes of AdamW
    batches = math.ceil(math.ceil(c.problems * c.samples * o.kept / c.batch) / n)
    steps = c.sft_epochs * math.ceil(batches / c.accumulate)
    sft = c.sft_epochs * batches * max(flop / rate, passes * overhead, talk) + steps * update
    # every step of a sharded generate() gathers the weights
    gather = moved * p.whole if strategy == "fsdp2_sharded" else 0.0
    read = (p.whole + p.cache * c.slots * c.width) / (o.bandwidth_share * gpu.bandwidth)
    decode = max(read, 2 * c.slots * (p.body + p.head) / rollout_rate, overhead, gather)
    prompts = max(2 * c.slots * c.prompt * p.body / rollout_rate, overhead, gather)

    def sample(problems: float, samples: int, unit: int) -> float:
        """Blocks of problems are dealt out to the GPUs. Batches run until their last reply ends, and so does a block."""
        blocks, replies = math.ceil(math.ceil(problems / unit) / n), min(unit, problems) * samples
        batches, last = math.ceil(replies / c.slots), min(c.reply / o.useful_share, c.max_new)
        steps = max(0, replies / c.slots - 1) * c.reply + last if c.refills else batches * last
        return blocks * (batches * prompts + steps * decode)

    phases = {"rollouts": sample(c.problems, c.samples, c.unit), "validation": sample(c.val, 1, c.eval_batch), "SFT": sft}
    return {**phases, "loop": sum(phases.values()), "decoding step": decode, "steps": steps}


def plan(cli: Any, o: Options) -> str:
    """What is printed. Raises: UserError."""
    with tempfile.TemporaryDirectory() as folder:
        source = stand_in(cli.model, folder)
        c = settings(cli, o)
        p = policy(cli.model, c)
    limit = GB * o.device_memory_gb or GPUS[o.gpu].memory
    rows = [(n, s if n > 1 else "auto", s) for n in o.devices for s in (o.strategy if n > 1 else ["ddp"])]
    held, spent = [], []
    for n, name, strategy in rows:
        use, time = memory(p, c, n, strategy), times(p, c, o, n, strategy)
        fits = max(use["SFT"], use["rollouts"]) + o.reserve_gb * GB <= limit
        held.append([str(n), name, *(f"{v / GB:.1f}" for v in use.values()), "yes" if fits else "**no**"])
        *minutes, step, steps = time.values()
        spent.append([str(n), name, *(f"{v / 60:.2f}" for v in minutes), f"{1000 * step:.0f} ms", str(steps)])
    tables = [[["GPUs", "strategy", *use, "fits"], *held], [["GPUs", "strategy", *time], *spent]]
    first, second = ("\n".join(f"| {' | '.join(r)} |" for r in [t[0], ["---"] * len(t[0]), *t[1:]]) for t in tables)
    dtypes = ", ".join(f"{v / GB:.2f} GB {str(k).removeprefix('torch.')}" for k, v in p.weights.items())
    on, other = ("on", "off") if c.checkpointing else ("off", "on")
    return f"""{source}
{p.table}
weights: {dtypes}; gradient checkpointing {on}; SFT batches of {c.batch} per GPU, at most {c.width} tokens long
an outer loop: {c.problems} problems x {c.samples}, {o.kept:.0%} of the replies kept (assumed); validation on {c.val}
tokens ({c.source}, unless given): prompt {c.prompt:.0f}, longest {c.longest}; reply {c.reply:.0f}, at most {c.max_new}

Peak GB (1e9 bytes) per GPU of {limit / GB:.0f}, {o.reserve_gb:.0f} of them in reserve. SFT*: with checkpointing {other}

{first}

Minutes per outer loop on {o.gpu}, if the assumptions hold (--help lists them); steps: of the optimiser

{second}"""


def main(argv: list[str]) -> int:
    _quiet()
    try:
        options, rest = parse(argv)
        print(plan(configured(rest), options))
    except Exception as error:
        if (ours := as_user_error(error)) is None:
            raise
        print(f"estimate: {ours}", file=sys.stderr)
        return ours.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
