"""Where a task's rows come from: `task.data_dir`, else `$LORA_HF_DATA_DIR`, else the hub.

A folder, once named, is the only source: falling back to the hub would train on other rows than those asked for.
Local files are read into memory; nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from lora_hf.core.errors import DataError, HubError
from lora_hf.core.hub_access import explain_hub_error, hub_is_reachable, hub_unreachable
from lora_hf.data.readers import read_parquet

if TYPE_CHECKING:
    from datasets import Dataset

DATA_DIR_VARIABLE = "LORA_HF_DATA_DIR"


class Source(Protocol):
    """Reads the splits of a task."""

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows of `split` and their origin in words (a path, a hub id)."""
        ...


class RawFiles(Protocol):
    """The files of a data set as its authors published them."""

    @property
    def files(self) -> Mapping[str, tuple[str, ...]]:
        """By split: the paths below the data folder to try; a path may be a folder."""
        ...

    def read(self, path: Path, split: str) -> Dataset:
        """Returns the rows with the columns of the parquet files."""
        ...


@dataclass(frozen=True)
class Bundled:
    """Rows made by a function of this package: `rows(split)` returns a dict for each. Ignores `data_dir`."""

    rows: Callable[[str], list[dict]]

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        from datasets import Dataset

        return Dataset.from_list(self.rows(split)), f"the {split!r} rows made by {self.rows.__name__}"


@dataclass(frozen=True)
class NoSource:
    """For a task of which no rows are known."""

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        raise DataError(f"cannot load the split {split!r}: this adapter records no task, so its data are unknown")


def find_data_folder(data_dir: str | None, how_to_set_up: str) -> tuple[Path | None, str]:
    """Returns the configured data folder, if any, and the name of its setting.

    Raises:
        DataError: it is not a folder; the message ends with `how_to_set_up`.
    """
    setting = "task.data_dir" if data_dir else DATA_DIR_VARIABLE
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        return None, setting
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"{setting}={folder} is not a folder. {how_to_set_up}")
    return root, setting


@dataclass(frozen=True)
class LocalOrHub:
    """A data set of the hub that may also be in a local folder.

    Args:
        folder: the folder of its parquet files below the data folder ("glue/sst2", and "sst2" alone). They are named
            `<split>.parquet`, or as on the hub `<split>-00000-of-00001.parquet`.
        hub_folder: the folder of the configuration on a converted branch of the hub.
        adapt: converts the hub's columns into the task's.
        raw_files: the authors' own files, which are tried after the parquet files.
    """

    folder: str
    hub_id: str
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_folder: str | None = None
    adapt: Callable[[Dataset], Dataset] | None = None
    raw_files: RawFiles | None = None

    def read(self, split: str, data_dir: str | None) -> tuple[Dataset, str]:
        """Returns the rows and their origin.

        Raises:
            DataError: the folder, the split or the file is missing or unreadable.
            HubError: no folder is named, and neither the hub nor its local cache provides the rows.
        """
        if PurePosixPath(split).name != split:
            raise DataError(f"{split!r}: expected the name of a split, without a path")
        root, setting = find_data_folder(data_dir, self._how_to_set_up(split))
        if root is None:
            return self._adapt(self._from_hub(split)), f"{self._hub_name()} on the hub, split {split!r}"
        parquet_paths, raw_paths = self._parquet_paths(split), self._raw_paths(split)
        for path in parquet_paths:
            if (root / path).is_file():
                return self._adapt(read_parquet(root / path)), str(root / path)
        for path in raw_paths:
            if self.raw_files and (root / path).exists():
                return self.raw_files.read(root / path, split), str(root / path)
        raise DataError(
            f"no rows of {self.folder}, split {split!r}, in {root} ({setting}); looked for: "
            f"{', '.join([*parquet_paths, *raw_paths])}; splits found there: "
            f"{', '.join(self._splits_in(root)) or 'none'}. {self._how_to_set_up(split)}"
        )

    def _adapt(self, rows: Dataset) -> Dataset:
        return self.adapt(rows) if self.adapt else rows

    def _folders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.folder, PurePosixPath(self.folder).name)))

    def _parquet_paths(self, split: str) -> list[str]:
        return [f"{folder}/{split}{shard}.parquet" for folder in self._folders() for shard in ("", "-00000-of-00001")]

    def _raw_paths(self, split: str) -> list[str]:
        paths = self.raw_files.files.get(split, ()) if self.raw_files else ()
        parent = PurePosixPath(self.folder).parent
        return list(dict.fromkeys(candidate for path in paths for candidate in (path, str(parent / path))))

    def _hub_name(self) -> str:
        return " ".join(filter(None, (self.hub_id, self.hub_config, self.hub_folder)))

    def _splits_in(self, root: Path) -> list[str]:
        parquet_files = (path for folder in self._folders() for path in (root / folder).glob("*.parquet"))
        splits = {path.stem.removesuffix("-00000-of-00001") for path in parquet_files}
        for split in self.raw_files.files if self.raw_files else ():
            if any((root / path).exists() for path in self._raw_paths(split)):
                splits.add(split)
        return sorted(splits)

    def _how_to_set_up(self, split: str) -> str:
        raw = "".join(f" or DIR/{path}" for path in self._raw_paths(split)[:1])
        return (
            f"Set task.data_dir=DIR or {DATA_DIR_VARIABLE}=DIR to a folder with DIR/{self._parquet_paths(split)[0]}"
            f"{raw}; with neither set the rows come from the hub."
        )

    def _from_hub(self, split: str) -> Dataset:
        from datasets import config, load_dataset
        from datasets.packaged_modules.cache.cache import Cache

        requested = f"{self._hub_name()}, split {split!r}"
        if not hub_is_reachable():
            # `load_dataset` reads its cache as well, but only after 20 seconds of requests to the hub.
            try:
                name = PurePosixPath(self.hub_id).name
                cache = Cache(
                    None, name, self.hub_config, "auto", "auto", repo_id=self.hub_id, data_dir=self.hub_folder
                )
                return cache.as_dataset(split=split)  # pyright: ignore[reportReturnType]: one split, one Dataset
            except (ValueError, OSError) as error:
                raise HubError(
                    f"{requested}: {hub_unreachable()}, and the local cache ({config.HF_DATASETS_CACHE}) does not hold "
                    f"it. {self._how_to_set_up(split)}"
                ) from error
        try:
            return load_dataset(  # pyright: ignore[reportReturnType]
                self.hub_id, self.hub_config, data_dir=self.hub_folder, split=split, revision=self.hub_revision
            )
        except Exception as error:  # datasets, fsspec and the HTTP client each raise their own errors
            reason = explain_hub_error(error, self.hub_revision)
            raise HubError(f"{requested}: {reason}. {self._how_to_set_up(split)}") from error
