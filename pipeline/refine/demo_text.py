"""Text encoders and tokenizers of the demo teacher: the classes that FLUX has, small and with no file to download.

A caption is cut into bytes, as any text can be, or into the words that captions of the demo data set are made of, which
a small encoder learns to read in a hundredth of the time; what is no such word is spelled.
"""

from collections import Counter
from itertools import pairwise

from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from pipeline.datasets.birds import ATTRIBUTES

TEXT_TOKENS = 40  # bytes
WORD_TOKENS = 24
_WORDS = sorted({*(value for values in ATTRIBUTES.values() for value in values), *ATTRIBUTES} - {"wing_pattern"})
_PRINTABLE = [chr(code) for code in range(33, 127)]


def byte_level_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is single bytes: the real class, with no file to download."""
    return _clip_tokenizer([], TEXT_TOKENS)


def word_level_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that joins the bytes of the birds' words."""
    return _clip_tokenizer(merges_of(_WORDS), WORD_TOKENS)


def _clip_tokenizer(merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokens += dict.fromkeys(a + b for a, b in merges)
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=max_length)


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, that leave one token of each word.

    `tokenizers` can train them too, but of pairs that are equally frequent it takes first now one, now another.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spelled for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(parts, best) for parts in spelled]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def word_level_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of the birds' words, and of single letters for others."""
    spelled = [("▁", -9.0), *((letter, -9.0) for letter in _PRINTABLE)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *spelled, *(("▁" + word, -1.0) for word in _WORDS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=WORD_TOKENS)


def build_text_encoders(
    words: bool = False,
) -> tuple[CLIPTextModel, CLIPTokenizer, T5EncoderModel, PreTrainedTokenizerBase]:
    """CLIP and T5 with random weights, each with its tokenizer."""
    clip_tokenizer = word_level_clip_tokenizer() if words else byte_level_clip_tokenizer()
    t5_tokenizer = word_level_t5_tokenizer() if words else ByT5Tokenizer(model_max_length=TEXT_TOKENS)
    end = clip_tokenizer.eos_token_id
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, clip_tokenizer, t5, t5_tokenizer
