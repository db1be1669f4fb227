"""Try every chat template of the list that is on this machine, and write docs/compatibility.md.

python -m tests.data.corpus [CHECKOUT ...]      folders with checkouts of the projects that have the templates

Templates are looked for in these folders, in installed packages, and with --download in packages that pip fetches.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorasmith.data.template.encoding import Template
from lorasmith.errors import LorasmithError
from tests.data.corpus.conversations import KINDS
from tests.data.corpus.oracle import REFUSED, WRONG, Verdict, judge
from tests.data.corpus.page import write
from tests.data.corpus.sources import Entry, download, entries, packages, text_of
from tests.data.corpus.tokenizers import tokenizer_for


def verdicts(entry: Entry, text: str) -> dict[str, Verdict]:
    """What lorasmith does with each kind of conversation under this template."""
    tokenizer = tokenizer_for(text, entry.bos, entry.eos, entry.ends)
    try:
        ends = [int(i) for i in tokenizer.convert_tokens_to_ids(list(entry.ends))]
        template = Template.of(tokenizer, "model", ends)
    except LorasmithError as error:
        return {kind: Verdict(REFUSED, str(error)) for kind in KINDS}
    return {kind: judge(template, tokenizer, messages) for kind, messages in KINDS.items()}


def main(words: Sequence[str] | None = None) -> int:
    """Try all, print what is wrong or missing, write the page; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", help="names of templates that contain this text")
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="fetch packages that have templates to there")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="write compatibility.md and .zh.md to there")
    args = parser.parse_args(words)
    if args.download:
        args.folders += download(args.download)
    chosen = [entry for entry in entries() if (args.only or "") in entry.name]
    found: dict[str, dict[str, Verdict]] = {}
    missing: Counter[str] = Counter()
    for entry in chosen:
        text = text_of(entry, args.folders)
        if text is None:
            missing[entry.source] += 1
            continue
        found[entry.name] = verdicts(entry, text)
    for name, fates in found.items():
        for kind, verdict in fates.items():
            if verdict.fate == WRONG or (args.only and verdict.why):
                print(f"{name}, {kind}: {verdict.fate}: {verdict.why}")
    for kind in KINDS:
        counts = Counter(fates[kind].fate for fates in found.values())
        print(f"{kind}: {', '.join(f'{fate} {n}' for fate, n in sorted(counts.items()))}")
    for source, count in missing.items():
        print(f"not on this machine: {count} templates of {source}; give a checkout of {packages()[source]}")
    if args.pages and found:
        write(args.pages, found, missing)
    return any(verdict.fate == WRONG for fates in found.values() for verdict in fates.values())


if __name__ == "__main__":
    sys.exit(main())
