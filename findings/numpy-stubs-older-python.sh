#!/usr/bin/env bash
# mypy finds errors in right calls of numpy 2.5.5 when it checks for a Python older than 3.12.
#
# A package that supports Python 3.10 tells mypy so (python_version). numpy 2.5 itself needs 3.12, and
# so does the syntax of its type stubs. mypy does not say that: it goes on with other overloads than
# the stubs mean, and reports the caller. Seen with numpy 2.5.5 and mypy 2.4.1 under Python 3.12:
#
#   for Python 3.12: Success
#   for Python 3.10: error: All overload variants of "max" of "ndarray" require at least one argument
#
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
for python in python3.12 python3.13 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then break; fi
done
"$python" -m venv "$room/venv"
"$room/venv/bin/pip" install -q numpy==2.5.5 mypy==2.4.1
printf '%s\n' 'import numpy as np' '' 'print(np.zeros(3).max())' >"$room/largest.py"

check() { (cd "$room" && "$room/venv/bin/mypy" --python-version "$1" largest.py 2>&1); }

new=$(check 3.12 || true) old=$(check 3.10 || true)
echo "for Python 3.12: ${new%%:*}"
echo "for Python 3.10: $(grep -o 'error: .*argument' <<<"$old" | head -n 1 || true)"
if [[ $new == Success:* && $old == *'"max" of "ndarray" require at least one argument'* ]]; then exit 0; fi
echo "this has changed" >&2
exit 1
