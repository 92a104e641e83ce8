"""Every tolerance of the suite, with the reason for its size. A test takes its number from here and nowhere else.

A tolerance is an absolute difference unless its name ends in `_RTOL`. Each is a few times what float arithmetic of that
type loses over the sums in question, and far below what a wrong implementation (no scaling, A and B swapped, the wrong
slice of a fused projection) gives: the numerics tests try those wrong ones at the same number.
"""

import torch

PARITY_FP32 = 1e-5
"""Against peft and loralib with equal weights: logits, gradients, parameters after optimiser steps. Both sum in
float32, in another order; over hidden sizes up to 1024 that loses about 1e-6 of values near 1."""

PRETRAINED_LOGITS_RTOL = 1e-5
"""The same, relative to the largest logit, of a pretrained base: those of a language model reach tens."""

FILE_ROUNDTRIP = 1e-6
"""Logits before saving and after loading, by us or by another library. The tensors are bitwise equal; only the kernels
that multiply them may differ."""

MERGE_FP32 = 1e-5
"""Logits of a merged model against the adapter beside its base: `(W + BA) x` is rounded in other places than
`Wx + B(Ax)`."""

MERGE_BF16 = 3e-2
"""The same in bfloat16, whose 8 bits of significand round each weight by up to 0.4 %."""

MERGE_FP16 = 4e-3
"""The same in float16, whose 11 bits of significand round each weight by up to 0.05 %."""

EXPORT_DELTA = 1e-6
"""The update in an exported file against the adapter's: the scaling is multiplied into B, which rounds it once."""

LLAMA_CPP_LOGITS = 2e-4
"""Logits of llama.cpp with an exported adapter against ours. Its GELU is a table in float16, and loses 3e-5 of logits
near 1 with the bare base too."""

MLX_LOGITS = 1e-4
"""The same for mlx-lm, which computes in float32 with its own approximations of activations."""

COMBINE_RTOL = 1e-6
"""A combined adapter's delta against the sum of the deltas, relative to its largest entry: float32 rounds the factors
once and sums the products in another order. Leaving out a scaling or a sign gives several tenths."""

COMBINE_SVD_RTOL = 1e-5
"""The same through a singular value decomposition in float32 that leaves nothing out."""

LEFT_OUT_RTOL = 1e-4
"""The reported share that a rank leaves out, against the norm of a float32 difference of matrices."""

DROPPED_MEAN_RTOL = 0.02
"""The mean over 4000 draws of DARE at density 0.5: the standard error of an entry is 0.016 of it, and over 100 entries
0.0016. Without the rescaling the mean is off by a half."""

GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}
"""`torch.autograd.gradcheck` in float64: central differences at eps err by about eps squared, and by 1e-16 / eps."""

ACCUMULATION_FP32 = 1e-5
"""Weights after training on 8 rows at once against 2 rows four times: the same sum of gradients in another order, over
12 steps of SGD."""

FOUR_DECIMALS = 5.001e-5
"""Against a score that its authors printed with four decimals."""

PADDING_FREE_FP32 = 1e-5
"""Losses and gradients of rows without padding against the padded batch: the same float32 sums in another order,
through another attention kernel."""

PADDING_FREE_GRADIENTS = 1e-4
"""Of their largest value, or of 1. Norms of short vectors (qwen3_moe) amplify rounding: 4e-5 without AVX2 kernels.
Also of projections that are computed together: 4e-5 with starcoder2."""

