"""sae-bench's own evals of an SAE, run by sae-bench in an environment of its own, and kept as its own files.

Its pins (datasets < 4, numpy < 2) rule out ours, so another interpreter runs suite_bridge.py on the SAE's files. It
leaves OUT/eval_results/EVAL/NAME_custom_sae_eval_results.json, in sae-bench's layout. Beside it suite.json says of what
SAE, model, text and settings the results are: as long as these stay, so do the results.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sae_train.config.merge import read_yaml
from sae_train.config.record import SuiteResult, fits
from sae_train.data.activation_cache import key_of
from sae_train.data.pretrained import locate
from sae_train.errors import UserError
from sae_train.files import read_json, write_json, write_parquet
from sae_train.report.suite import FOLDERS, RECORD, RESULTS, read_record, read_result, suite_tables
from sae_train.runs.corpus import corpus_rows
from sae_train.runs.suite_text import CoreText
from sae_train.sae.files import save_sae
from sae_train.sae.model import copy_of, fold_decoder_norm

if TYPE_CHECKING:
    from sae_train.config import Settings
    from sae_train.config.flags import SuiteFlags
    from sae_train.data.language_model import LanguageModel
    from sae_train.runs.display import Display
    from sae_train.sae.model import SAE

WITH_CODE = "codeparrot/github-code"  # of sae-bench's data sets, one that is read by code of its own
BRIDGE = Path(__file__).with_name("suite_bridge.py")
LOG = "suite.log"
PACKAGES = ("sae-bench", "sae-lens", "transformer-lens")
REFUSED = {
    "absorption": "sae-train eval measures it itself, by sae-bench's definition",
    "autointerp": "it asks a language model that takes a key",
    "unlearning": "one of its data sets is gated, and sae-bench leaves it out of its own runs",
    "ravel": "it reads Gemma 2 2B and Pythia 160M alone",
    "sparse-probing-sae-probes": "it loads the model and its data sets by another package",
    "mdl": "sae-bench has no layout for its results",
    "meta-structure": "it trains SAEs of its own",
}
HOW = (
    "make an environment for it by `python -m venv sae-bench-env` and `sae-bench-env/bin/pip install sae-bench==0.6.0 "
    "sae-lens==6.54.12`, then give --suite-python sae-bench-env/bin/python"
)
BAR = re.compile(r"\s*(?P<what>[^:%|]*?):?\s*\d+%\|.*\| *(?P<done>\d+)/(?P<of>\d+) \[")  # of tqdm
MARK = re.compile(r"@suite (begin|done) (?P<name>\S+) ?(?P<file>.*)")


@dataclass(frozen=True)
class Suite:
    """The evals that were asked for, the interpreter that runs them and the settings given to them."""

    evals: tuple[str, ...]
    python: str
    settings: dict[str, dict[str, Any]]
    versions: dict[str, str]


def find_suite(flags: SuiteFlags, trust_remote_code: bool = False) -> Suite | None:
    """Read what was asked for; UserError for what is no eval, for an interpreter without sae-bench, and for a data set
    that runs code unless that is allowed."""
    if flags.suite is None:
        if flags.suite_config:
            raise UserError("--suite-config is read with --suite alone: name the evals, such as --suite core")
        return None
    evals = tuple(dict.fromkeys(name.strip().replace("_", "-") for name in flags.suite.split(",")))
    for name in evals:
        if name not in FOLDERS:
            why = f" ({REFUSED[name]})" if name in REFUSED else ""
            raise UserError(f"--suite cannot run {name!r}{why}: it runs {', '.join(FOLDERS)}")
    settings = _settings(flags.suite_config)
    names = settings.get("sparse-probing", {}).get("dataset_names", WITH_CODE)
    if "sparse-probing" in evals and WITH_CODE in str(names) and not trust_remote_code:
        raise UserError(
            f"sparse-probing reads {WITH_CODE}, which runs code from the hub: give --trust-remote-code, or name other "
            "data sets by dataset_names in --suite-config"
        )
    python = _python(flags)
    return Suite(evals, python, settings, _versions(python))


def _python(flags: SuiteFlags) -> str:
    if flags.suite_python:
        return str(flags.suite_python.expanduser())
    if importlib.util.find_spec("sae_bench") is None:
        raise UserError(f"--suite needs sae-bench, which is not installed here: {HOW}")
    return sys.executable


def _versions(python: str) -> dict[str, str]:
    code = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--suite-python {python} cannot be started ({error.strerror}): {HOW}") from error
    if done.returncode:
        raise UserError(f"{python} has no sae-bench: {HOW}")
    return json.loads(done.stdout)


def _settings(file: Path | None) -> dict[str, dict[str, Any]]:
    """sae-bench's settings by eval; it checks them itself."""
    given = {str(name).replace("_", "-"): own for name, own in (read_yaml(file) if file else {}).items()}
    wrong = [name for name, own in given.items() if name not in FOLDERS or not isinstance(own, dict)]
    if wrong:
        raise UserError(f"{file}: {wrong[0]!r} is no group of settings of an eval: there are {', '.join(FOLDERS)}")
    return given


