"""`lora-hf export`; see `python scripts/export.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(verb="export"))
