#!/usr/bin/env bash
# Compile libsrc/ into the one shared library anepy loads: libanepy.so, or libanepy.dylib on macOS.
#
# usage: ./build_lib.sh [--out DIR] [--target TAG] [--sdk DIR] [--debug] [--asan] [--ubsan] [--tsan]
#                       [--werror] [--quiet] | --print-tag | --print-hash
#
#   --out DIR      folder of the result (default: anepy/_lib/<tag>; sanitized: <tag>-address and so on)
#   --target TAG   platform it is for, e.g. linux-aarch64-musl or macos-arm64 (default: this one);
#                  gcc needs CC=<triple>-gcc, which is the default; clang and zig cc are told
#   --sdk DIR      macos-* on another system: the folder of a macOS SDK, for CC="zig cc", or clang
#                  with its ld64.lld
#   --debug        -O1 -g, assertions on
#   --asan --ubsan --tsan   the sanitizers, also with -O1 -g and assertions
#   --werror       all the warnings the project is free of, as errors
#   --quiet        print nothing unless something fails
#   --print-tag    print the platform tag of this machine
#   --print-hash   print the SHA-256 of the sources; its first 16 digits are the library's build id
#
# environment: CC, the C11 compiler (default cc, else gcc, clang, zig cc);
#              JOBS, how many files are compiled at once (default: the processors of this process).
# CFLAGS and LDFLAGS are not read: a -march=native or -ffast-math meant for another program would
# change results, or make a library that does not run on the next machine.
#
# Beside the library it puts LIBRARY.sha256, as sha256sum writes it; anepy opens no other bytes.
#
# Works from any folder and from a read-only source tree (give --out). Several may run at once: each
# builds in its own folder inside the output folder and then renames.
set -euo pipefail

die() {
    printf 'build_lib.sh: %s\n' "$2" >&2
    exit "$1"
}

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -d "$root/libsrc" ] || die 1 "no folder libsrc beside $root/build_lib.sh"

# ---------------------------------------------------------------------------------- platform, hash

host_tag() {
    local system machine
    system=$(uname -s)
    machine=$(uname -m)
    case $system in
    Darwin) echo "macos-$machine" ;;
    Linux)
        case $machine in
        amd64) machine=x86_64 ;;
        arm64) machine=aarch64 ;;
        esac
        if getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
            echo "linux-$machine-glibc"
        else
            echo "linux-$machine-musl"
        fi
        ;;
    *) die 1 "$system is not supported, only Linux and macOS are" ;;
    esac
}

sha=(sha256sum)
command -v sha256sum >/dev/null || sha=(shasum -a 256)

source_files() { find -H libsrc -type f \( -name '*.c' -o -name '*.h' -o -name '*.m' \); }

# The SHA-256 of a text with one line "<SHA-256 of file>  <path>" per file, in byte order of the
# paths. anepy/native/build.py computes the same; a library whose id differs was built from other sources.
source_hash() {
    (
        cd "$root"
        { source_files && echo build_lib.sh; } |
            LC_ALL=C sort | tr '\n' '\0' | xargs -0 "${sha[@]}" | "${sha[@]}" | cut -c 1-64
    )
}

# ----------------------------------------------------------------------------------------- options

out='' target='' sdk='' debug=no werror=no quiet=no sanitizers=''
while [ $# -gt 0 ]; do
    case $1 in
    --out | --target | --sdk)
        [ -n "${2:-}" ] || die 2 "$1 needs a value"
        case $1 in --out) out=$2 ;; --target) target=$2 ;; *) sdk=$2 ;; esac
        shift
        ;;
    --debug) debug=yes ;;
    --asan) sanitizers="$sanitizers address" ;;
    --ubsan) sanitizers="$sanitizers undefined" ;;
    --tsan) sanitizers="$sanitizers thread" ;;
    --werror) werror=yes ;;
    --quiet) quiet=yes ;;
    --print-tag) host_tag && exit ;;
    --print-hash) source_hash && exit ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit ;;
    *) die 2 "unknown option $1 (see --help)" ;;
    esac
    shift
