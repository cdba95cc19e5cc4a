"""The tokenizer in a GGUF file, rebuilt so that it gives the ids it gave where the model comes from.

Byte-level BPE is built here, because how text is cut before merging stands in the file only as a name: a name that is
not in the table is refused, since a near guess would change ids without a word. SentencePiece vocabularies are left to
transformers' own converter.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.models.gguf_header import Header

__all__ = ["tokenizer_of"]

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_SINGLE_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_LLAMA3 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS % r"\p{N}{1,3}"), "isolated"), _BYTES])
_QWEN2 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS % r"\p{N}"), "isolated"), _BYTES])
_CUTS = {  # by the names that llama.cpp gives to ways of cutting text before merging
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(header: Header) -> PreTrainedTokenizerBase:
    """The file's tokenizer with its special tokens and chat template.

    Raises ModelError if the vocabulary is of a kind, or cut in a way, that is not known here.
    """
    kind = header.values.get("tokenizer.ggml.model")
    if kind == "llama":
        return AutoTokenizer.from_pretrained(header.file.parent, gguf_file=header.file.name)
    if kind != "gpt2":
        raise ModelError(f"{header.file}: its tokenizer is of the kind {kind!r}; known are gpt2 and llama")
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(header),
        chat_template=header.values.get("tokenizer.chat_template"),
        model_max_length=int(header.number("context_length")),
        clean_up_tokenization_spaces=False,
        **_special_tokens(header),
    )


def _byte_level(header: Header) -> Tokenizer:
    cut = header.values.get("tokenizer.ggml.pre")
    if cut not in _CUTS:
        raise ModelError(
            f"{header.file}: its tokenizer cuts text the way {cut!r}, which is not known here (known are "
            f"{', '.join(_CUTS)}); use the model's safetensors folder instead"
        )
    tokens: list[str] = header.required("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(_merging(header, tokens, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _CUTS[cut]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _ends(header, tokens)
    kinds = list(zip(tokens, header.required("tokenizer.ggml.token_type"), strict=True))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in kinds if kind == _USER_DEFINED])
    return tokenizer


def _merging(header: Header, tokens: list[str], *, ignore_merges: bool) -> models.BPE:
    merges = [tuple(merge.split(" ", 1)) for merge in header.required("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"{header.file}: its tokenizer is damaged ({error}); fetch the file again") from error


def _ends(header: Header, tokens: list[str]) -> processors.PostProcessor:
    """What is put before and after a text, if the file asks for it."""
    plain = processors.ByteLevel(trim_offsets=False)
    ends = {
        place: header.required(f"tokenizer.ggml.{place}_token_id")
        for place in ("bos", "eos")
        if header.values.get(f"tokenizer.ggml.add_{place}_token")
    }
    if not ends:
        return plain
    pieces = [[tokens[ends["bos"]]] if "bos" in ends else [], ["$A"], [tokens[ends["eos"]]] if "eos" in ends else []]
    around = processors.TemplateProcessing(
        single=[piece for group in pieces for piece in group],
        special_tokens=[(tokens[index], index) for index in set(ends.values())],
    )
    return processors.Sequence([plain, around])


def _special_tokens(header: Header) -> dict[str, str]:
    tokens = header.required("tokenizer.ggml.tokens")
    ids = {name: header.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}
