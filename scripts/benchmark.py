"""`lora-hf benchmark glue|nlg`, or, from a clone, `python -m tools.benchmark ...`; see --help of either."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_hf.cli.main import main
from tools.benchmark.__main__ import VERBS
from tools.benchmark.__main__ import main as measure

if __name__ == "__main__":
    sys.exit(measure() if sys.argv[1:2] and sys.argv[1] in VERBS else main(verb="benchmark"))