done
case $sanitizers in *address*thread* | *thread*address*) die 2 "--asan and --tsan exclude each other" ;; esac

host=$(host_tag)
target=${target:-$host}
case $target in
linux-*-glibc) triple=${target#linux-} triple=${triple%-glibc}-linux-gnu ;;
linux-*-musl) triple=${target#linux-} triple=${triple%-musl}-linux-musl ;;
linux-*-*) die 2 "unknown target $target (linux-<machine>-glibc, linux-<machine>-musl, macos-arm64)" ;;
linux-?*) triple=${target#linux-}-linux-gnu target=$target-glibc ;;
macos-arm64 | macos-x86_64) triple=${target#macos-}-apple-macos12 ;;
*) die 2 "unknown target $target (linux-<machine>-glibc, linux-<machine>-musl, macos-arm64)" ;;
esac

case $target in macos-*)
    if [ -n "$sdk" ]; then
        [ -d "$sdk/System/Library/Frameworks" ] || die 2 "--sdk $sdk is no macOS SDK: it has no System/Library/Frameworks"
        sdk=$(cd "$sdk" && pwd)
    elif [ "$(uname -s)" != Darwin ]; then
        die 2 "--target $target needs --sdk DIR here, the folder of a macOS SDK"
    fi
    ;;
*) [ -z "$sdk" ] || die 2 "--sdk is for macos-* targets, this is $target" ;;
esac

if [ -z "$out" ]; then
    [ -d "$root/anepy" ] || die 2 "give --out DIR: $root is not a checkout of anepy"
    out=$root/anepy/_lib/$target
    for name in $sanitizers; do out=$out-$name; done
fi

# ---------------------------------------------------------------------------------------- compiler

remedy='install one: "apt install gcc libc6-dev" (Debian, Ubuntu), "dnf install gcc glibc-devel" (Fedora, RHEL), "apk add gcc musl-dev" (Alpine), or anywhere "pip install ziglang"'
[ "$(uname -s)" != Darwin ] || remedy='install one: "xcode-select --install"'

if [ -n "$sdk" ] && [ -z "${CC:-}" ]; then
    # A clang that brings the linker for Mach-O.
    for CC in clang clang-{30..14} ''; do
        if command -v "$CC" >/dev/null && command -v "$("$CC" -print-prog-name=ld64.lld)" >/dev/null; then break; fi
    done
    [ -n "$CC" ] || die 1 "no clang with ld64.lld found; install both: \"apt install clang-19 lld-19\" (Debian)"
elif [ "$target" != "$host" ]; then
    : "${CC:=$triple-gcc}"
elif [ -z "${CC:-}" ]; then
    for CC in cc gcc clang zig ''; do if command -v "$CC" >/dev/null; then break; fi; done
    [ -n "$CC" ] || die 1 "no C compiler found (tried cc, gcc, clang, zig); $remedy"
    [ "$CC" != zig ] || CC='zig cc'
fi
# CC may carry arguments ("zig cc"), unless all of it is one file.
if command -v "$CC" >/dev/null; then cc=("$CC"); else read -r -a cc <<<"$CC"; fi
command -v "${cc[0]:-}" >/dev/null || die 1 "the C compiler CC=$CC was not found; $remedy"
# Without the command line tools, macOS has a cc that only opens a dialog.
if [ "$(uname -s)" = Darwin ] && ! xcode-select -p >/dev/null 2>&1; then
    die 1 "no C compiler (the command line tools are missing); $remedy"
fi
# ------------------------------------------------------------------------------------------- flags

build_id=$(source_hash)
build_id=${build_id:0:16}

flags=(-std=c11)
if [ "$debug$sanitizers" = no ]; then
    flags+=(-O3 -g0 -DNDEBUG)
    # A write beyond a buffer ends the process instead of going on. The headers of musl know no
    # fortification, older compilers and headers only the level below.
    flags+=(-fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3)