def identity_of(sae: SAE) -> str:
    """A short name of an SAE's weights and form."""
    return key_of({"architecture": sae.cfg.architecture, "k": sae.cfg.k}, *sae.state_dict().values())


def run_suite(
    suite: Suite, sae: SAE, lm: LanguageModel, checkpoint: Path, settings: Settings, given: dict[str, Any], out: Path,
    display: Display,
) -> None:  # fmt: skip
    """Let sae-bench evaluate an SAE, but for what is kept of it, and say what it found.

    What is done stays where a later eval fails.
    """
    own = None
    if "core" in suite.evals:
        display("reading text for sae-bench")
        own = CoreText.choose(suite.settings.get("core", {}), corpus_rows(lm, sae, checkpoint, settings, given))
    keys = {each: _key(suite, each, lm, own if each == "core" else None) for each in suite.evals}
    who = identity_of(sae)
    for each in suite.evals:
        if _is_kept(out, each, keys[each], who):
            display.say(f"sae-bench {each}: kept from {out / RESULTS / FOLDERS[each]}")
    left = [each for each in suite.evals if not _is_kept(out, each, keys[each], who)]
    if left:
        with TemporaryDirectory(prefix="sae-bench-") as folder:
            job = _write_job(suite, left, sae, lm, settings, checkpoint.name, own, Path(folder))
            display.interrupted = "the absorption eval and the evals of sae-bench that were done are kept"
            with closing(_run(suite, job, out, display)) as done:
                for each, file in done:
                    display("measuring the same here")
                    text, ours = own.beside(lm, sae) if own and each == "core" else (None, {})
                    about = {"sae": who, "key": keys[each], "text": text, "ours": ours, "versions": suite.versions}
                    _keep(out, each, file, about)
    for table in suite_tables(out, who):
        if table.name in suite.evals:
            display.say(table.line())


def _key(suite: Suite, name: str, lm: LanguageModel, own: CoreText | None) -> str:
    """A short name of all but the SAE that an eval's results hang on."""
    asked = {
        "settings": suite.settings.get(name, {}), "model": lm.name, "weights": lm.weights, "hook": lm.hook_name,
        "dtype": str(lm.dtype), "versions": suite.versions, "text": own.name if own else None,
    }  # fmt: skip
    rows = [own.corpus.language.rows] if own and own.corpus else []
    return key_of(json.loads(json.dumps(asked, default=str)), *rows)


def _is_kept(out: Path, name: str, key: str, who: str) -> bool:
    entry = read_record(out).get(name)
    return bool(entry) and (entry["key"], entry["sae"]) == (key, who) and read_result(out, name, entry) is not None


