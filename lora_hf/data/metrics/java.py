"""The two Java programs of the official scorers: Stanford's PTB tokenizer and METEOR 1.5, from pycocoevalcap's jars.

pycocoevalcap's own wrappers write into site-packages and leave METEOR running.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lora_hf.data.metrics.requirements import ScorerError, java, package_folder

TIME_LIMIT = 1800.0  # seconds per program; METEOR takes under two minutes for the 5,097 outputs of DART's test set

# METEOR mostly reads its table of paraphrases into memory. This collector takes less time for that than the others, and
# more threads than two cost more than they save. Perf data would be a file in /tmp.
_COLLECTOR = ["-XX:+UseParallelGC", "-XX:ParallelGCThreads=2"]
_OPTIONS = ["-Xmx2G", *_COLLECTOR, "-XX:-UsePerfData", "-Dfile.encoding=UTF-8"]
_LINE_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")  # as Java reads them


def tokenize_ptb(texts: Sequence[str], time_limit: float = TIME_LIMIT) -> list[str]:
    """Returns the texts as lower-case Penn Treebank tokens joined by spaces.

    Raises:
        ScorerError: the package or Java is missing, or the tokenizer failed or exceeded `time_limit` seconds.
    """
    main = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "texts"]
    jar = Path("tokenizer", "stanford-corenlp-3.4.1.jar")
    stdout = _run("the PTB tokenizer", jar, main, {"texts": texts}, time_limit)
    lines = stdout.split("\n")[:-1]
    if len(lines) != len(texts):
        raise ScorerError(f"the PTB tokenizer returned {len(lines)} lines for {len(texts)} texts")
    return [line.rstrip() for line in lines]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]], time_limit: float = TIME_LIMIT) -> float:
    """Returns METEOR 1.5 for English of one system, from 0 to 1; each prediction is compared with its best reference.

    Raises:
        ScorerError: the package or Java is missing, or METEOR failed or exceeded `time_limit` seconds.

    Source: Denkowski and Lavie 2014, "Meteor Universal".
    """
    count = max(map(len, references))
    # METEOR reads the same number of references for all predictions. It prefers none that is empty.
    lines = [text for group in references for text in [*group, *[""] * (count - len(group))]]
    main = ["Meteor", "predictions", "references", "-l", "en", "-norm", "-r", str(count)]
    jar = Path("meteor", "meteor-1.5.jar")
    stdout = _run("METEOR", jar, main, {"predictions": predictions, "references": lines}, time_limit)
    if not (score := re.search(r"^Final score:\s*(\S+)", stdout, re.MULTILINE)):
        raise ScorerError(f"METEOR printed no score: {stdout.strip()[-500:]}")
    return float(score[1])


def _run(program: str, jar: Path, main: list[str], files: dict[str, Sequence[str]], time_limit: float) -> str:
    """Returns what a Java class prints in a temporary folder with these files, given by their lines."""
    path = package_folder("pycocoevalcap") / jar
    if not path.is_file():
        raise ScorerError(f"{path}: no such file; reinstall pycocoevalcap")
    command = [java(), *_OPTIONS, "-cp", str(path), *main]
    with tempfile.TemporaryDirectory(prefix="lora-hf-") as folder:
        for name, lines in files.items():
            text = "".join(f"{_LINE_BREAKS.sub(' ', line)}\n" for line in lines)
            Path(folder, name).write_text(text, encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,  # some schedulers close standard input
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=time_limit,
            )
        except subprocess.TimeoutExpired as error:
            hint = "score fewer texts, or use a less busy machine"
            raise ScorerError(f"{program} was stopped after {time_limit:g} seconds; {hint}") from error
        except OSError as error:
            raise ScorerError(f"{command[0]} cannot be started: {error.strerror}; check `java -version`") from error
    if done.returncode:
        raise ScorerError(
            f"{program} failed with exit code {done.returncode}: {done.stderr.strip()[-500:] or 'no output'}. Check "
            "that `java -version` is 8 or newer and that 2 GB of memory are free"
        )
    return done.stdout