else
    flags+=(-O1 -g -fno-omit-frame-pointer)
    build_id=$build_id-debug
fi
flags+=(-fno-math-errno -fno-trapping-math -ffp-contract=fast -fPIC -fvisibility=hidden -pthread)
flags+=(-Ilibsrc "-DANEPY_BUILD_ID=\"$build_id\"")
if [ "$werror" = yes ]; then
    flags+=(-Wall -Wextra -Wshadow -Wundef -Wvla -Wstrict-prototypes -Wmissing-prototypes -Werror)
fi
link=(-shared -pthread)
# Without -O, zig's clang stops at overflow; a sanitizer is what the options ask for, no more.
[ -n "$sanitizers" ] || flags+=(-fno-sanitize=all)
for name in $sanitizers; do
    flags+=("-fsanitize=$name")
    link+=("-fsanitize=$name")
    [ "$name" != undefined ] || flags+=(-fno-sanitize-recover=undefined)
done
case $target in
macos-*)
    library=libanepy.dylib source_pattern='\.[cm]$'
    # Accelerate, used by kernels/blas_accelerate.c, is opened at run time, as is all that is private.
    link+=(-install_name @rpath/libanepy.dylib -lobjc -framework Foundation -framework CoreFoundation)
    link+=(-framework IOSurface -framework Metal -framework MetalPerformanceShaders)
    [ -z "$sdk" ] || cc+=(-isysroot "$sdk")
    ;;
*)
    library=libanepy.so source_pattern='\.c$'
    # An undefined symbol must fail here, not at load. Sanitizers leave theirs to the program.
    [ -n "$sanitizers" ] || link+=("-Wl,-z,defs")
    # Nothing that is called through can be written, nothing on the stack can run.
    link+=("-Wl,-z,relro" "-Wl,-z,now" "-Wl,-z,noexecstack")
    ;;
esac

# ----------------------------------------------------------------------------------------- compile

say() { [ "$quiet" = yes ] || printf '%s\n' "$*"; }
quoted() {
    local word
    for word; do
        case $word in *[!A-Za-z0-9_./,=+-]*) printf '%q ' "$word" ;; *) printf '%s ' "$word" ;; esac
    done
}

mkdir -p "$out" 2>/dev/null || die 1 "cannot create the folder $out; give --out DIR"
out=$(cd "$out" && pwd)
# What killed builds left behind.
find "$out" -maxdepth 1 -name '.build.*' -mtime +1 -exec rm -rf {} + 2>/dev/null || true
work=$(mktemp -d "$out/.build.XXXXXX" 2>/dev/null) || die 1 "cannot write in $out; give --out DIR"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

cd "$root"
zig=no
echo 'int anepy_probe;' >"$work/probe.c"
# Only zig knows a processor called baseline; clang for x86 only warns. Unless told so,
# zig compiles for the one it runs on.
if ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$work/zig} \
    "${cc[@]}" -Werror -mcpu=baseline -c "$work/probe.c" -o "$work/probe.o" 2>/dev/null; then
    zig=yes
    export ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$work/zig}
fi
case " $CC $zig " in
*-target*) ;;
*' yes ')
    case $target in
    macos-*) triple=${triple/arm64/aarch64} triple=${triple/apple-macos12/macos.12.0} ;;
    linux-x86_64-glibc | linux-aarch64-glibc) triple=$triple.2.17 ;; # RHEL 7, Debian 8
    esac
    cc+=(-target "$triple")
    ;;
*)
    if [ "$target" != "$host" ]; then
        case "$("${cc[@]}" --version 2>/dev/null || true)" in *clang*) cc+=("--target=$triple") ;; esac
    fi
    ;;
