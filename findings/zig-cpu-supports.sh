#!/usr/bin/env bash
# A C program that asks the processor with __builtin_cpu_supports compiles with zig cc and does not link.
#
# gcc and clang answer it from a variable of their run-time libraries, __cpu_model. zig brings one
# of its own that has no such variable: the compiler accepts what the linker misses. Seen with
# ziglang 0.17.0 on x86-64, for the machine itself and for x86_64-linux-musl:
#
#   error: undefined symbol: __cpu_model
#
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
[ "$(uname -m)" = x86_64 ] || { echo "needs x86-64" >&2 && exit 2; }
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
export ZIG_GLOBAL_CACHE_DIR=$room/cache
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -q ziglang==0.17.0
printf '%s\n' 'int main(void) { return __builtin_cpu_supports("avx2") ? 0 : 1; }' >"$room/ask.c"

build() { "$room/venv/bin/python" -m ziglang cc "$@" "$room/ask.c" -o "$room/ask" 2>&1; }

changed=0
for target in native x86_64-linux-musl; do
    words=()
    [ "$target" = native ] || words=(-target "$target")
    build -c "${words[@]}" >/dev/null || { echo "$target: does not compile" >&2 && changed=1; }
    found=$(build "${words[@]}" | grep -o 'error: undefined symbol: __cpu_model' | head -n 1 || true)
    echo "$target: ${found:-links}"
    [ -n "$found" ] || changed=1
done
[ "$changed" = 0 ] || echo "this has changed" >&2
exit "$changed"
