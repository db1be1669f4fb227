"""Run PEFT's own tests about LoRA on lorasmith.peft, beside PEFT itself: `make peft-suite`.

    python -m tools.peft_suite [--work FOLDER] [--page FILE ...] [OPTIONS OF PYTEST]

pip fetches the source of the installed version of PEFT, which holds its tests, and the packages that only they need.
A test counts if it passes with PEFT itself on this machine: others need the hub or a GPU. reasons.toml says of each
kind of failure whether it is meant. Exit code 1 if a failure has no reason there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tools.peft_suite import hub
from tools.peft_suite.plugin import FILES

ROOT = Path(__file__).parents[2]
PACKAGES = ("parameterized", "scipy", "diffusers", "importlib_metadata", "zipp", "attrs")  # imported by the tests
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
# PEFT's packaging turns on coverage for pytest; none of its configuration is needed here.
PYTEST = ("-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-p", "tools.peft_suite.plugin", "-p", "no:cacheprovider",
          "-q", "--tb=short")  # fmt: skip


def main() -> int:
    """Fetch, run, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m tools.peft_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peft-suite", help="folder for what is fetched")
    parser.add_argument("--page", type=Path, nargs="*", default=[], help="pages whose table is replaced")
    known, options = parser.parse_known_args()
    work = known.work.resolve()
    source = fetch(work)
    hub.write(work / "hub")
    theirs = run(source, work, "peft", options)
    ours = run(source, work, "lorasmith", options)
    result = Comparison(theirs, ours)
    print(result.text())
    for page in known.page:
        result.write(page)
    return 1 if result.unexplained else 0


def fetch(work: Path) -> Path:
    """The folder of PEFT's source, of the version that is installed; its own package is not used."""
    name = f"peft-{version('peft')}"
    if not (work / name).is_dir():
        subprocess.run([*PIP, "install", "--no-deps", "--target", work / "packages", *PACKAGES], check=True)
        request = ["download", "--no-deps", "--no-build-isolation", "--no-binary", "peft", "--dest", work]
        subprocess.run([*PIP, *request, f"peft=={version('peft')}"], check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        (work / name / "tests" / "__init__.py").touch()  # its tests import each other as a package
    return work / name


def run(source: Path, work: Path, which: str, options: list[str]) -> dict[str, dict[str, str]]:
    """The outcome of each test, with PEFT itself or with lorasmith.peft."""
    outcomes = work / f"{which}.json"
    outcomes.unlink(missing_ok=True)
    print(f"PEFT's tests with {which} ...", flush=True)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "src", work / "packages")))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub"), "PYTHONPATH": path,
                                "OUTCOMES": str(outcomes), "FACADE": "1" if which == "lorasmith" else ""}  # fmt: skip
    files = [f"tests/{name}.py" for name in sorted(FILES)]
    with (work / f"{which}.txt").open("w") as log:
        subprocess.run(
            [sys.executable, *PYTEST, *files, *options],
            cwd=source,
            env=environment,
            stdout=log,
            stderr=log,
            check=False,
        )
    return json.loads(outcomes.read_text("utf-8"))


class Comparison:
    """How the tests that pass with PEFT itself end with lorasmith.peft."""

    def __init__(self, theirs: dict[str, dict[str, str]], ours: dict[str, dict[str, str]]) -> None:
        reasons = tomllib.loads((Path(__file__).parent / "reasons.toml").read_text("utf-8")).get("reason", [])
        passing = [test for test, result in theirs.items() if result["outcome"] == "passed"]
        self.count, self.passed = len(passing), 0
        self.explained: Counter[int] = Counter()
        self.unexplained: dict[str, str] = {}
        self.reasons = reasons
        for test in passing:
            result = ours.get(test, {"outcome": "failed", "why": "not collected"})
            if result["outcome"] == "passed":
                self.passed += 1
                continue
            at = next((i for i, reason in enumerate(reasons) if _matches(reason, test, result["why"])), None)
            if at is None:
                self.unexplained[test] = f"{result['outcome']}: {result['why']}"
            else:
                self.explained[at] += 1

    def table(self, language: str) -> str:
        """A Markdown table: how many pass, and how many do not for which reason."""
        head = {"en": "| tests | outcome |", "zh": "| 测试数 | 结果 |"}[language]
        peft = f"PEFT {version('peft')}"
        passed = {"en": f"pass, of {self.count:,} that pass with {peft} itself on the same machine",
                  "zh": f"通过（同一台机器上 {peft} 自身通过的共 {self.count:,} 个）"}[language]  # fmt: skip
        rows = [f"| {self.passed:,} | {passed} |"]
        rows += [f"| {count:,} | {self.reasons[at][language]} |" for at, count in self.explained.most_common()]
        if self.unexplained:
            rows.append(f"| {len(self.unexplained):,} | {'not explained yet' if language == 'en' else '尚未查明'} |")
        return "\n".join([head, "| ---: | --- |", *rows])

    def text(self) -> str:
        """The table, and the tests that fail without a known reason."""
        kinds = Counter(re.sub(r"[\d.e-]+", "N", why)[:160] for why in self.unexplained.values())
        lines = [self.table("en"), ""]
        for kind, count in kinds.most_common(40):
            test = next(t for t, why in self.unexplained.items() if re.sub(r"[\d.e-]+", "N", why)[:160] == kind)
            lines.append(f"{count:5} x {kind}\n        {test}")
        return "\n".join(lines)

    def write(self, page: Path) -> None:
        """Replace the table between the two marks of a page."""
        language = "zh" if page.name.endswith(".zh.md") else "en"
        begin, end = "<!-- peft-suite -->\n", "\n<!-- /peft-suite -->"
        before, _begin, rest = page.read_text("utf-8").partition(begin)
        _old, _end, after = rest.partition(end)
        page.write_text(before + begin + self.table(language) + end + after, "utf-8")


def _matches(reason: dict[str, str], test: str, why: str) -> bool:
    return re.search(reason.get("test", ""), test) is not None and re.search(reason.get("message", ""), why) is not None


if __name__ == "__main__":
    sys.exit(main())
