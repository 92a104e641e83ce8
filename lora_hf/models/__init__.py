"""Base models and tokenizers. Loads them by hub id, folder or embedded name, and quantizes them."""
