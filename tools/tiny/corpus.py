"""Text for pretraining: from parquet files to tokenizers, to one stream of tokens, and to blocks of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lora_hf.core.errors import UserError

log = logging.getLogger(__name__)

# In RoBERTa's order. The id of <pad> must be 1, because positions start after it.
MASKED_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BOS, PAD, EOS, UNK, MASK = range(5)
CAUSAL_SPECIAL = "<|endoftext|>"
GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Corpus:
    """One split as a stream of token ids, with the positions where a block may start."""

    stream: np.ndarray  # uint16 (tokens,)
    starts: np.ndarray  # int64, ascending


def text_files(folder: Path, split: str) -> list[Path]:
    """The sorted parquet files of a split, such as `train-*.parquet`, with the columns `text` and `source`."""
    files = sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])
    if not files:
        raise UserError(
            f"no {split}.parquet or {split}-*.parquet in {folder}; expected in --text-dir parquet files with the "
            "columns text (a paragraph) and source (its document)"
        )
    return files


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def documents(files: list[Path]) -> Iterator[list[str]]:
    """Yields the paragraphs of each document, whose rows must be consecutive."""
    current, paragraphs = None, []
    for file in files:
        table = parquet.read_table(file, columns=["text", "source"])
        for text, source in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True):
            if source != current and paragraphs:
                yield paragraphs
                paragraphs = []
            current = source
            paragraphs.append(text)
    if paragraphs:
        yield paragraphs


def train_word_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Lower-case BPE over words and punctuation marks, with RoBERTa's special tokens.

    Text with treebank spacing ("it 's n't -lrb- bad -rrb-", as in SST-2) and plain text give the same tokens: spaces
    are dropped, n't and 's are separate words, and the quotes and brackets of the treebank become plain ones.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace("-lrb-", "("),
            normalizers.Replace("-rrb-", ")"),
            normalizers.Replace(Regex("``|''"), '"'),
            normalizers.Replace(Regex(r"(?<=\w)n't\b"), " n't"),
        ]
    )
    words = Regex(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        limit_alphabet=72,  # ASCII letters, digits and punctuation; anything else is <unk>
        special_tokens=list(MASKED_SPECIALS),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def train_byte_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Lossless byte-level BPE like that of GPT-2. `<|endoftext|>` (id 0) starts and ends documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[CAUSAL_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_masked(files: list[Path], tokenizer: Tokenizer) -> Corpus:
    """All paragraphs, each followed by `</s>`. A block may start at any sentence."""
    marks = [tokenizer.token_to_id(mark) for mark in ".!?"]
    ends = np.array([EOS, *(mark for mark in marks if mark is not None)], dtype=np.uint16)
    pieces = []
    for paragraphs in documents(files):
        encodings = tokenizer.encode_batch_fast(paragraphs, add_special_tokens=False)
        pieces.extend(np.array([*encoding.ids, EOS], dtype=np.uint16) for encoding in encodings)
    stream = np.concatenate(pieces)
    starts = np.flatnonzero(np.isin(stream[:-1], ends)) + 1
    return Corpus(stream, np.concatenate([[0], starts]))


def encode_causal(files: list[Path], tokenizer: Tokenizer) -> Corpus:
    """Paragraphs as lines, with `<|endoftext|>` after each document. A block may start at any paragraph."""
    pieces, starts, length = [], [], 0
    for paragraphs in documents(files):
        lines = [f"{paragraph}\n" for paragraph in paragraphs]
        encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        for number, encoding in enumerate(encodings, start=1):
            ids = [*encoding.ids, 0] if number == len(encodings) else encoding.ids
            starts.append(length)
            pieces.append(np.array(ids, dtype=np.uint16))
            length += len(ids)
    return Corpus(np.concatenate(pieces), np.array(starts, dtype=np.int64))


def cached(path: Path, make: Callable[[], Corpus]) -> Corpus:
    """Loads a corpus from two .npy files next to `path`, which `make` creates the first time."""
    stream_file, starts_file = path.with_suffix(".stream.npy"), path.with_suffix(".starts.npy")
    if not starts_file.exists():
        corpus = make()
        # The starts come last: if their file exists, both files are complete.
        for file, array in ((stream_file, corpus.stream), (starts_file, corpus.starts)):
            partial = file.with_suffix(".new.npy")
            np.save(partial, array, allow_pickle=False)
            partial.replace(file)
        log.info("%s: %d tokens, %d starts", path.name, len(corpus.stream), len(corpus.starts))
    return Corpus(np.load(stream_file), np.load(starts_file))


def blocks(corpus: Corpus, rows: int, length: int, step: int) -> torch.Tensor:
    """The token blocks of a step, int64 (rows, length). They depend on the step only, so a resumed run gets the same.

    The rows are evenly spaced over the stream. The golden ratio shifts them from step to step (a Weyl sequence), so
    that any number of steps covers the corpus about evenly. Each row then moves to the next permitted start.
    """
    last_start = len(corpus.stream) - length
    if last_start < 1:
        raise UserError(
            f"the text is too short: it has {len(corpus.stream)} tokens, but one block needs {length}; add more text"
        )
    positions = (np.arange(rows) + (step * GOLDEN_RATIO) % 1.0) / rows * last_start
    starts = corpus.starts[np.minimum(np.searchsorted(corpus.starts, positions), len(corpus.starts) - 1)]
    starts = np.minimum(starts, last_start)
    return torch.from_numpy(corpus.stream[starts[:, None] + np.arange(length)].astype(np.int64))


def cooccurrence_embeddings(stream: np.ndarray, vocab_size: int, size: int, seed: int, window: int = 5) -> torch.Tensor:
    """Word vectors from co-occurrence counts, float32 (vocab_size, size), with rows of norm 1.

    Positive pointwise mutual information within `window` tokens on each side, where nearer tokens weigh more and
    context probabilities are raised to 0.75, factorized as U * S^0.5 by a randomized truncated SVD: Levy & Goldberg,
    "Neural Word Embedding as Implicit Matrix Factorization" (NIPS 2014), eq. 8 to 10, with the smoothing of Levy,
    Goldberg & Dagan (TACL 2015).
    """
    tokens = stream.astype(np.int64)
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float32)
    for distance in range(1, window + 1):
        pairs = np.bincount(tokens[:-distance] * vocab_size + tokens[distance:], minlength=len(counts))
        counts += pairs.astype(np.float32) * ((window + 1 - distance) / window)
    matrix = sparse.csr_matrix(counts.reshape(vocab_size, vocab_size))
    matrix = (matrix + matrix.T).tocoo()
    total = np.bincount(matrix.row, weights=matrix.data, minlength=vocab_size)
    smoothed = total**0.75 / (total**0.75).sum()
    information = np.log(matrix.data / (total[matrix.row] * smoothed[matrix.col]))
    positive = information > 0
    ppmi = sparse.csr_matrix(
        (information[positive], (matrix.row[positive], matrix.col[positive])), shape=matrix.shape, dtype=np.float32
    )
    left, values, _ = randomized_svd(ppmi, n_components=size, n_iter=4, random_state=seed)  # pyright: ignore[reportArgumentType]
    vectors = torch.from_numpy(np.ascontiguousarray(left * np.sqrt(values), dtype=np.float32))
    # Tokens that never occur have a zero row. Give them a random direction.
    missing = vectors.norm(dim=1) < 1e-6
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    vectors = torch.where(missing[:, None], noise, vectors)
    return vectors / vectors.norm(dim=1, keepdim=True)
