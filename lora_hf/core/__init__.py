"""What all packages share: configs, records, errors, atomic files, access to the hub.

Nothing here imports torch or transformers, so that checks and help texts take milliseconds.
"""
