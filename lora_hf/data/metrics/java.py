"""The two Java programs of the official scorers: Stanford's PTB tokenizer and METEOR 1.5, from pycocoevalcap's jars.

pycocoevalcap's own wrappers write into site-packages and leave METEOR running. These start Java in a temporary folder
with a time limit, and always end it.
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

TIME_LIMIT = 1800.0  # seconds per program; METEOR takes under two minutes for the 5,097 outputs of DART's test set

# Perf data would be a file in /tmp. A single garbage collection thread saves METEOR a quarter of its CPU time.
_OPTIONS = ["-Xmx2G", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Dfile.encoding=UTF-8"]
_PTB_JAR = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
_METEOR_JAR = Path("meteor", "meteor-1.5.jar")
_LINE_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")  # as Java reads them


def tokenize_ptb(texts: Sequence[str], time_limit: float = TIME_LIMIT) -> list[str]:
    """Returns the texts as lower-case Penn Treebank tokens joined by spaces.

    Raises:
        ScorerError: the package or Java is missing, or the tokenizer failed or exceeded `time_limit` seconds.
    """
    command = _command(_PTB_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    stdin = "".join(f"{_one_line(text)}\n" for text in texts)
    with tempfile.TemporaryDirectory(prefix="lora-hf-") as folder, _start(command, folder, subprocess.PIPE) as process:
        try:
            stdout, stderr = process.communicate(stdin, time_limit)
        except subprocess.TimeoutExpired as error:
            raise _timeout("the PTB tokenizer", time_limit) from error
        finally:
            process.kill()
    lines = stdout.split("\n")[:-1]
    if process.returncode != 0 or len(lines) != len(texts):
        raise _failure("the PTB tokenizer", process.returncode, stderr)
    return [line.rstrip() for line in lines]


class Meteor:
    """A running METEOR 1.5 for English; see `running_meteor`."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self._statistics: dict[tuple[str, ...], str] = {}  # systems often generate the same text for an input

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Returns the score of a system, from 0 to 1; each prediction is compared with its best reference.

        Raises:
            ScorerError: METEOR failed or exceeded its time limit.
        """
        statistics = [
            self._statistics_of((*group, prediction)) for prediction, group in zip(predictions, references, strict=True)
        ]
        # METEOR answers with a line per prediction and then the score of the system.
        return float(self._ask(["EVAL", *statistics], answers=len(predictions) + 1)[-1])

    def _statistics_of(self, texts: tuple[str, ...]) -> str:
        if texts not in self._statistics:
            (self._statistics[texts],) = self._ask(["SCORE", *texts], answers=1)
        return self._statistics[texts]

    def _ask(self, fields: Sequence[str], answers: int) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = " ||| ".join(_one_line(field.replace("|||", " ")) for field in fields)
        try:
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()
        except OSError:  # METEOR has ended
            lines = [""]
        else:
            lines = [self._process.stdout.readline().strip() for _ in range(answers)]
        if not all(lines):
            self._process.kill()
            exit_code = self._process.wait()
            self._stderr.seek(0)
            raise _failure("METEOR", exit_code, self._stderr.read().decode(errors="replace"))
        return lines


@contextmanager
def running_meteor(time_limit: float = TIME_LIMIT) -> Iterator[Meteor]:
    """Runs METEOR for a `with` block: it takes seconds to load its tables, and can then score many systems.

    The scores equal those of `java -jar meteor-1.5.jar PREDICTIONS REFERENCES -l en -norm -r N`.

    Raises:
        ScorerError: the package or Java is missing, or METEOR failed or ran for more than `time_limit` seconds.

    Source: Denkowski and Lavie 2014, "Meteor Universal".
    """
    command = _command(_METEOR_JAR, "Meteor", "-", "-", "-stdio", "-l", "en", "-norm")
    timed_out = threading.Event()
    with tempfile.TemporaryDirectory(prefix="lora-hf-") as folder, Path(folder, "stderr").open("w+b") as stderr:
        process = _start(command, folder, stderr)

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(time_limit, stop)
        timer.daemon = True
        timer.start()
        try:
            yield Meteor(process, stderr)
        except ScorerError as error:
            raise (_timeout("METEOR", time_limit) if timed_out.is_set() else error) from error
        finally:
            timer.cancel()
            process.kill()
            process.communicate()  # closes the pipes and waits, so that no zombie remains


def _one_line(text: str) -> str:
    return _LINE_BREAKS.sub(" ", text)


def _command(jar: Path, *arguments: str) -> list[str]:
    path = package_folder("pycocoevalcap") / jar
    if not path.is_file():
        raise ScorerError(f"{path}: no such file; reinstall pycocoevalcap")
    return [java(), *_OPTIONS, "-cp", str(path), *arguments]


def _start(command: list[str], folder: str, stderr: IO[bytes] | int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stderr, cwd=folder, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise ScorerError(f"{command[0]} cannot be started: {error.strerror}; check `java -version`") from error


def _timeout(program: str, limit: float) -> ScorerError:
    return ScorerError(f"{program} was stopped after {limit:g} seconds; score fewer texts, or use a less busy machine")


def _failure(program: str, exit_code: int, stderr: str) -> ScorerError:
    return ScorerError(
        f"{program} failed with exit code {exit_code}: {stderr.strip()[-500:] or 'no output'}. Check that "
        f"`java -version` is 8 or newer and that 2 GB of memory are free"
    )
