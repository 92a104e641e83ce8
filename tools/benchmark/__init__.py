"""Benchmarks of methods and libraries on the same rows: `python -m tools.benchmark VERB`.

Each verb has a module (`train`, `infer`, `serve`, `quantised`, `profile`) that returns a record. A comparison
has several sides, such as `lora` and `peft-best`. Each side runs in a process of its own (`worker`, started by
`worker_process`), and they take turns (`rounds`). `train_sides`, `infer_sides` and `peers` define what a side does.
"""
