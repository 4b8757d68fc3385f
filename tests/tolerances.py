"""How far two computations of the same thing may lie apart, and why."""

import torch

# Largest difference of logits over the largest logit. The same products summed in another order: some units in the last
# place (2**-24 of fp32, 2**-11 of fp16, 2**-8 of bf16), grown by the depth of the tiny models here.
LOGITS = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Largest difference of a folded weight from PEFT's, over the largest weight: both round once to the dtype, from deltas
# that were summed in another order, so they may land on neighbours.
WEIGHTS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# An adapter that has no effect would pass any comparison: it must move the logits by at least this share.
EFFECT = 1e-2

# The same for quantised bases. NF4 is dequantised alike by everybody. int8 rounds the inputs of every layer to 8 bits,
# so a difference in the last place can move one of them by 2**-7 of the largest.
QUANTISED = {
    "dense": LOGITS,
    "nf4": LOGITS,
    "nf4-double": LOGITS,
    "int8": {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1},
}

# Largest difference of attention's output over the largest output: scores and weights in another order, and below fp32
# the weights and the output rounded to the dtype, which the interpreter does by cutting off.
ATTENTION = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Share of the probability that may lie in tokens that one nucleus has and another lacks: cumulative sums in fp32 over
# thousands of tokens are off by some 2**-24 each.
NUCLEUS = 1e-5

# Standard deviations by which a chi-square statistic may exceed its expectation; seeds are fixed, so it never varies.
CHI_SQUARE = 4.0
