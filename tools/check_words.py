"""Words that the project has given up, comments too wide, files too long, private imports.

    python tools/check_words.py [FOLDER ...]

Prints each with the word to use in its place, and ends with 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "python", "docs", "benches", "tests")
ENDINGS = (".rs", ".py", ".pyi", ".md")
MAX_LINES = 700
MAX_COMMENT = 100

# A pattern, and the field's word for it. Names are matched as they are written in code, so that
# ordinary English ("in its place", "by the way") passes.
WORDS = {
    r"\bask(s|ed|ing)? (for|ahead)\b|\b_?ask_ahead\b": "prefetch; of people, want or need",
    r"\bso many\b": "that many, or the number's name",
    r"\bside_by_side\b|\bSideBySide\b": "grouped (lanes of several groups in a vector)",
    r"\blook_at\b": "prepare_norm_grad, or what is read",
    r"\bgive_back\b": "accumulate_grad",
    r"\b(in|out)_places\b|\binterleave_(places|sources)\b": "dst_index, src_index",
    r"\bpicks?\b|\bpicks?_two\b": "permute, permute2; choose",
    r"\bWays?\b(?! to)": "Algorithm, plan",
    r"\b(Folds|Unfolds|unfolds)\b|\bfolds(::|\.rs)": "segmented sum, segmented broadcast",
    r"\bSpread\b|\bspread(::|\.rs)": "stride-2 input gradient",
    r"\b(planes|strips)(::|\.rs)": "dwconv_nchw, dwconv_nhwc",
    r"\brow_products\b|\bDotRows\b|\bConvRows\b": "dot_nt, the conv1x1 microkernel",
    r"\bProducts\b": "MulAcc (Fma, Bf16Dot)",
    r"\bpromise\(|\bChecked[A-Z]\w*": "new_unchecked, Promised",
    r"\bStart::(Zero|Bias|Output)\b": "Init",
    r"\bSight\b": "Window, TapView",
    r"\bActive::": "IsaKind",
    r"\bhold_f32s\b": "optimization_barrier",
    r"\b(first|second|last)(-level)? cache\b": "L1, L2, LLC",
}
_PATTERNS = [(re.compile(pattern), word) for pattern, word in WORDS.items()]
_PRIVATE = re.compile(
    r"^\s*(from|import) (torch|tensorflow|keras|jax|flax)\S*(\._|\.src\b|\.python\b)"
    r"|^\s*from (torch|tensorflow|keras|jax|flax)\S* import _"
)
# Not before the first DTensor comes along, as it is imported slowly.
_MAY_IMPORT = ("_private.py", "torch/_sharding.py")


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a file, a line each."""
    name = path.relative_to(ROOT).as_posix()
    lines = path.read_text("utf-8").splitlines()
    if len(lines) > MAX_LINES and path.suffix in (".rs", ".py"):
        yield f"{name}: {len(lines)} lines, at most {MAX_LINES}"
    in_package = name.startswith("python/") and not name.endswith(_MAY_IMPORT)
    for number, line in enumerate(lines, 1):
        for pattern, word in _PATTERNS:
            if found := pattern.search(line):
                yield f"{name}:{number}: {found[0]!r} is {word}"
        if path.suffix == ".rs" and line.lstrip().startswith("//") and len(line) > MAX_COMMENT:
            yield f"{name}:{number}: a comment of {len(line)} columns, at most {MAX_COMMENT}"
        if in_package and _PRIVATE.match(line):
            yield f"{name}:{number}: a private name of a framework belongs into its _private.py"


def main(folders: Sequence[str] = ()) -> int:
    """Checks all files of some folders, or of all; returns the exit status."""
    count = 0
    for folder in folders or FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in ENDINGS:
                for problem in problems(path):
                    print(problem)
                    count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
