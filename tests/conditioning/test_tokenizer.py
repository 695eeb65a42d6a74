"""A tokenizer made from captions: CLIP's layout, the same files each time, any text has ids."""

import hashlib
import os
import subprocess
import sys

import pytest
from transformers import CLIPTokenizer

from ldm.conditioning import captions_tokenizer
from ldm.errors import UserError


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_words_of_the_captions_are_one_token_each(tokenizer):
    tokens = tokenizer.tokenize("A GREEN square, below  a white circle")
    words = ["a", "green", "square", ",", "below", "a", "white", "circle"]
    assert tokens == [f"{word}</w>" for word in words]


def test_start_end_and_padding(tokenizer):
    ids = tokenizer("a red circle", padding="max_length", max_length=77)["input_ids"]
    size = len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(ids) == 77 and ids[0] == size - 2 and ids[4:] == [size - 1] * 73
    assert tokenizer.model_max_length == 77
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"


def test_unknown_text_falls_back_to_bytes_and_comes_back(tokenizer):
    for text in ("zebra", "naïve café", "日本語", "🦊 ok", "%&?!", "\x00\x7f", "ß"):
        ids = tokenizer(text)["input_ids"][1:-1]
        assert ids and max(ids) < tokenizer.bos_token_id, text
    assert tokenizer.decode(tokenizer("zebra 日本")["input_ids"], skip_special_tokens=True) == "zebra 日本"
    letters = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(letters) == 256


def test_the_layout_is_clips(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    # As in OpenAI's vocabulary: "!" is 0, "a" 64, "!</w>" 256, "a</w>" 320.
    assert [vocabulary[token] for token in ("!", "a", "!</w>", "a</w>")] == [0, 64, 256, 320]


def test_the_same_captions_in_any_order_give_the_same_files(captions, tokenizer_folder, tmp_path):
    captions_tokenizer(reversed(captions), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tokenizer_folder)


@pytest.mark.slow
def test_another_process_with_threads_makes_the_same_files(captions, tokenizer_folder, tmp_path):
    program = (
        "import sys; from ldm.conditioning import captions_tokenizer\ncaptions_tokenizer(sys.argv[2:], sys.argv[1])"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", program, str(tmp_path / "process"), *captions]
    subprocess.run(command, check=True, env=environment)
    assert digests(tmp_path / "process") == digests(tokenizer_folder)


def test_other_tools_read_the_folder(tokenizer_folder, tokenizer):
    files = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert files <= digests(tokenizer_folder).keys()
    plain = CLIPTokenizer.from_pretrained(tokenizer_folder)
    assert plain("a red circle")["input_ids"] == tokenizer("a red circle")["input_ids"]


def test_an_existing_folder_is_loaded_not_made_again(tokenizer_folder):
    before = digests(tokenizer_folder)
    loaded = captions_tokenizer(["something else altogether"] * 3, tokenizer_folder)
    assert "circle</w>" in loaded.get_vocab()
    assert digests(tokenizer_folder) == before
    assert not list(tokenizer_folder.parent.glob(".*"))


def test_the_vocabulary_has_the_size_that_was_asked_for(captions, tmp_path):
    assert len(captions_tokenizer(captions, tmp_path / "small", vocab_size=530)) == 530


def test_what_cannot_be_trained_is_refused(captions, tmp_path):
    with pytest.raises(UserError, match="514"):
        captions_tokenizer(captions, tmp_path / "none", vocab_size=100)
    with pytest.raises(UserError, match="empty"):
        captions_tokenizer([], tmp_path / "none")
    assert not (tmp_path / "none").exists()