def _write_job(
    suite: Suite, evals: list[str], sae: SAE, lm: LanguageModel, settings: Settings, name: str,
    own: CoreText | None, folder: Path,
) -> Path:  # fmt: skip
    """Write what the bridge reads: the SAE in SAELens' layout with unit rows, as sae-bench wants them, and the text."""
    model = Path(lm.name).name
    cfg = {"model_name": model, "hook_name": lm.hook_name, "prepend_bos": lm.bos_id is not None, "metadata": {}}
    unit = sae if sae.cfg.architecture == "topk" else fold_decoder_norm(sae)
    save_sae(copy_of(unit, **cfg), folder / "sae")
    given = {each: suite.settings.get(each, {}) for each in evals}
    text = None
    if own and own.corpus:
        import pandas as pd

        write_parquet(folder / "text" / "train.parquet", pd.DataFrame({"tokens": own.corpus.language.rows.tolist()}))
        text = own.settings | {"dataset": str(folder / "text")}
        given["core"] = {key: value for key, value in given.get("core", {}).items() if key not in own.settings}
    job = {
        "evals": evals, "sae": str(folder / "sae"), "name": name, "model": _model_for_others(lm, folder / "model"),
        "model_name": model, "trust_remote_code": settings.lm.trust_remote_code, "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."), "text": text, "settings": given, "out": str(folder / "results"),
        "answer": str(folder / "answer.json"),
    }  # fmt: skip
    write_json(folder / "job.json", job)
    return folder / "job.json"


def _model_for_others(lm: LanguageModel, folder: Path) -> str:
    """A folder or hub id that TransformerLens reads; of a GGUF file, a folder of its weights is written."""
    source, options = locate(lm.name)
    if "gguf_file" not in options:
        return source
    lm.save(folder)
    return str(folder)


def _run(suite: Suite, job: Path, out: Path, display: Display) -> Iterator[tuple[str, Path]]:
    """Yield the name and the results of each eval that is done; UserError where one is not."""
    # sae-bench's probes share one scope of shape checks with what they call, so that recent jaxtyping refuses them; the
    # script's folder, full of our modules, is kept off the path.
    env = {**os.environ, "JAXTYPING_DISABLE": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    doing, log, left = "set-up", job.with_name(LOG), set(read_json(job)["evals"])
    command = [suite.python, str(BRIDGE), str(job)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # it may not ask
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=env, **pipes) as process:
        try:
            display("sae-bench: starting")
            for line in _lines(process.stdout):
                file.write(line + "\n")
                if mark := MARK.match(line):
                    doing = mark["name"]
                    display(f"sae-bench {doing}")
                    if mark["file"]:
                        left.discard(doing)
                        yield doing, Path(mark["file"])
                elif (bar := BAR.match(line)) and int(bar["of"]) > 1:
                    display(f"sae-bench {doing}: {bar['what'] or 'working'}", int(bar["done"]), int(bar["of"]))
        except BaseException:
            process.terminate()
            raise
    if left:
        raise UserError(_failure(job, doing, process.returncode, out))


def _lines(stream: Any) -> Iterator[str]:
    """What was printed, piece by piece: progress bars end theirs by a carriage return."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65_536):
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from (line.decode(errors="replace") for line in lines)
    yield rest.decode(errors="replace")


def _failure(job: Path, doing: str, code: int, out: Path) -> str:
    """Why sae-bench did not do an eval, in a sentence; what it printed is kept."""
    answer = read_json(job.with_name("answer.json")) if job.with_name("answer.json").is_file() else {}
    reason = " ".join(str(answer.get("error", f"it ended with code {code}")).split())[:400]
    if answer.get("kind") == "refused":
        return f"--suite-config: {reason}"
    kept = out / RESULTS / LOG
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.with_name(LOG), kept)
    if answer.get("kind") == "hub":
        return (
            f"sae-bench's {doing} needs the Hugging Face hub, which does not give what it asks for and of which the "
            f"local cache lacks it ({reason}); {kept} has all that it printed"
        )
    return f"sae-bench's {doing} failed: {reason}; {kept} has all that it printed"


def _keep(out: Path, name: str, file: Path, about: dict[str, Any]) -> None:
    """Take over what sae-bench wrote, with our text's name in place of the temporary folder that it was read from."""
    content = read_json(file)
    if not fits(SuiteResult, content):
        raise UserError(f"sae-bench wrote {file.name} in a layout that is not known here: take sae-bench 0.6.0")
    if about["ours"]:
        content["eval_config"]["dataset"] = about["text"]
    write_json(out / RESULTS / FOLDERS[name] / file.name, content)
    (out / RESULTS / LOG).unlink(missing_ok=True)
    write_json(out / RESULTS / RECORD, {"evals": read_record(out) | {name: about | {"file": file.name}}})
