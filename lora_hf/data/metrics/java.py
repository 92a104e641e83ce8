"""The two Java programs that official scorers call: Stanford's PTB tokenizer and METEOR 1.5, from pycocoevalcap's jars.

pycocoevalcap's own wrappers write into their folder in site-packages and leave METEOR running. These start Java in a
temporary folder, with a time limit, and end it; the calling process' standard input and current folder play no part.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lora_hf.data.metrics.requirements import ScorerError, java, package_folder

TIME_LIMIT = 1800.0
"""Seconds one program may take; the 5,097 outputs of the DART test set take METEOR well under two minutes."""

# Perf data would be a file in the system's /tmp. One thread that collects garbage saves METEOR a quarter of the CPU.
_OPTIONS = ["-Xmx2G", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Dfile.encoding=UTF-8"]
_PTB_JAR = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
_METEOR_JAR = Path("meteor", "meteor-1.5.jar")
_LINE_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")


def tokenize_ptb(texts: Sequence[str], time_limit: float = TIME_LIMIT) -> list[str]:
    """The texts as Penn Treebank tokens joined by spaces, lower-cased.

    Raises:
        ScorerError: the package or Java is missing, or the tokenizer died, took longer than `time_limit` seconds, or
            gave another number of lines.
    """
    command = _command(_PTB_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    given = "".join(f"{one_line(text)}\n" for text in texts)
    with tempfile.TemporaryDirectory(prefix="lora-hf-") as folder:
        process = _start(command, folder, subprocess.PIPE)
        try:
            answer, errors = process.communicate(given, time_limit)
        except subprocess.TimeoutExpired as error:
            raise _late("the PTB tokenizer", time_limit) from error
        finally:
            process.kill()
            process.communicate()
    lines = answer.split("\n")[:-1]
    if process.returncode != 0 or len(lines) != len(texts):
        raise _died("the PTB tokenizer", process.returncode, errors.encode())
    return [line.rstrip() for line in lines]


class Meteor:
    """METEOR 1.5 for English as a running program, which `running_meteor` starts and ends."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._statistics: dict[tuple[str, ...], str] = {}  # systems often say the same of the same input

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The METEOR score of a whole system, 0 to 1; each prediction is held against its best reference.

        Raises:
            ScorerError: METEOR died, or its time was over.
        """
        statistics = [
            self._statistics_of((*group, prediction)) for prediction, group in zip(predictions, references, strict=True)
        ]
        # One answer for each prediction, then the one of all.
        return float(self._ask(["EVAL", *statistics], answers=len(predictions) + 1)[-1])

    def _statistics_of(self, texts: tuple[str, ...]) -> str:
        if texts not in self._statistics:
            (self._statistics[texts],) = self._ask(["SCORE", *texts], answers=1)
        return self._statistics[texts]

    def _ask(self, fields: Sequence[str], answers: int) -> list[str]:
        line = " ||| ".join(one_line(field.replace("|||", " ")) for field in fields)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except OSError:  # a broken pipe: nobody reads
            lines = [""]
        else:
            lines = [self._process.stdout.readline().strip() for _ in range(answers)]
        if not all(lines):
            self._process.kill()
            code = self._process.wait()
            self._errors.seek(0)
            raise _died("METEOR", code, self._errors.read())
        return lines


@contextmanager
def running_meteor(time_limit: float = TIME_LIMIT) -> Iterator[Meteor]:
    """METEOR for the length of a `with` block: it takes some seconds to read its tables, then scores many systems.

    Equal to `java -jar meteor-1.5.jar PREDICTIONS REFERENCES -l en -norm -r N`.

    Raises:
        ScorerError: the package or Java is missing, METEOR died, or took longer than `time_limit` seconds in all.

    Source: Denkowski and Lavie 2014, "Meteor Universal".
    """
    command = _command(_METEOR_JAR, "Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
    late = threading.Event()
    with tempfile.TemporaryDirectory(prefix="lora-hf-") as folder, Path(folder, "stderr").open("w+b") as errors:
        process = _start(command, folder, errors)

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(time_limit, stop)
        watch.daemon = True
        watch.start()
        try:
            yield Meteor(process, errors)
        except ScorerError as error:
            raise (_late("METEOR", time_limit) if late.is_set() else error) from error
        finally:
            watch.cancel()
            process.kill()
            process.communicate()  # closes the pipes and waits: no zombie is left


def one_line(text: str) -> str:
    """`text` without what Java reads as the end of a line."""
    return _LINE_BREAKS.sub(" ", text)


def _command(jar: Path, *words: str) -> list[str]:
    path = package_folder("pycocoevalcap") / jar
    if not path.is_file():
        raise ScorerError(f"{path}: no such file; reinstall pycocoevalcap")
    return [java(), *_OPTIONS, "-cp", str(path), *words]


def _start(command: list[str], folder: str, errors: IO[bytes] | int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, cwd=folder, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise ScorerError(f"{command[0]} cannot be started: {error.strerror}; check `java -version`") from error


def _late(program: str, limit: float) -> ScorerError:
    return ScorerError(f"{program} was stopped after {limit:g} seconds; score fewer texts, or on a less busy machine")


def _died(program: str, code: int, errors: bytes) -> ScorerError:
    said = errors.decode(errors="replace").strip()[-500:] or "nothing"
    return ScorerError(
        f"{program} stopped before it had answered, with exit code {code}; it said: {said}. "
        f"Check that `java -version` is 8 or newer and that 2 GB of memory are free"
    )