FUSED_RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""The fused projection against the reference, relative to the largest value: sums in another order, and in bfloat16 a
rounding (0.4 %) of x A^T and of scaling * B before they are multiplied instead of after."""

MIXED_FP32 = 1e-5
"""A row of a mixed batch against the same row alone under its adapter: the same float32 sums in another order, of a
batch padded to another length."""

MIXED_GRADIENT_RTOL = 1e-4
"""Every gradient of an adapter in a mixed batch against the sum over its rows one by one, relative to its largest
value: float32 sums in another order."""

FAST_TRAINING_FP32 = 1e-5
"""Losses over 50 AdamW steps, without padding and fused against padded and by definition: what float32 sums in another
order grow to."""

BF16_LOSS_RTOL = 0.01
"""The training loss with a base in bfloat16 against float32: the noise of the gradients averages out."""

BF16_BATCH_LOSS_RTOL = 0.03
"""The same for the loss of one batch of eight rows, over which little averages out."""

AUTOCAST_GRADIENTS = 0.1
"""The norm of the difference of a gradient under autocast in bfloat16, without padding against padded, relative to the
norm of the gradient: sums are rounded to eight bits in another order in each layer."""

FP16_LOSS_RTOL = 0.01
"""The same with a base in float16, and of the norm of the gradients. Gradients whose scale was left in are out by 65536
times, and clipped ones by the factor that they were to be clipped by."""

QUANTISED_FP32 = 1e-5
"""The adapted projection over a packed weight against the same over the dequantised one: equal float32 weights, sums in
another order."""

QUANTISED_BF16_RTOL = 3e-2
"""The same with everything in bfloat16, relative to the largest value: as FUSED_RTOL."""

NF4_TABLE = 1e-6
"""Weights unpacked by bitsandbytes against the published table times the scales: a float32 product or two."""

PACKED_HEAD_FP32 = 1e-2
"""Logits of a head that bitsandbytes packed against the unpacked one: with 8 bits it also rounds the head's input."""

INT8_LAYER_RTOL = 0.03
"""A projection with weights and inputs in 8 bits, relative to the largest value of its token: each value errs by up to
0.4 % of the largest of its row, and the errors of a sum average. One scale for all rows is wrong by factors."""

INT8_MODEL_RTOL = 0.3
"""The same through all layers of tiny-roberta after a few steps of training, as the Frobenius norm of what the logits
move: layer after layer adds its rounding, that base makes much of it (its hidden states move by 6 %, as with torchao's
int8, and by 2 % in bfloat16), and logits near zero weigh nothing against it."""

SAMPLER_GAIN = 0.75
"""The mean error of a sampler's later points as a share of that of its first, random ones, over 8 seeds: a half where
it learns, 1 where it does not."""

FLAT_RSS = 25e6
"""Bytes that a process may grow between the third trial of a sweep and the sixth, for caches and fragments of the heap.
Three models kept alive would add 30 MB in weights alone."""

METRIC_VALUE = 1e-12
"""A metric against scikit-learn or scipy in float64, which take their sums in another order."""

OFFICIAL_SCORE = 1e-6
"""The comparison's metrics against the official ones: those of STS-B round their inputs to float32 first."""

RESAMPLED_SCORE = 0.015
"""Mean and spread of a score over 4000 resamples of 40 rows against 600 plain ones: a score's spread is up to 0.15
there, the standard error of the mean 0.006. Resampling labels and answers apart moves the mean by several tenths."""

COVERAGE = 0.04
"""How often a 95 % interval covers the truth in 300 repetitions: a standard error of 0.013, and the percentile interval
of an accuracy over 250 rows covers about 0.94. An 85 % interval is out by more."""

SERVED_PROBABILITY = 1.001e-4
"""A served probability against the offline one: both are rounded to four decimals, and logits that differ by
MIXED_FP32 may fall to either side of a rounding."""

PROCESSES_FP32 = 1e-5
"""Weights, losses and logits of two processes against one that takes as many rows in a step: the same float32 sums in
another order, over a few steps of SGD. Rows counted twice, or a mean over unequal numbers of rows, give a hundred times
as much."""

PEFT_LOGITS = 3e-6
"""Outputs of PEFT and ours with the same file, relative to the largest: the same products of 2 layers in fp32, which
PEFT multiplies, scales and adds in another order. That loses up to 1.1e-6 (Gemma 3, whose norms amplify it)."""

TRL_LOSS = 1e-5
"""The mean loss of a batch of conversations against TRL's over PEFT, in three steps of a real model: the same sums in
another order. A token more or less in the loss moves it by 1e-3 and more."""

TRAINED_LOGITS_SHARE = 0.05
"""Logits of a real encoder after 20 AdamW steps against PEFT's, as a share of their standard deviation over the rows.
AdamW turns gradients near zero, which rounding changes, into whole steps; this loses up to 1e-4 of it on AVX2. Another
seed, order of the rows or scaling moves the logits by the deviation itself."""
