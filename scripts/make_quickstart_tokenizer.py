"""Make the quickstart's tokenizer: a byte-level BPE of 512 pieces in which every digit is a piece of its own.

Trained on generated word problems and the default prompt; written to pause_lightning/assets/quickstart_tokenizer. Any
text round-trips, as every byte is a piece. Run it after a change of the word problems' texts.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pause_lightning.tasks import WordProblems
from pause_lightning.tasks.prompts import DEFAULT_PROMPT, format_prompt

OUT = Path(__file__).parents[1] / "pause_lightning" / "assets" / "quickstart_tokenizer"


def main() -> None:
    problems = WordProblems(num_train=4000, num_test=1, steps=[1, 2, 3]).load()["train"]
    texts = [format_prompt(DEFAULT_PROMPT, p.question) + p.answer for p in problems]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[^\s\d\w]+| ?[^\W\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|pad|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")
    fast.save_pretrained(OUT)
    size = sum(f.stat().st_size for f in OUT.iterdir())
    print(f"{len(fast)} pieces, {size:,} bytes in {OUT}")


if __name__ == "__main__":
    main()
