"""Label values that mean "no label"."""

IGNORE_INDEX = -100  # a token without loss: the default `ignore_index` of torch's cross-entropy
HIDDEN_LABEL = -1  # a row whose label is not published, as on GLUE's test splits
