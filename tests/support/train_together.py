"""Trains several configs with two processes, one after the other, in one start of torchrun.

`torchrun --nproc-per-node 2 -m tests.support.train_together FOLDER CONFIG...` halves the batch of each config and names
its run in FOLDER after the folder of the config.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_hf.core.config.loader import load_config
from lora_hf.training.distributed import destroy_processes, init_processes
from lora_hf.training.run import train

if __name__ == "__main__":
    folder, *configs = map(Path, sys.argv[1:])
    init_processes()
    for file in configs:
        size = load_config(file).train.batch_size // 2
        overrides = [
            f"train.batch_size={size}",
            f"output.dir={folder}",
            "output.plots=false",
            f"output.name={file.parent.name}",
        ]
        train(load_config(file, overrides))
    destroy_processes()
