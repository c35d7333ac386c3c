"""A tokenizer whose tokens are words of a list: for small models, demos and tests, saved and loaded like any other."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mmkernels.errors import DataError, nearest


def build_word_tokenizer(
    words: Sequence[str],
    *,
    pad_token: str = "<pad>",
    unk_token: str = "<unk>",
    eos_token: str | None = "<eos>",
    bos_token: str | None = None,
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: text is split at whitespace, word number i of the list has id i.

    Args:
        words: every token once, special ones included; the position is the id.
        pad_token, unk_token, eos_token, bos_token: their roles; each must be one of the words.  None = no such token.
        special_tokens: further words that are recognised without whitespace around them, e.g. an image placeholder.

    Returns:
        A tokenizer that pads on the left.

    Raises:
        DataError: a word comes twice, is empty or holds whitespace, or a special token is no word of the list.

    Example:
        >>> tokenizer = build_word_tokenizer(["<pad>", "<unk>", "<eos>", "what", "?"])
        >>> tokenizer("what ?")["input_ids"]
        [3, 4]
    """
    vocab = {word: index for index, word in enumerate(words)}
    if len(vocab) != len(words):
        twice = sorted({word for word in words if list(words).count(word) > 1})
        raise DataError(f"build_word_tokenizer: words must be distinct; got {twice} more than once. Keep the first.")
    broken = [word for word in words if not word or word.split() != [word]]
    if broken:
        raise DataError(
            f"build_word_tokenizer: words must be non-empty and free of whitespace; got {broken[:3]}. Split them."
        )
    named = {"pad_token": pad_token, "unk_token": unk_token, "eos_token": eos_token, "bos_token": bos_token}
    roles = {role: token for role, token in named.items() if token is not None}
    for token in (*roles.values(), *special_tokens):
        if token not in vocab:
            raise DataError(
                f"build_word_tokenizer: {token!r} must be one of the words to be special; got a list without it. "
                f"{nearest(token, vocab)}"
            )
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unk_token))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    extra = [token for token in special_tokens if token not in roles.values()]
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", additional_special_tokens=extra, **roles
    )
    return wrapped


def check_words(tokenizer: Any, text: str, ignore: Sequence[str] = ()) -> None:
    """Refuse words that a word-level tokenizer does not know; any other tokenizer knows every text.

    Args:
        tokenizer: of transformers.
        text: what will be tokenized.
        ignore: words that stand for something else, e.g. an image.

    Raises:
        DataError: naming the word and the nearest known one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, WordLevel):
        return
    vocab = tokenizer.get_vocab()
    for mark in (*ignore, *tokenizer.all_special_tokens):
        text = text.replace(mark, " ")
    for word in text.split():
        if word not in vocab:
            raise DataError(f"text must use known words; got {word!r}. {nearest(word, vocab)}")
