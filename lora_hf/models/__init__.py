"""Base models and tokenizers: what a name means, how it is loaded, and the small bases that come with the package."""
