"""The recipes of the bundled bases, with their tokenizers and untrained networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tools.tiny import corpus as text
from tools.tiny.corpus import BOS, EOS, PAD

EMBEDDING_RMS = 0.04
# Networks this small underfit, so the exported configs have no dropout: LoRA on 20,000 sentences of SST-2 reached a
# training loss of 0.50 without dropout, and 0.56 with the usual 0.1.
DROPOUT = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run, except the text."""

    kind: str  # "masked" or "causal"
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    positions: int  # the longest input, including special tokens
    tokens: int  # to train on, including repeats
    batch_tokens: int
    lengths: tuple[tuple[int, float], ...]  # (block length, share of the steps)
    matrix_lr: float  # Muon
    vector_lr: float  # AdamW: embeddings, norms, biases
    position_rms: float  # at step 0; below that of the words, whose vectors already carry meaning
    wave_positions: bool  # positions start as sines and cosines, so that what one position learns holds for all
    warmup_steps: int = 100
    decay_share: float = 0.5  # final share of the tokens, over which the learning rates fall to zero
    mask_rates: tuple[float, float] = (0.3, 0.15)  # before the decay, and at its end
    sentence_weight: float = 0.2  # of the <s> loss
    repeat_share: float = 0.0  # of the causal rows, which repeat their own start, until the decay ends
    plain_tokens: int = 0  # after the decay, without repeats, at a fifth of the learning rates, which fall again
    check_steps: int = 250  # between two held-out losses and checkpoints
    seed: int = 20261121

    @property
    def decay_end(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def steps(self) -> int:
        return (self.tokens + self.plain_tokens) // self.batch_tokens

    def decayed(self, step: int) -> float:
        """The progress of the decay at a step: 0 before it, 1 at its end and after."""
        start = self.decay_end * (1 - self.decay_share)
        return min(1.0, max(0.0, (step - start) / (self.decay_end - start)))

    def learning_rate_scale(self, step: int) -> float:
        """The factor of both learning rates: warm-up, constant, decay to zero, then a lower decay on plain text."""
        if step >= self.decay_end:
            return 0.2 * (self.steps - step) / max(1, self.steps - self.decay_end)
        return min((step + 1) / self.warmup_steps, 1.0 - self.decayed(step))

    def mask_rate(self, step: int) -> float:
        first, last = self.mask_rates
        return first + (last - first) * self.decayed(step)


RECIPES = {
    "tiny-roberta": Recipe(
        kind="masked",
        vocab_size=9472,
        hidden_size=256,
        layers=3,
        heads=4,
        positions=512,
        tokens=18_000_000,
        batch_tokens=4096,
        lengths=((32, 0.4), (128, 0.45), (512, 0.15)),
        matrix_lr=0.015,
        vector_lr=1e-3,
        position_rms=0.01,
        wave_positions=False,
    ),
    "tiny-gpt2": Recipe(
        kind="causal",
        vocab_size=5120,
        hidden_size=192,
        layers=4,
        heads=4,
        positions=512,
        tokens=18_000_000,
        batch_tokens=4096,
        lengths=((128, 0.25), (256, 0.35), (512, 0.4)),
        matrix_lr=0.008,
        vector_lr=1.5e-3,
        position_rms=0.02,
        wave_positions=True,
        repeat_share=0.08,
        plain_tokens=2_000_000,
    ),
}


def make_tokenizer(recipe: Recipe, files: list[Path], work_dir: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer from the work folder, or trains it and saves it there."""
    file = work_dir / "tokenizer.json"
    if not file.exists():
        train = text.train_word_tokenizer if recipe.kind == "masked" else text.train_byte_tokenizer
        paragraphs = (paragraph for document in text.documents(files) for paragraph in document)
        train(paragraphs, recipe.vocab_size).save(str(file))
    if recipe.kind == "masked":
        names = dict(
            zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), text.MASKED_SPECIALS, strict=True)
        )
        names |= {"cls_token": "<s>", "sep_token": "</s>"}
    else:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), text.CAUSAL_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        model_max_length=recipe.positions,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **names,
    )


def waves(positions: int, size: int) -> torch.Tensor:
    """Position vectors `(positions, size)` of alternating sines and cosines: Vaswani et al. 2017, section 3.5."""
    angles = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def make_model(recipe: Recipe, stream: np.ndarray) -> PreTrainedModel:
    """The untrained network: words from co-occurrence counts, output bias from unigram counts, the rest random."""
    torch.manual_seed(recipe.seed)
    if recipe.kind == "masked":
        model = RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=recipe.vocab_size,
                hidden_size=recipe.hidden_size,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                intermediate_size=4 * recipe.hidden_size,
                max_position_embeddings=recipe.positions + PAD + 1,  # RoBERTa counts positions from pad + 1
                type_vocab_size=1,
                bos_token_id=BOS,
                pad_token_id=PAD,
                eos_token_id=EOS,
                hidden_dropout_prob=DROPOUT,
                attention_probs_dropout_prob=DROPOUT,
            )
        )
        words, positions = model.roberta.embeddings.word_embeddings, model.roberta.embeddings.position_embeddings
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=recipe.vocab_size,
                n_embd=recipe.hidden_size,
                n_layer=recipe.layers,
                n_head=recipe.heads,
                n_positions=recipe.positions,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=DROPOUT,
                embd_pdrop=DROPOUT,
                attn_pdrop=DROPOUT,
            )
        )
        words, positions = model.transformer.wte, model.transformer.wpe
    vectors = text.cooccurrence_embeddings(stream, recipe.vocab_size, recipe.hidden_size, recipe.seed)
    with torch.no_grad():
        words.weight.copy_(vectors * EMBEDDING_RMS * math.sqrt(recipe.hidden_size))
        if recipe.wave_positions:
            positions.weight.copy_(waves(*positions.weight.shape) * recipe.position_rms * math.sqrt(2))
        else:
            positions.weight.normal_(std=recipe.position_rms)
        if isinstance(model, RobertaForMaskedLM):
            model.roberta.embeddings.token_type_embeddings.weight.normal_(std=recipe.position_rms)
            counts = torch.from_numpy(np.bincount(stream, minlength=recipe.vocab_size)) + 1.0
            model.lm_head.bias.copy_((counts / counts.sum()).log())
    # Evaluation mode throughout: dropout is the only thing train() would switch on.
    return model.eval()
