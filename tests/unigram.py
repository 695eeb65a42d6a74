"""A Unigram tokenizer of a few words in a folder, as T5 and decoders have theirs."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


def save_unigram(path: Path, captions: Iterable[str], template: str = "$A </s>") -> int:
    """How many tokens it has; `template` says which special tokens stand around a caption."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([caption for caption in captions for _ in range(5)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1), ("<s>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    return len(fast)