esac
[ "$zig" = no ] || cc+=(-mcpu=baseline)
case $zig$sdk in
no/*) link+=(-fuse-ld=lld "-Wl,-adhoc_codesign") ;;
yes/*) # signs by itself, and looks for nothing in a system root
    cc+=(-isystem "$sdk/usr/include" -iframework "$sdk/System/Library/Frameworks")
    link+=("-L$sdk/usr/lib" "-F$sdk/System/Library/Frameworks")
    ;;
esac
printf '#include <math.h>\n#include <pthread.h>\nint anepy_probe(void) { return 0; }\n' >"$work/probe.c"
"${cc[@]}" -std=c11 -c "$work/probe.c" -o "$work/probe.o" 2>"$work/probe.log" || {
    cat "$work/probe.log" >&2
    die 1 "the C compiler $CC cannot compile an empty program for $target; $remedy"
}
# Compilers and assemblers from before 2020 do not know the bf16 instructions, those from before 2021
# not the matrix unit's: these sets are left out.
printf '%s\n' '#if defined(__x86_64__)' '#include <immintrin.h>' \
    '__attribute__((target("avx512f,avx512bf16"))) __m512 probe(__m512 c, __m512bh a) {' \
    '    return _mm512_dpbf16_ps(c, a, a);' '}' '#elif defined(__aarch64__)' '#include <arm_neon.h>' \
    '__attribute__((target("arch=armv8.2-a+bf16")))' \
    'float32x4_t probe(float32x4_t c, bfloat16x8_t a) { return vbfdotq_f32(c, a, a); }' '#endif' \
    >"$work/probe.c"
"${cc[@]}" -O2 -c "$work/probe.c" -o "$work/probe.o" 2>/dev/null || flags+=(-DANEPY_NO_BF16 -DANEPY_NO_AMX)
printf '%s\n' '#if defined(__x86_64__)' '#include <immintrin.h>' \
    '__attribute__((target("amx-tile,amx-bf16"))) void probe(void) { _tile_dpbf16ps(0, 1, 2); }' \
    '#endif' >"$work/probe.c"
"${cc[@]}" -O2 -c "$work/probe.c" -o "$work/probe.o" 2>/dev/null || flags+=(-DANEPY_NO_AMX)
rm "$work"/probe.*

# Largest first, so that no long one is left for the end.
sources=()
while IFS= read -r source; do sources+=("$source"); done < <(
    source_files | grep "$source_pattern" | tr '\n' '\0' | LC_ALL=C xargs -0 ls -1S
)
[ ${#sources[@]} -gt 0 ] || die 1 "no C files in $root/libsrc"
jobs=${JOBS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)}

say "$(quoted "${cc[@]}" "${flags[@]}")-c FILE.c -o FILE.o   # ${#sources[@]} files, $jobs at a time"
# shellcheck disable=SC2016 # the inner shell expands these: "$@" ends with the source file
printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P "$jobs" bash -c '
    source=${!#}
    exec "$@" -o "$0/${source//\//-}.o"' "$work" "${cc[@]}" "${flags[@]}" -c ||
    die 1 "compiling failed (messages above); compiler: $("${cc[@]}" --version 2>&1 | head -n 1)"

say "$(quoted "${cc[@]}" "${link[@]}")-o $library *.o -lm"
"${cc[@]}" "${link[@]}" -o "$work/$library" "$work"/*.o -lm ||
    die 1 "linking failed (messages above); compiler: $("${cc[@]}" --version 2>&1 | head -n 1)"

# Signed last, and never over a file that is in use: macOS kills processes whose library changed.
if [ "$(uname -s)" = Darwin ]; then codesign --force --sign - "$work/$library"; fi
chmod go-w "$work/$library"
(cd "$work" && "${sha[@]}" "$library" >"$library.sha256")
mv -f "$work/$library.sha256" "$work/$library" "$out" || die 1 "cannot replace $out/$library"

say "$out/$library"
say "sha256 $(cut -d ' ' -f 1 "$out/$library.sha256")"
