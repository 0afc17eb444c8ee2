"""The training text: the Python standard library's own sources, split by file hash.

Chosen because every Python installation has it, its licence (PSF) allows it, and a 5M-parameter model can
learn it: code repeats itself, and completions can be judged at a glance.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not idiomatic code: generated character maps and help texts in string literals.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# Tests are 60 % of the library's bytes; more than this share would make them what the model writes.
MAX_TEST_SHARE = 0.4
HELD_OUT_PER_256 = 13  # 5 % of the files


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library's root and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no text is in both."""

    train: list[Document]
    held_out: list[Document]


def standard_library() -> Path:
    """The running interpreter's own library folder."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(root: Path) -> Corpus:
    """Reads, deduplicates and splits all sources below ``root``; the same files give the same corpus."""
    sources: list[tuple[bytes, Document]] = []
    tests: list[tuple[bytes, Document]] = []
    seen: set[bytes] = set()
    for document in _documents(root):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        is_test = not TEST_FOLDERS.isdisjoint(Path(document.path).parts)
        (tests if is_test else sources).append((digest, document))
    size = sum(len(document.text) for _, document in sources)
    tests = _up_to(
        int(size * MAX_TEST_SHARE / (1 - MAX_TEST_SHARE)), sorted(tests, key=lambda entry: entry[0])
    )
    chosen = sorted(sources + tests, key=lambda entry: entry[1].path)
    return Corpus(
        train=[document for digest, document in chosen if digest[0] >= HELD_OUT_PER_256],
        held_out=[document for digest, document in chosen if digest[0] < HELD_OUT_PER_256],
    )


def _documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.isdisjoint(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the library's tests hold files in other encodings on purpose
            continue
        if text.strip():
            yield Document(str(relative), text)


def _up_to(max_chars: int, entries: list[tuple[bytes, Document]]) -> list[tuple[bytes, Document]]:
    """The first entries whose texts add up to at most ``max_chars``, those too long for the rest passed over."""
    chosen, used = [], 0
    for entry in entries:
        size = len(entry[1].text)
        if used + size <= max_chars:
            chosen.append(entry)
            used += size
    return chosen
