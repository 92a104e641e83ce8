"""Base models and tokenizers. Loads them by hub id, folder or bundled name, and quantizes them."""
