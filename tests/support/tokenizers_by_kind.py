"""Small tokenizers of the kinds that BERT, RoBERTa, GPT-2, Llama and T5 have, trained on a few sentences."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a warm, funny film about the sea, and a slow one about a farm",
    "Name the pub by the river: The Vaults, high-priced, 5 out of 5 stars!",
    "a/b <c> [d] |e| sep end start text s",
] * 20

SPECIAL = {
    "bert": {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "roberta": {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
    "gpt2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    "t5": {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"},
}
SEPARATORS = {"bert": "[SEP]", "roberta": "</s>", "gpt2": "<|endoftext|>", "llama": "</s>", "t5": "</s>"}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind in `SPECIAL`; a `t5` is a Unigram, whose vocabulary holds the special tokens as words."""
    special = list(dict.fromkeys(SPECIAL[kind].values()))
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)  # type: ignore[call-arg]
    elif kind == "t5":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")  # type: ignore[call-arg]
    elif kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special)  # type: ignore[call-arg]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(CORPUS, trainer)
    single, pair = {
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "gpt2": ("$A", "$A $B"),
        "llama": ("<s> $A", "<s> $A <s> $B"),
        "t5": ("$A </s>", "$A </s> $B </s>"),
    }[kind]
    ids = [(token, number) for token in special if (number := tokenizer.token_to_id(token)) is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL[kind])
